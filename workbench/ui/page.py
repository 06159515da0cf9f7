"""The page: title, status line, six screens. Built without torch; models are loaded by a job once the port is bound."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import gradio as gr

from workbench.jobs import Board
from workbench.ui import style, tables
from workbench.ui.live import Page
from workbench.ui.session import Store
from workbench.ui.tabs import compare, export, methods, model, search, sensitivity

TITLE = "AdaTSQ Workbench"
UPLOAD_LIMIT = "10mb"  # prompts and plans are far smaller


def build(store: Store) -> gr.Blocks:
    """All screens in one Blocks: a Blocks rendered into a tab would lose its listeners."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        page = Page(store)
        kept_id = gr.BrowserState("", storage_key="adatsq-session", secret=secrets.token_urlsafe(16))
        gr.Markdown(f"# {TITLE}\nSee where a diffusion transformer is fragile, spend bits there, prove it, take it away.", elem_id="title")
        status = gr.HTML(elem_id="status", padding=False)
        with gr.Tabs():
            with gr.Tab("Model", id="model", render_children=True):
                form = model.build(page)
            with gr.Tab("Sensitivity", id="sensitivity", render_children=True):
                sensitivity.build(page, form)
            with gr.Tab("Search", id="search", render_children=True):
                search.build(page)
            with gr.Tab("Compare", id="compare", render_children=True):
                compare.build(page)
            with gr.Tab("Methods", id="methods", render_children=True):
                methods.build(page)
            with gr.Tab("Export", id="export", render_children=True):
                export.build(page)
        page.show(status, ["job", "bundle", "source"], lambda s: tables.status(_model_line(s), s.snapshot()))
        page.show(page.timer, ["busy"], lambda s: gr.Timer(active=s.busy))
        page.bind(demo, kept_id)
    return demo


def _model_line(session) -> str:
    if session.bundle is not None:
        return f"{session.bundle.name} ready"
    failed = session.job is not None and not session.job.active and session.job.kind == "load"
    return f"{session.source} could not be loaded" if failed else f"{session.source} is loading"


def launch(host: str, port: int, when_built: Callable[[], None] = lambda: None) -> None:
    """Serve until interrupted; `when_built` is called just before the port is taken. The embedded model is loaded after that."""
    store = Store(Board())
    demo = build(store)
    when_built()
    demo.queue(default_concurrency_limit=None, api_open=False)
    demo.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, show_error=True,
                max_file_size=UPLOAD_LIMIT, theme=style.theme(), css=style.CSS, footer_links=[], run_history=False)
    print(f"{TITLE}: http://{host}:{port}", flush=True)
    store.start_preload()
    demo.block_thread()
