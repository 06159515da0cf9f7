"""Screen 5: take everything away, or bring a plan in."""

from __future__ import annotations

import gradio as gr

from workbench.ui import links, tables, widget
from workbench.ui.actions import export as actions
from workbench.ui.bindings import Page
from workbench.ui.tabs import notice_line
from workbench.ui.views import export as views
from workbench.ui.views import plans


def build(page: Page) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            write = gr.Button("Write checkpoint folder", variant="primary", elem_id="export", interactive=False)
            load = gr.UploadButton("Import a plan (JSON)", elem_id="plan-upload")  # any file: the action says what a wrong one is
            notice_line(page, "export")
            downloads = gr.HTML(elem_id="downloads")
            link = widget.picker("link")
        with gr.Column(scale=3, min_width=320):
            made = gr.HTML(elem_id="export-files")
    page.show(downloads, [*actions.MADE_OF, "written", "exported"], lambda s: views.downloads(actions.downloads(s), s.chosen is not None))
    page.show(
        write,
        ["busy", "chosen", "profile"],
        lambda s: gr.Button(interactive=bool(s.chosen and s.profile and not s.example) and not s.busy),
    )
    page.show(made, ["exported", "chosen"], _made)
    page.show(link, ["chosen", "prompts", "bundle"], lambda s: views.link(actions.link_code(s), links.fits(s.prompts)))
    page.on(write.click, actions.export, tab="export")
    page.on(load.upload, actions.import_plan, [load], tab="export")


def _made(session) -> str:
    """The checkpoint's files, and what its plan costs."""
    if session.exported:
        folder = session.exported[0]
        files = views.files(folder, sorted(p for p in folder.rglob("*") if p.is_file()))
    else:
        files = tables.empty("No checkpoint has been written yet", "It reopens to the same images and holds no pickle.")
    costs = session.profile and session.profile.costs
    plan = plans.plan_numbers(session.chosen, session.bundle, costs)
    return files + (plan or tables.empty("No plan is chosen", "Search for one, follow a link or import a file."))
