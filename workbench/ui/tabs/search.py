"""Screen 3: a budget, the search as it advances, the front it found, and the plan that was chosen or painted."""

from __future__ import annotations

import gradio as gr

from workbench.options import SearchConfig
from workbench.ui import budgets, inputs, tables, widget
from workbench.ui.actions import common
from workbench.ui.actions import search as actions
from workbench.ui.bindings import Page
from workbench.ui.tabs import notice_line, plan
from workbench.ui.views import search as views

FOUND = ("events", "result")


def build(page: Page) -> list:
    """Returns the inputs of the Search button."""
    start, stop, sliders = _tools()
    knee, floor, floor_db = _picks()
    notice_line(page, "search")
    with gr.Accordion("Settings of the search", open=False, elem_classes=["settings"]):
        settings = list(inputs.build(SearchConfig, *actions.SEARCH_INPUTS).values())
    line = gr.HTML(elem_id="search-line")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            front = widget.plot(elem_id="pareto", height=400, label="Measured error against every budget; click a plan to choose it")
        with gr.Column(scale=2, min_width=320):
            beam = widget.plot(elem_id="beam", height=318, label="The beam: candidates and survivors of a step; earlier survivors fade")
            scrub = "scrub through the search: step of the beam"
            replay = gr.Slider(1, 2, step=1, label=scrub, elem_id="replay", visible=False, interactive=True)
    plan.build(page)
    _show(page, line, front, (beam, replay), (knee, floor))
    _show_sliders(page, sliders)
    page.show(start, ["busy", "profile", *FOUND], _start_button)
    page.show(stop, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "search"))
    page.on(start.click, actions.search, [*sliders, *settings], tab="search")
    page.on(stop.click, common.stop, tab="search")
    page.on(knee.click, actions.pick_knee, tab="search")
    page.on(floor.click, actions.pick_floor, [floor_db], tab="search")
    page.show(floor_db, ["floor_db"], lambda s: gr.skip() if s.floor_db is None else s.floor_db)  # what was typed stays
    for slider in sliders:
        page.on(slider.input, actions.move_budget, sliders, tab="search", trigger_mode="always_last")
    page.on(front.cell_click, actions.click_point, tab="search", with_payload=True)
    page.on(replay.input, actions.replay, [replay], tab="search", trigger_mode="always_last")
    return [*sliders, *settings]


def _tools():
    with gr.Row(equal_height=True, elem_classes=["tools"]):
        start = gr.Button("Search", variant="primary", elem_id="search", min_width=110, scale=0, interactive=False)
        stop = gr.Button("Stop", elem_id="stop-search", min_width=90, scale=0, interactive=False)
        sliders = []
        for axis in budgets.AXES:
            unit = "" if axis.unit in axis.label else f" ({axis.unit})"
            sliders.append(
                gr.Slider(0, 1, step=axis.step, label=f"at most, {axis.label}{unit}", elem_id=f"budget-{axis.short.lower()}", min_width=200,
                          interactive=False, visible=axis.column is not None))
    return start, stop, sliders


def _picks():
    with gr.Row(equal_height=True, elem_classes=["tools"]):
        knee = gr.Button("Knee of the front", elem_id="knee", min_width=140, scale=0, interactive=False)
        floor = gr.Button("Smallest plan above the floor", elem_id="floor", min_width=230, scale=0, interactive=False)
        floor_db = gr.Number(value=30, label="quality floor (dB, latent signal to error)", elem_id="floor-db", scale=0, min_width=270)
    floor_db.preprocess = lambda value: value
    return knee, floor, floor_db


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
                minimum=max(0.0, round(low - edge, 2)),
                maximum=budgets.round_up(high + edge, axis.step),
                value=budgets.round_up(session.budget.get(axis.field, high), axis.step),
                interactive=True,
                visible=True,
            )

        return slider

    for axis, slider in zip(budgets.AXES, sliders):  # not on "budget": a slider that is being dragged must not be set back
        page.show(slider, ["profile", "sliders_moved"], draw(axis))


def _show(page: Page, line, front, beam_parts, selection) -> None:
    beam, replay = beam_parts

    def last(session):
        return session.events[-1] if session.events else None

    def draw(session):
        shown, whole = (views.points(session.found, session.events, step) for step in (session.replay, None))
        floor = None if session.floor_db is None else actions.floor_error(session.floor_db)
        rings = (views.place_of(session.chosen, session.found) or views.painted_place(session.chosen, session.edits, session.found),
                 views.place_of(session.pinned, session.found))
        nothing = {} if session.profile else {
            "nothing": "Profile the model first, on the Sensitivity screen: a search plans by its tables"}
        return views.front(shown, *rings, session.budget, floor, whole=whole if session.replay is not None else (), **nothing)

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
    page.show(front, [*FOUND, "chosen", "pinned", "budget", "floor_db", "replay", "profile"], draw)
    page.show(beam, ["events", "replay"], lambda s: views.beam(views.beam_steps(s.events), s.replay))
    page.show(replay, ["events"], slider)
    for button in selection:
        page.show(button, FOUND, lambda s: gr.Button(interactive=bool(s.found and s.found.front)))
