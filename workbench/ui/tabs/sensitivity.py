"""Screen 2: where the model is fragile, block by step, then layer by step, then one layer at one step."""

from __future__ import annotations

import gradio as gr

from workbench.options import LatencyConfig, QuantConfig, SensitivityConfig
from workbench.ui import inputs, tables, widget
from workbench.ui.actions import common
from workbench.ui.actions import sensitivity as actions
from workbench.ui.bindings import Page
from workbench.ui.figures import empty
from workbench.ui.tabs import TabInputs, notice_line
from workbench.ui.views import quantities
from workbench.ui.views import sensitivity as views
from workbench.ui.views.quantities import QUANTITIES

MAP = ("fisher_TL", "profile", "cell", "quantity", "map_bits")
WIDTHS = (3, 4, 6, 8)
WAYS = [("mean of its layers", "mean"), ("sum", "sum"), ("largest", "max")]  # of putting the layers of a block together


def build(page: Page, model_inputs: TabInputs) -> list:
    """Returns the inputs of the Profile button."""
    start, cancel, (quantity, bits, how) = _tools()
    notice_line(page, "sensitivity")
    insight = gr.HTML(elem_id="insight")
    with gr.Accordion("Settings of the profile", open=False, elem_classes=["settings"]):
        settings = [*inputs.build(SensitivityConfig, *actions.SENSITIVITY_INPUTS).values(),
                    *inputs.build(QuantConfig, *actions.QUANT_INPUTS).values(), *inputs.build(LatencyConfig, "target").values()]
    blocks, layers, cells = _maps(page)
    _one_layer(page)
    _show_map(page, blocks, layers, insight, cells)
    page.show(start, ["busy", "bundle"], lambda s: gr.Button(interactive=s.bundle is not None and not s.busy))
    page.show(cancel, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "profile"))
    page.show(how, ["how", "quantity"], lambda s: _how(s))
    page.show(bits, ["map_bits", "quantity"], lambda s: gr.Radio(value=s.map_bits, interactive=QUANTITIES[s.quantity].needs_bits))
    page.show(quantity, ["quantity"], lambda s: s.quantity)
    trace = [model_inputs.components[name] for name in ("steps", "seed", "prompts")]
    page.on(start.click, actions.profile, [*trace, *settings], tab="sensitivity")
    page.on(cancel.click, common.stop, tab="sensitivity")
    for control in (quantity, how, bits):
        page.on(control.input, actions.show_quantity, [quantity, how, bits], tab="sensitivity")
    page.on(blocks.cell_click, actions.click_block, tab="sensitivity", with_payload=True)
    page.on(layers.cell_click, actions.click_layer, tab="sensitivity", with_payload=True)
    page.on(cells.pick, actions.pick_row, tab="sensitivity", with_payload=True)
    return [*trace, *settings]


def _how(session) -> gr.Radio:
    """The choices stay: an action on its way from the browser may still carry one that the next quantity does not offer."""
    fixed = QUANTITIES[session.quantity].block
    return gr.Radio(value=fixed or session.how, interactive=fixed is None)


def _tools():
    names = [(q.label, name) for name, q in QUANTITIES.items()]
    with gr.Row(equal_height=True, elem_classes=["tools"]):
        start = gr.Button("Profile", variant="primary", elem_id="profile", min_width=110, scale=0, interactive=False)
        cancel = gr.Button("Cancel", elem_id="cancel-profile", min_width=90, scale=0, interactive=False)
        quantity = gr.Dropdown(names, value="fisher", label="show", elem_id="quantity", scale=1, min_width=190, filterable=False)
        bits = gr.Radio([(str(b), b) for b in WIDTHS], value=4, label="activation bits b", elem_id="map-bits", scale=1, min_width=190,
                        interactive=False)
        how = gr.Radio(WAYS, value="mean", label="value of a block", elem_id="how", scale=1, min_width=220)
    return start, cancel, (quantity, bits, how)


def _maps(page: Page):
    label = "Block by step: strips are the means over time (below) and depth (right)"
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            blocks = widget.plot(empty("Press Profile"), elem_id="block-map", height=400, label=label, described_by="insight")
            layers = widget.plot(empty("Layers of a block"), elem_id="layer-map", height=330, label="Layers of the selected block by step",
                                 described_by="cell-detail")
        with gr.Column(scale=2, min_width=320):
            cells = widget.picker("cells")
            time = widget.plot(empty("Fisher over time"), elem_id="time-strip", height=230, label="Fisher information over time")
    page.show(time, ["fisher_TL", "stderr_TL", "cell"], lambda s: views.fisher_over_time(s.fisher_TL, s.stderr_TL, s.bundle.layers, s.cell)
              if s.bundle else empty("Fisher over time"))
    return blocks, layers, cells


def _one_layer(page: Page) -> None:
    """The selected layer at the selected step."""
    notice_line(page, "layer_inspection")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=330):
            detail = gr.HTML(elem_id="cell-detail")
            histogram = widget.plot(elem_id="histogram", height=230, label="Histogram of the weight")
        with gr.Column(scale=1, min_width=330):
            curve = widget.plot(elem_id="bits-curve", height=230, label="Predicted error against bits")
            channels = widget.plot(elem_id="channels", height=230, label="Range of each input channel")
    page.show(detail, ["profile", "cell"], _detail)
    page.show(curve, ["profile", "cell"], lambda s: views.error_against_bits(s.profile and s.profile.table, s.bundle.layers, s.cell)
              if s.bundle else empty("Error against bits of one layer and step"))
    page.show(channels, ["layer_inspection"], lambda s: views.channel_ranges(s.layer_inspection))
    page.show(histogram, ["layer_inspection"], lambda s: views.weight_histogram(s.layer_inspection))


def _detail(session) -> str:
    smap = session.profile and session.profile.sensitivity
    numbers = views.cell_numbers(smap, session.bundle.layers, session.cell) if session.bundle else ""
    return numbers or tables.empty("No layer is selected", "Click the map or a row of a table: what is chosen here is chosen everywhere.")


def _values(session):
    """(rows of the shown quantity or None, its name on axes)."""
    if session.bundle is None:
        return None, ""
    sources = quantities.Sources(session.fisher_TL, session.profile, session.map_bits)
    return quantities.values(session.quantity, sources), quantities.title(session.quantity, session.map_bits)


def _waiting(session) -> str:
    if session.profile is None and session.fisher_TL and session.quantity != "fisher":
        return "This quantity is known when the profile is done; Fisher information appears step by step"
    return (
        "The last step's column appears first, since sensitivity flows backwards from the image"
        if session.fisher_TL
        else "Press Profile: one backward replay maps every block and step"
    )


def _show_map(page: Page, blocks, layers, insight, cells) -> None:
    def draw(view, otherwise):
        def drawn(session):
            rows, label = _values(session)
            return otherwise(session) if rows is None else view(session, rows, label)

        return drawn

    def extremes(session, rows, label):
        stderr_TL = session.stderr_TL if session.quantity == "fisher" else None
        risk = QUANTITIES[session.quantity].risk
        lists = (views.extremes(rows, stderr_TL, session.bundle.layers, label, session.cell, most=most, risk=risk)
                 for most in (True, False))
        return "".join(lists)

    page.show(
        blocks,
        [*MAP, "how"],
        draw(lambda s, rows, label: views.block_map(rows, s.bundle.layers, s.quantity, label, s.how, s.cell), lambda s: empty(_waiting(s))),
    )
    page.show(
        layers,
        MAP,
        draw(lambda s, rows, label: views.layer_map(rows, s.bundle.layers, label, s.cell), lambda s: empty("Layers of a block")),
    )
    page.show(
        insight,
        ["fisher_TL", "profile", "quantity", "map_bits"],
        draw(lambda s, rows, label: views.insight_line(rows, s.bundle.layers, s.quantity, label), lambda s: ""),
    )
    page.show(
        cells,
        [*MAP, "stderr_TL"],
        draw(extremes, lambda s: tables.empty("Most fragile and most tolerant cells", "Ten of each; every row can be picked.")),
    )
