"""Screen 3: a budget, the search as it advances, the front it found, and the plan that was chosen or painted."""

from __future__ import annotations

import gradio as gr

from workbench.options import SearchConfig
from workbench.ui import budgets, forms, pictures, tables, widget
from workbench.ui.actions import common
from workbench.ui.actions import compare as compare_actions
from workbench.ui.actions import search as actions
from workbench.ui.live import Page
from workbench.ui.tabs import notice_line
from workbench.ui.views import compare as compare_views
from workbench.ui.views import plans
from workbench.ui.views import search as views

FOUND = ("events", "result")
BRUSHES = [("select", "off"), *((f"paint {bits}", bits) for bits in (3, 4, 6, 8, 16))]


def build(page: Page) -> list:
    """Returns the inputs of the Search button."""
    with gr.Row(equal_height=True, elem_classes=["tools"]):
        start = gr.Button("Search", variant="primary", elem_id="search", min_width=110, scale=0, interactive=False)
        stop = gr.Button("Stop", elem_id="stop-search", min_width=90, scale=0, interactive=False)
        sliders = [
            gr.Slider(
                0,
                1,
                label=f"at most, {axis.label} ({axis.unit})" if axis.unit not in axis.label else f"at most, {axis.label}",
                step=axis.step,
                elem_id=f"budget-{axis.short.lower()}",
                interactive=False,
                visible=axis.column is not None,
                min_width=200,
            )
            for axis in budgets.AXES
        ]
    with gr.Row(equal_height=True, elem_classes=["tools"]):
        knee = gr.Button("Knee of the front", elem_id="knee", min_width=140, scale=0, interactive=False)
        floor = gr.Button("Smallest plan above the floor", elem_id="floor", min_width=210, scale=0, interactive=False)
        floor_db = gr.Number(value=30, label="quality floor (dB, latent signal to error)", elem_id="floor-db", scale=0, min_width=270)
        floor_db.preprocess = lambda value: value
    notice_line(page, "search")
    with gr.Accordion("Settings of the search", open=False, elem_classes=["settings"]):
        settings = list(forms.build(SearchConfig, *actions.SEARCH_FORM).values())
    line = gr.HTML(elem_id="search-line")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            front = widget.plot(elem_id="pareto", height=400, label="Measured error against every budget; click a plan to choose it")
        with gr.Column(scale=2, min_width=320):
            beam = widget.plot(elem_id="beam", height=318, label="The beam: candidates, survivors and where they came from")
            replay = gr.Slider(
                1, 2, step=1, label="scrub through the search: step of the beam", elem_id="replay", visible=False, interactive=True
            )
    bits = _plan_part(page)
    _show(page, line, front, (beam, replay), (knee, floor))
    _show_sliders(page, sliders)
    page.show(start, ["busy", "profile", *FOUND], _start_button)
    page.show(stop, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "search"))
    page.on(start.click, actions.search, [*sliders, *settings], tab="search")
    page.on(stop.click, common.stop, tab="search")
    page.on(knee.click, actions.pick_knee, tab="search")
    page.on(floor.click, actions.pick_floor, [floor_db], tab="search")
    for slider in sliders:
        page.on(slider.input, actions.move_budget, sliders, tab="search", trigger_mode="always_last")
    page.on(front.cell_click, actions.click_point, tab="search", with_payload=True)
    page.on(bits.cell_click, actions.click_bits, tab="search", with_payload=True)
    page.on(bits.paint, actions.paint, tab="search", with_payload=True)
    page.on(replay.input, actions.replay, [replay], tab="search", trigger_mode="always_last")
    return [*sliders, *settings]


def _plan_part(page: Page):
    """The chosen plan: its bits, which can be painted, its costs, its images, and what differs from plan A."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            with gr.Row(equal_height=True, elem_classes=["tools"]):
                brush = gr.Radio(
                    BRUSHES,
                    value="off",
                    label="brush: drag over cells, or over the column W for stored weights",
                    elem_id="brush",
                    scale=3,
                    min_width=300,
                )
                undo = gr.Button("Undo", elem_id="undo", min_width=80, scale=0, interactive=False)
            bits = widget.plot(elem_id="bit-map", height=420, label="Bits of the chosen plan, layer by step", paintable=True)
        with gr.Column(scale=2, min_width=320):
            numbers = gr.HTML(elem_id="plan-numbers")
            images = widget.picker("plan-images")
            table = widget.picker("plan-table")
            with gr.Row(elem_classes=["tools"]):
                pin = gr.Button("Pin as plan A", elem_id="pin", min_width=120, interactive=False)
                swap = gr.Button("Swap A and B", elem_id="swap", min_width=120, interactive=False)
    with gr.Row(equal_height=False, visible=False) as both:
        with gr.Column(scale=3, min_width=340):
            change = widget.plot(elem_id="change-map", height=420, label="Recipe diff: bits of the chosen plan (B) less those of plan A")
        with gr.Column(scale=2, min_width=320):
            differ = gr.HTML(elem_id="plan-difference")
    page.show(both, ["pinned"], lambda s: gr.Row(visible=s.pinned is not None))
    page.show(
        bits,
        ["chosen", "cell", "brush"],
        lambda s: plans.bit_map(s.chosen and s.chosen.plan, s.bundle and s.bundle.layers, s.cell, s.brush),
    )
    page.show(
        numbers,
        ["chosen"],
        lambda s: (
            plans.plan_numbers(s.chosen, s.bundle, s.profile and s.profile.costs)
            or tables.empty("No plan is chosen", "A search chooses one; a click on the front, a link or a file chooses another.")
        ),
    )
    page.show(images, ["comparison", "pair", "chosen", "mode", "busy", "profile"], _images)
    page.show(undo, ["edits"], lambda s: gr.Button(interactive=bool(s.edits)))
    page.show(pin, ["chosen"], lambda s: gr.Button(interactive=s.chosen is not None))
    page.show(swap, ["chosen", "pinned"], lambda s: gr.Button(interactive=s.chosen is not None and s.pinned is not None))
    page.show(differ, ["chosen", "pinned"], _difference)
    page.show(
        change,
        ["chosen", "pinned"],
        lambda s: plans.difference_map(s.pinned and s.pinned.plan, s.chosen and s.chosen.plan, s.bundle and s.bundle.layers),
    )
    page.show(table, [*FOUND, "chosen"], lambda s: views.plan_table(views.points((), s.result), _is_chosen(s)) if s.result else "")
    page.show(brush, ["brush"], lambda s: s.brush or "off")
    page.on(brush.input, actions.set_brush, [brush], tab="search")
    page.on(undo.click, actions.undo, tab="search")
    page.on(pin.click, actions.pin, tab="search")
    page.on(swap.click, actions.swap, tab="search")
    page.on(table.pick, actions.click_point, tab="search", with_payload=True)
    page.on(images.pick, compare_actions.pick_or_draw, tab="search", with_payload=True)
    return bits


def _images(session) -> str:
    if session.chosen is None:
        return ""
    if session.comparison is None:
        able = session.profile is not None and session.example is None and not session.busy
        button = f'<button type="button" {tables.pick({"draw": True}, tag="button")}{"" if able else " disabled"}>Draw its images</button>'
        return tables.empty("No images of this plan yet", "The prompts of the Compare screen, through float and through this plan.", button)
    return compare_views.grid(
        session.comparison, session.pair, lambda image: pictures.address(session, image), hidden=session.mode == "blind"
    )


def _difference(session) -> str:
    if session.pinned is None or session.chosen is None:
        return ""
    text = plans.difference_line(session.pinned.plan, session.chosen.plan)
    return tables.notice(text, "plain") + plans.two_plans(
        session.pinned, session.chosen, session.bundle, session.profile and session.profile.costs
    )


def _is_chosen(session):
    """Which of the shown points is the chosen plan."""
    plan_id = session.chosen.plan.plan_id if session.chosen else None
    plans_of = {"front": session.result.front, "references": session.result.references} if session.result else {}
    return lambda point: plan_id is not None and point.kind in plans_of and plans_of[point.kind][point.index].plan.plan_id == plan_id


def _start_button(session):
    stopped = session.result is None and bool(session.events) and not session.busy
    own = session.profile is not None and session.example is None
    return gr.Button("Resume" if stopped else "Search", interactive=own and not session.busy)


def _show_sliders(page: Page, sliders) -> None:
    def draw(axis):
        def slider(session):
            span = axis.span(session.profile) if session.profile is not None else None
            if span is None:
                return gr.Slider(interactive=False, visible=axis.column is not None)
            low, high = span
            edge = 0 if axis.column == 1 else 0.02 * (high - low)
            return gr.Slider(
                minimum=round(low - edge, 2),
                maximum=round(high + edge, 2),
                value=session.budget.get(axis.field, high),
                interactive=True,
                visible=True,
            )

        return slider

    for axis, slider in zip(budgets.AXES, sliders):  # not on "budget": a slider that is being dragged must not be set back
        page.show(slider, ["profile", "sliders_moved"], draw(axis))


def _show(page: Page, line, front, beam_parts, picks) -> None:
    beam, replay = beam_parts

    def last(session):
        return session.events[-1] if session.events else None

    def draw(session):
        shown = views.points(session.events, session.result)
        floor = None if session.floor_db is None else actions.floor_error(session.floor_db)
        return views.front(
            shown, views.place_of(session.chosen, session.result), views.place_of(session.pinned, session.result), session.budget, floor
        )

    def slider(session):
        count = len(views.beam_steps(session.events))
        return gr.Slider(1, max(2, count), value=count, visible=count > 1)

    page.show(
        line,
        [*FOUND, "chosen", "budget"],
        lambda s: tables.notice(
            f"{views.search_line(last(s), s.result)} {views.rivals_line(s.result, s.chosen, s.budget)}".strip(), "plain"
        ),
    )
    page.show(front, [*FOUND, "chosen", "pinned", "budget", "floor_db"], draw)
    page.show(beam, ["events", "replay"], lambda s: views.beam(views.beam_steps(s.events), s.replay))
    page.show(replay, ["events"], slider)
    for button in picks:
        page.show(button, ["result"], lambda s: gr.Button(interactive=s.result is not None))
