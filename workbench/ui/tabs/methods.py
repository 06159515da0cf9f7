"""Methods: the paper's table for this model, on one plot with the search's front, and the images side by side."""

from __future__ import annotations

import gradio as gr

from workbench.options import ContestConfig, TraceConfig
from workbench.ui import contest_actions as actions
from workbench.ui import contest_views as views
from workbench.ui import inputs
from workbench.ui.bindings import Page
from workbench.ui.tabs import notice_line
from workbench.ui.widget import plot


def build(page: Page) -> None:
    chosen = gr.CheckboxGroup(actions.names(), value=actions.default_names(), label="methods", elem_id="methods-chosen", interactive=True)
    prompts = gr.Textbox(label=f"prompts, one per line, at most {actions.most_prompts()}", lines=4, max_lines=8,
                         elem_id="methods-prompts", interactive=True)
    with gr.Row():
        seed = inputs.component(TraceConfig, "seed", elem_id="methods-seed")
        steps = inputs.component(TraceConfig, "steps", elem_id="methods-steps")
        contest_config = [inputs.component(ContestConfig, name, elem_id=f"methods-{name}") for name in actions.CONTEST_INPUTS]
    with gr.Row(elem_classes=["tools"]):
        start = gr.Button("Compare methods", variant="primary", elem_id="methods-run", min_width=160, interactive=False)
        skip = gr.Button("Skip this method", elem_id="methods-skip", min_width=160, interactive=False)
        cancel = gr.Button("Cancel", elem_id="methods-cancel", min_width=90, interactive=False)
        files = [gr.DownloadButton(f"Table as {label}", elem_id=f"methods-{kind}", interactive=False, min_width=160)
                 for kind, label in (("csv", "CSV"), ("md", "Markdown"))]
    notice_line(page, actions.TAB)
    figure = plot(elem_id="methods-plot", height=360, label="Latent error against memory; diamonds: AdaTSQ, dots: the search's front")
    table = gr.HTML(elem_id="methods-table")
    grid = gr.Image(format="png", label="rows: methods, float first; columns: prompts", interactive=False, visible=False,
                    elem_id="methods-grid", elem_classes=["pixels"], buttons=["download", "fullscreen"])
    page.show(prompts, ["bundle"], lambda s: "\n".join(s.bundle.prompts("held_out")[:4]) if s.bundle else gr.skip())
    page.show(start, ["busy", "bundle"], lambda s: gr.Button(interactive=s.bundle is not None and not s.busy))
    for button in (skip, cancel):
        page.show(button, ["busy"], lambda s: gr.Button(interactive=bool(s.busy and s.job.kind == "contest")))
    now = ["contest", "bundle"]
    page.show(table, [*now, "busy"], lambda s: views.table(actions.current(s)[0], bool(s.busy and s.job.kind == "contest"))
              + views.pairs(actions.current(s)[0]))
    page.show(figure, [*now, "result"], lambda s: views.quality_cost(actions.current(s)[0], s.result.front if s.result else ()))
    page.show(grid, now, lambda s: gr.Image(value=actions.current(s)[1], visible=actions.current(s)[1] is not None))
    for kind, button in zip(("csv", "md"), files):
        page.show(button, now, lambda s, kind=kind: gr.DownloadButton(value=actions.table_file(s, kind),
                                                                      interactive=actions.current(s)[0] is not None))
    page.on(start.click, actions.run, [chosen, prompts, seed, steps, *contest_config], tab=actions.TAB)
    page.on(skip.click, actions.skip, tab=actions.TAB)
    page.on(cancel.click, actions.stop, tab=actions.TAB)
