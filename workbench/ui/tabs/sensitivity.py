"""Screen 2: where the model is fragile, block by step, then layer by step, then one cell."""

from __future__ import annotations

import gradio as gr

from workbench.options import QuantConfig, SensitivityConfig
from workbench.ui import actions, forms, views
from workbench.ui.figures import empty
from workbench.ui.live import Page
from workbench.ui.tabs import Form, notice_line
from workbench.ui.widget import plot

MAP = ("fisher_TL", "cell")


def build(page: Page, model_form: Form) -> None:
    with gr.Row():
        start = gr.Button("Profile", variant="primary", elem_id="profile", min_width=120, scale=0, interactive=False)
        cancel = gr.Button("Cancel", elem_id="cancel-profile", min_width=120, scale=0, interactive=False)
        how = gr.Radio([("mean of its layers", "mean"), ("sum", "sum")], value="mean", label="value of a block", elem_id="how", scale=0,
                       min_width=300)
    notice_line(page, "sensitivity")
    with gr.Accordion("Settings of the profile", open=False), gr.Row():
        settings = [*forms.build(SensitivityConfig, *actions.SENSITIVITY_FORM).values(),
                    *forms.build(QuantConfig, *actions.QUANT_FORM).values()]
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            blocks = plot(elem_id="block-map", height=330, label="Fisher information, block by step", value=empty("Press Profile"))
            layers = plot(elem_id="layer-map", height=300, label="Fisher information, layer by step")
            time = plot(elem_id="time-strip", height=240, label="Fisher information over time")
        with gr.Column(scale=2, min_width=320):
            rows = gr.Dataframe(headers=views.FRAGILE_HEADERS, datatype=["number", "number", "str", "number", "number", "number"],
                                label="most fragile cells: click a row, or arrow keys and Enter", interactive=False, max_height=300,
                                elem_id="fragile", type="array", column_widths=["52px", "52px", "212px", "88px", "60px", "76px"])
            detail = gr.HTML(elem_id="cell-detail")
            bits = plot(elem_id="bits-curve", height=270, label="Predicted error against bits")
    _show(page, blocks, layers, time, rows, detail, bits)
    page.show(start, ["busy", "bundle"], lambda s: gr.Button(interactive=s.bundle is not None and not s.busy))
    page.show(cancel, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "profile"))
    page.show(how, ["how"], lambda s: s.how)
    trace = [model_form.components[name] for name in ("steps", "seed", "prompts")]
    page.on(start.click, actions.profile, [*trace, *settings], tab="sensitivity")
    page.on(cancel.click, actions.stop, tab="sensitivity")
    page.on(how.input, actions.aggregate, [how], tab="sensitivity")
    page.on(blocks.cell_click, actions.click_block, tab="sensitivity", with_payload=True)
    page.on(layers.cell_click, actions.click_layer, tab="sensitivity", with_payload=True)
    page.on(rows.select, actions.click_row, [rows], tab="sensitivity", with_payload=True)


def _show(page: Page, blocks, layers, time, rows, detail, bits) -> None:
    def known(session):
        return session.bundle is not None and any(row is not None for row in session.fisher_TL)

    page.show(blocks, [*MAP, "how"], lambda s: views.block_heatmap(s.fisher_TL, s.bundle.layers, s.how, s.cell) if known(s)
              else empty("The first column appears after the first step" if s.fisher_TL else "Press Profile"))
    page.show(layers, MAP, lambda s: views.layer_heatmap(s.fisher_TL, s.bundle.layers, s.cell) if known(s) else empty("Layers of a block"))
    page.show(time, [*MAP, "stderr_TL"], lambda s: views.fisher_over_time(s.fisher_TL, s.stderr_TL, s.bundle.layers, s.cell)
              if known(s) else empty("Fisher over time"))
    page.show(rows, ["fisher_TL", "stderr_TL"], lambda s: views.fragile_rows(s.fisher_TL, s.stderr_TL, s.bundle.layers)
              if known(s) else [])
    page.show(detail, ["profile", "cell"], lambda s: views.cell_numbers(s.profile and s.profile.sensitivity, s.bundle.layers, s.cell)
              if s.bundle else "")
    page.show(bits, ["profile", "cell"], lambda s: views.error_against_bits(s.profile and s.profile.table, s.bundle.layers, s.cell)
              if s.bundle else empty("Error against bits"))
