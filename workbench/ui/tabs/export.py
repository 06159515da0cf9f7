"""Screen 5: take the plan and the quantized checkpoint away, or bring a plan in."""

from __future__ import annotations

import gradio as gr

from workbench.ui import actions, tables, views
from workbench.ui.live import Page
from workbench.ui.tabs import notice_line


def build(page: Page) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            plan = gr.DownloadButton("Download plan (JSON)", elem_id="plan-download", interactive=False)
            write = gr.Button("Write checkpoint folder", variant="primary", elem_id="export", interactive=False)
            archive = gr.DownloadButton("Download checkpoint (zip)", elem_id="zip-download", interactive=False)
            load = gr.UploadButton("Import a plan (JSON)", file_types=[".json"], elem_id="plan-upload")
            notice_line(page, "export")
        with gr.Column(scale=3, min_width=320):
            where, numbers = gr.HTML(elem_id="export-files"), gr.HTML(elem_id="export-plan")
    page.show(plan, ["chosen"], lambda s: gr.DownloadButton(value=actions.plan_file(s), interactive=s.chosen is not None))
    page.show(write, ["busy", "chosen", "profile"], lambda s: gr.Button(interactive=bool(s.chosen and s.profile) and not s.busy))
    page.show(archive, ["exported"], lambda s: gr.DownloadButton(value=str(s.exported[1]) if s.exported else None,
                                                                 interactive=s.exported is not None))
    page.show(where, ["exported"], lambda s: views.files(s.exported[0], sorted(p for p in s.exported[0].rglob("*") if p.is_file()))
              if s.exported else tables.notice("No checkpoint has been written yet", "info"))
    page.show(numbers, ["chosen"], lambda s: views.plan_numbers(s.chosen, s.bundle, s.profile and s.profile.costs) if s.chosen else "")
    page.on(write.click, actions.export, tab="export")
    page.on(load.upload, actions.import_plan, [load], tab="export")
