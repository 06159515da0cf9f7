"""Screen 1: which model, which prompts, how many steps."""

from __future__ import annotations

import gradio as gr

from workbench.options import GenerationConfig, TraceConfig
from workbench.ui import inputs, tables, widget
from workbench.ui.actions import model as actions
from workbench.ui.bindings import Page
from workbench.ui.session import EMBEDDED, Session
from workbench.ui.tabs import TabInputs, notice_line
from workbench.ui.views import model as views


def build(page: Page) -> TabInputs:
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            cards = widget.picker("models")
            summary = gr.HTML(elem_id="summary")
        with gr.Column(scale=4, min_width=300):
            info = "embedded name, folder of a diffusers pipeline (safetensors), or hub id"
            source = gr.Textbox(value=EMBEDDED, label="or another model", elem_id="source", max_lines=1, interactive=True, info=info)
            load = gr.Button("Load model", elem_id="load")
            notice_line(page, "model")
            tab_inputs = TabInputs(TraceConfig, inputs.build(TraceConfig, "steps", "seed"))
            with gr.Accordion("What is generated: size, guidance, text length", open=False, elem_id="generation", elem_classes="settings"):
                generation = inputs.build(GenerationConfig, *actions.GENERATION_INPUTS)
                generate_as = gr.Button("Use these", size="sm", elem_id="generate-as")
            model_info = gr.HTML(elem_id="model-info")
        with gr.Column(scale=6, min_width=320):
            prompts = _prompt_table()
            upload = gr.UploadButton("Upload prompts: .txt, .csv or .json", size="sm", elem_id="upload-prompts")
            default = gr.Button("Back to the model's own set", size="sm", elem_id="default-prompts")
    _show(page, cards, model_info, summary)
    page.show(prompts, ["prompts"], lambda s: [[text] for text in s.prompts] or [[""]])
    page.show(tab_inputs.components["steps"], ["steps"], lambda s: s.steps)
    page.show(tab_inputs.components["seed"], ["seed"], lambda s: s.seed)
    page.show(source, ["source"], lambda s: s.source)
    for name, component in generation.items():
        page.show(component, ["bundle"], lambda s, name=name: _generation_input(s, name))
    page.show(generate_as, ["busy", "bundle"], lambda s: gr.Button(interactive=not s.busy and s.bundle is not None))
    page.on(generate_as.click, actions.generate_as, list(generation.values()), tab="model")
    page.show(load, ["busy"], lambda s: gr.Button(interactive=not s.busy))
    page.on(cards.pick, actions.pick_model, tab="model", with_payload=True)
    page.on(load.click, actions.load_model, [source], tab="model")
    page.on(source.submit, actions.load_model, [source], tab="model")
    page.on(source.blur, actions.look_at_model, [source], tab="model")
    page.on(upload.upload, actions.upload_prompts, [upload], tab="model")
    page.on(default.click, actions.default_prompts, tab="model")
    page.on(prompts.input, actions.keep_prompts, [prompts], tab="model")
    tab_inputs.components["prompts"] = prompts
    return tab_inputs


def _generation_input(session: Session, name: str) -> dict:
    """What a component of it shows: nothing where the model has no such setting."""
    if session.bundle is None:
        return gr.update(visible=False)
    return gr.update(value=getattr(session.bundle.generation, name), visible=name in session.bundle.takes)


def _prompt_table() -> gr.Dataframe:
    return gr.Dataframe(
        headers=["prompt"],
        datatype="str",
        type="array",
        column_count=(1, "fixed"),
        row_count=1,
        interactive=True,
        label="calibration prompts: double click edits, the menu of a row adds and deletes",
        elem_id="prompts",
        max_height=430,
        show_row_numbers=True,
        wrap=True,
    )


def _show(page: Page, cards, model_info, summary) -> None:
    page.show(cards, ["bundle", "source"], lambda s: views.model_cards(s.bundle.source if s.bundle else ""))
    page.show(
        model_info,
        ["model_info", "bundle"],
        lambda s: views.model_info_numbers(s.model_info) if s.model_info and not (s.bundle and s.bundle.source == s.model_info.source)
        else views.protected(s.bundle) if s.bundle else "",
    )
    page.show(
        summary,
        ["bundle", "busy"],
        lambda s: (
            views.model_summary(s.bundle)
            if s.bundle
            else tables.empty("The model is loading" if s.busy else "No model is loaded", "Its layers and sizes appear here.")
        ),
    )
