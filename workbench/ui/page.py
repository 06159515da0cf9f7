"""The page: title, status line, guided visit, six screens. Built without torch; models are loaded by a job once the port is bound."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

import gradio as gr

from workbench.jobs import Board
from workbench.options import PIPELINES_OWN, Budget
from workbench.ui import budgets, endpoints, limits, style, tables, tour, widget
from workbench.ui.actions import export as export_actions
from workbench.ui.actions.common import look_closer
from workbench.ui.bindings import Page, Screens
from workbench.ui.session import TICK_S, Store
from workbench.ui.tabs import compare, export, methods, model, search, sensitivity

TITLE = "AdaTSQ Workbench"
OWN = "Press 1 above, or Profile on the Sensitivity screen, for your own to search, draw and export."


def build(store: Store) -> gr.Blocks:
    """All screens in one Blocks: a Blocks rendered into a tab would lose its listeners."""
    gr.set_static_paths([store.downloads.name])
    with Screens(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 6 * 3600)) as demo:
        page = Page(store)
        kept_id = gr.BrowserState("", storage_key="adatsq-session", secret=secrets.token_urlsafe(16))
        status = gr.HTML(elem_id="status", padding=False)
        tour_picker = widget.picker("tour")
        about = gr.HTML(tour.glossary(), elem_id="about", padding=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Model", id="model", render_children=True):
                tab_inputs = model.build(page)
            with gr.Tab("Sensitivity", id="sensitivity", render_children=True):
                sensitivity.build(page, tab_inputs)
            with gr.Tab("Search", id="search", render_children=True):
                search.build(page)
            with gr.Tab("Compare", id="compare", render_children=True):
                compare.build(page)
            with gr.Tab("Export", id="export", render_children=True) as exported:
                export.build(page)
            with gr.Tab("Methods", id="methods", render_children=True):  # last: a phone keeps it behind the menu of the tabs
                methods.build(page)
        page.show(status, ["job", "bundle", "source"], lambda s: tables.status(TITLE, _model_line(s), s.snapshot()))
        page.show(tour_picker, ["busy", "bundle", "profile", "example", "result", "comparison", "exported", "notice-tour"], tour.view)
        page.show(about, ["example"], lambda s: (tables.notice(f"{s.example} {OWN}", "example") if s.example else "") + tour.glossary())
        page.show(tabs, ["screen"], lambda s: gr.Tabs(selected=s.screen) if s.screen else gr.skip())
        page.show(page.timer, ["pace"], lambda s: gr.Timer(s.pace_s or TICK_S, active=s.pace_s is not None))
        page.on(tour_picker.pick, tour.follow, tab="tour", with_payload=True)
        page.on(exported.select, export_actions.write_files, tab="export")
        page.on_open = export_actions.follow_link
        store.on_adopt, store.on_ended = _adopted, look_closer
        page.bind(demo, kept_id)
        endpoints.add(store)
    return demo


def _adopted(session) -> None:
    """A model has been loaded: show its example run if there is one, and apply the link that waited for it."""
    from workbench import examples

    bundle = session.bundle
    shipped = bundle.source == bundle.name and bundle.generation == PIPELINES_OWN
    found = examples.load(bundle.name, bundle.model_hash) if shipped else None
    if found is not None:
        show_example(session, found)
    export_actions.restore(session)


def show_example(session, found) -> None:
    """Fill every screen with a run that was made elsewhere, and say so."""
    smap, chosen, pairs = found.sensitivity, found.result.chosen, found.comparison.pairs
    kept = Budget(max_weight_bytes=chosen.plan.weight_bytes, max_mean_act_bits=chosen.plan.act_bits_mean)
    stderr_TL = None if smap.stderr_TL is None else smap.stderr_TL.tolist()
    session.set(profile=found, example=found.made, fisher_TL=tuple(smap.fisher_TL.tolist()), stderr_TL=stderr_TL,
                cell=smap.most_fragile, layer_inspection=found.layer_inspection, budget=budgets.start(found, kept), result=found.result,
                events=found.result.events, chosen=chosen, comparison=found.comparison,
                comparisons={chosen.plan.plan_id: found.comparison},
                compare_form=(tuple(pair.prompt for pair in pairs), pairs[0].seed, len(chosen.plan.sigma_T)))


def _model_line(session) -> str:
    if session.bundle is not None:
        return f"{session.bundle.name} ready"
    failed = session.job is not None and not session.job.active and session.job.kind == "load"
    return f"{session.source} could not be loaded" if failed else f"{session.source} is loading"


def launch(host: str, port: int, when_built: Callable[[], None] = lambda: None) -> None:
    """Serve until interrupted; `when_built` is called just before the port is taken. The embedded model is loaded after that."""
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**9))  # Gradio sums up all past events after each of them
    store = Store(Board())
    demo = build(store)
    when_built()
    demo.queue(default_concurrency_limit=None, api_open=False)
    demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        show_error=True,
        max_file_size=f"{limits.here().upload_mb}mb",
        theme=style.theme(),
        css=style.css(),
        head=widget.early(limits.here().upload_mb),
        footer_links=[],
        run_history=False,
    )
    print(f"{TITLE}: http://{host}:{port}", flush=True)
    store.start_preload()
    demo.block_thread()
