"""Screen 1: which model, which prompts, how many steps."""

from __future__ import annotations

import gradio as gr

from workbench.options import TraceConfig
from workbench.ui import actions, forms, tables, views
from workbench.ui.live import Page
from workbench.ui.session import EMBEDDED
from workbench.ui.tabs import Form, notice_line


def build(page: Page) -> Form:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            source = gr.Dropdown([EMBEDDED], value=EMBEDDED, allow_custom_value=True, label="model", elem_id="source",
                                 info="embedded model, folder of a diffusers pipeline (safetensors), or hub id")
            load = gr.Button("Load model", elem_id="load")
            notice_line(page, "model")
            with gr.Row():
                form = Form(TraceConfig, forms.build(TraceConfig, "steps", "seed"))
            prompts = gr.Textbox(label="calibration prompts, one per line", lines=10, max_lines=16, elem_id="prompts", interactive=True)
            upload = gr.UploadButton("Upload prompts", file_types=["text", ".json", ".csv"], size="sm", elem_id="upload-prompts")
        with gr.Column(scale=3, min_width=320):
            summary, protected = gr.HTML(elem_id="summary"), gr.HTML()
    page.show(summary, ["bundle", "busy"], lambda s: views.model_summary(s.bundle) if s.bundle
              else tables.notice("loading the model" if s.busy else "", "info"))
    page.show(protected, ["bundle"], lambda s: views.protected(s.bundle) if s.bundle else "")
    page.show(prompts, ["prompts_text"], lambda s: s.prompts_text)
    page.show(form.components["steps"], ["steps"], lambda s: s.steps)
    page.show(form.components["seed"], ["seed"], lambda s: s.seed)
    page.show(source, ["source"], lambda s: s.source)
    page.show(load, ["busy"], lambda s: gr.Button(interactive=not s.busy))
    page.on(load.click, actions.load_model, [source], tab="model")
    page.on(upload.upload, actions.upload_prompts, [upload], tab="model")
    page.on(prompts.blur, actions.keep_prompts, [prompts], tab="model")
    form.components["prompts"] = prompts
    return form
