"""Screen 4: the same seed through float and quantized, compared pixel by pixel and step by step."""

from __future__ import annotations

import gradio as gr

from workbench.options import TraceConfig
from workbench.ui import inputs, limits, tables, widget
from workbench.ui.actions import common
from workbench.ui.actions import compare as actions
from workbench.ui.bindings import Page
from workbench.ui.tabs import notice_line
from workbench.ui.views import compare as views


def build(page: Page) -> list:
    """Returns the inputs of the Generate button."""
    with gr.Row(equal_height=False, elem_id="compare-screen"):
        with gr.Column(scale=2, min_width=320):
            label = f"prompts, one per line, at most {limits.here().compared}"
            prompts = gr.Textbox(label=label, lines=4, max_lines=8, elem_id="compare-prompts", interactive=True)
            with gr.Row():
                seed = inputs.component(TraceConfig, "seed", elem_id="compare-seed")
                steps = inputs.component(TraceConfig, "steps", elem_id="compare-steps")
            with gr.Row(elem_classes=["tools"]):
                start = gr.Button("Generate", variant="primary", elem_id="compare", min_width=110, interactive=False)
                cancel = gr.Button("Cancel", elem_id="cancel-compare", min_width=90, interactive=False)
            notice_line(page, "compare")
        with gr.Column(scale=3, min_width=340):
            _pictures(page)
        numbers = gr.HTML(elem_id="compare-numbers")
    page.show(prompts, ["compare_form"], lambda s: "\n".join(s.compare_form[0]) if s.compare_form else gr.skip())
    page.show(seed, ["compare_form"], lambda s: s.compare_form[1] if s.compare_form else gr.skip())
    page.show(steps, ["bundle", "steps", "profile"], lambda s: s.compare_form[2] if s.comparison else _plan_steps(s))
    page.show(start, ["busy", "chosen", "profile"], lambda s: gr.Button(interactive=not actions.missing(s)))
    page.show(cancel, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "compare"))
    page.show(numbers, ["comparison", "drafts", "chosen"], _numbers)
    page.on(start.click, actions.compare, [prompts, seed, steps], tab="compare")
    page.on(cancel.click, common.stop, tab="compare")
    return [prompts, seed, steps]


def _numbers(session) -> str:
    if session.comparison is not None:
        return views.comparison_numbers(session.comparison, here=session.example is None)
    return tables.empty("Both models are drawing" if actions.drawing(session) else "Nothing has been compared",
                        "PSNR, SSIM and latent error with their intervals, bytes, seconds and the kernel appear here.")


def _plan_steps(session) -> int:
    """As many as the plans of the profile have; before there is one, as many as it will have."""
    return session.profile.sensitivity.steps if session.profile else session.steps


def _pictures(page: Page) -> None:
    viewer, grid = widget.viewer("viewer"), widget.picker("pair-grid")
    curve = widget.plot(elem_id="latent-curve", height=250, label="Latent error after each step; click a step to see it")
    now = ["comparison", "pair", "mode"]
    page.show(viewer, [*now, "gain", "at_step", "cell", "preview", "blind", "drafts", "chosen", "profile", "busy"], actions.shown)
    page.show(grid, [*now, "drafts", "chosen"], actions.cards)
    page.show(curve, [*now, "at_step", "cell", "blind"],
              lambda s: views.error_over_steps(s.comparison, actions.shown_pair(s), actions.marked_step(s)))
    page.on(viewer.look, actions.look, tab="compare", with_payload=True)
    page.on(grid.pick, actions.pick_pair, tab="compare", with_payload=True)
    page.on(curve.cell_click, actions.click_curve, tab="compare", with_payload=True)
