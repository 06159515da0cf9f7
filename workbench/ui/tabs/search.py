"""Screen 3: a budget, the search as it advances, the front it found, and the plan that was chosen."""

from __future__ import annotations

import gradio as gr

from workbench.options import Budget, SearchConfig
from workbench.ui import actions, forms, tables, views
from workbench.ui.live import Page
from workbench.ui.tabs import notice_line
from workbench.ui.widget import plot

LARGEST_MB = 1e6


def build(page: Page) -> None:
    low_bits, high_bits = forms.bounds(Budget, "max_mean_act_bits")
    with gr.Row():
        start = gr.Button("Search", variant="primary", elem_id="search", min_width=120, scale=0, interactive=False)
        stop = gr.Button("Stop", elem_id="stop-search", min_width=120, scale=0, interactive=False)
        memory = gr.Slider(0, LARGEST_MB, label="memory budget (MB, transformer)", step=0.01, elem_id="budget-mb", interactive=True)
        bits = gr.Slider(low_bits, high_bits, value=4.5, step=0.05, label="budget of mean activation bits", elem_id="budget-bits",
                         interactive=True)
    notice_line(page, "search")
    with gr.Accordion("Settings of the search", open=False), gr.Row():
        settings = list(forms.build(SearchConfig, *actions.SEARCH_FORM).values())
    line = gr.HTML(elem_id="search-line")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            pareto = plot(elem_id="pareto", height=380, label="Measured error against both budgets; click a plan to choose it")
            bit_map = plot(elem_id="bit-map", height=740, label="Bits of the chosen plan, layer by step")
        with gr.Column(scale=2, min_width=320):
            beam = plot(elem_id="beam", height=300, label="Candidates and survivors of the beam")
            replay = gr.Slider(1, 2, step=1, label="replay: step of the beam", elem_id="replay", visible=False, interactive=True)
            numbers = gr.HTML(elem_id="plan-numbers")
    _show(page, line, pareto, bit_map, numbers)
    _show_beam(page, beam, replay)
    page.show(memory, ["profile"], _memory_slider)  # not on "budget": a slider that is being dragged must not be set back
    page.show(bits, ["profile"], lambda s: gr.skip() if s.budget[1] is None else s.budget[1])
    page.show(start, ["busy", "profile", "result", "events"], _start_button)
    page.show(stop, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "search"))
    page.on(start.click, actions.search, [memory, bits, *settings], tab="search")
    page.on(stop.click, actions.stop, tab="search")
    for slider in (memory, bits):
        page.on(slider.input, actions.move_budget, [memory, bits], tab="search", trigger_mode="always_last")
    page.on(pareto.cell_click, actions.click_point, tab="search", with_payload=True)


def _start_button(session):
    stopped = session.result is None and bool(session.events) and not session.busy
    return gr.Button("Resume" if stopped else "Search", interactive=session.profile is not None and not session.busy)


def _memory_slider(session):
    if session.profile is None:
        return gr.Slider(interactive=False)
    low_mb, high_mb = actions.memory_range(session.profile.costs)
    return gr.Slider(minimum=round(0.8 * low_mb, 2), maximum=round(1.02 * high_mb, 2), value=session.budget[0], interactive=True)


def _beam_steps(session) -> list:
    """Plans measured in one go report themselves as candidates and survivors alike; steps of the beam do not."""
    return [event for event in session.events if event.candidates != event.survivors]


def _show_beam(page: Page, beam, replay) -> None:
    def shown(session):
        steps = _beam_steps(session)
        last = len(steps) if session.replay is None else min(max(1, int(session.replay)), len(steps))
        return views.beam(steps[last - 1] if steps else None)

    def slider(session):
        count = len(_beam_steps(session))
        return gr.Slider(1, max(2, count), value=count, visible=count > 1)

    page.show(beam, ["events", "replay"], shown)
    page.show(replay, ["events"], slider)
    page.on(replay.input, actions.replay, [replay], tab="search", trigger_mode="always_last")


def _show(page: Page, line, pareto, bit_map, numbers) -> None:
    def last(session):
        return session.events[-1] if session.events else None

    page.show(line, ["events", "result"], lambda s: tables.notice(views.search_line(last(s), s.result), "plain"))
    page.show(pareto, ["events", "result", "chosen", "budget"], lambda s: views.search_plot(s.events, s.result, s.chosen, *s.budget))
    page.show(bit_map, ["chosen"], lambda s: views.bit_map(s.chosen and s.chosen.plan, s.bundle and s.bundle.layers))
    page.show(numbers, ["chosen"], lambda s: views.plan_numbers(s.chosen, s.bundle, s.profile and s.profile.costs) if s.chosen else "")
