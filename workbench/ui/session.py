"""What one visitor has loaded, profiled, found and made. Pages keep only the session's id; the objects live here.

A session is a set of named values. Setting one raises its revision, and every part of the page that depends on the name
is drawn again (see `bindings.py`); jobs set values from their worker thread, the page finds out at its next tick.
"""

from __future__ import annotations

import contextvars
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workbench import tuning
from workbench.jobs import SHARED, Board, Job
from workbench.options import BadInput, ModelSpec, Progress, TraceConfig, first_line
from workbench.ui import limits
from workbench.zerogpu import stages

log = logging.getLogger("workbench.ui")
KEPT_SESSIONS, KEPT_PROFILES = 256, 8  # a profile holds its trace and every solved weight; a session without one is small
KEPT_COMPARISONS, KEPT_MEASURED = 8, 256  # of one session: a comparison holds images and latents, a measured plan a few numbers
SHOWN_PROMPTS = 16  # of the model's calibration prompts; the box can be edited
EMBEDDED = ModelSpec().source
RESUMED = ("profile", "search", "contest")  # jobs that go on from the run folder where they were stopped
# How often a page asks: for an answer that comes at once, while its job runs (each time takes from the job itself), while it waits in line
TICK_S, RUNNING_S, WAITING_S = 0.25, 0.5, 1.0


@dataclass(frozen=True)
class Drafted:
    """A plan from a file, a link or a visitor's hand: nothing about it has been measured here."""

    plan: Any
    error: float | None = None
    samples: int = 0
    held_out: bool = False
    origin: str = "imported"


NONE_YET: Mapping = MappingProxyType({})
# Where every session starts, so none of these values can be changed in place.
# What depends on the shown comparison is forgotten with another one, what depends on the profile with a new profile, and what depends on
# the model when another one is loaded.
OF_COMPARISON = MappingProxyType({"pair": 0, "at_step": None, "preview": None, "previews": NONE_YET, "blind": None})
OF_PROFILE = MappingProxyType({
    "events": (), "replay": None, "so_far": None, "result": None, "chosen": None, "pinned": None, "edits": (), "comparison": None,
    "comparisons": NONE_YET, "measured": NONE_YET, "drafts": None, "exported": None, "exports": NONE_YET, **OF_COMPARISON,
    "layer_inspection": None, "floor_db": None, "sliders_moved": None, "written": None})
OF_MODEL = MappingProxyType({"profile": None, "example": None, "fisher_TL": (), "stderr_TL": None, "cell": (None, None), **OF_PROFILE})
LIGHT_THREADS = 2


class Session:
    """One visitor's state. Read attributes freely; write through `set`.

    fisher_TL holds a row per step, None while a step is unknown; cell is the selected (layer index, step), budget the limits by field of
    `Budget`, in the units of the sliders. so_far: what a search that has not ended has found. drafts: small pictures of what a running
    comparison has finished, by stage, None when none runs. previews: addresses of both images of every decoded (pair, step); preview: the
    one that was shown last. measured: plans made by hand or brought in that were really run, by id. example names where a shown example
    run was made, None for one's own."""

    def __init__(self, board: Board, store: Store):
        self.id = secrets.token_urlsafe(24)
        self.rev: Counter[str] = Counter()
        self.lock = threading.RLock()  # a page is never drawn from half of a change
        self.board, self.store = board, store
        self.job: Job | None = None
        self.source, self.bundle = EMBEDDED, None
        self.notices: dict[str, tuple[str, str]] = {}
        self.how, self.quantity, self.map_bits = "mean", "fisher", 4
        self.mode, self.gain, self.brush, self.prompts = "slider", 8.0, None, ()
        self.steps, self.seed = TraceConfig().steps, TraceConfig().seed
        self.compare_form: tuple[tuple[str, ...], int, int] | None = None  # prompts, seed, steps
        self.budget: dict[str, float] = {}
        self.model_info, self.screen = None, None
        self.followed = ""  # the link that has been followed
        self.restoring = None  # what a link asks for and the model is still loaded for
        self.pending, self.seen_s = 0, time.monotonic()
        self.quantized: tuple[str, Any] | None = None
        self.measuring = ""  # id of the plan that a measurement was last started for
        self._drawn: tuple[str, int, bool] = ("", -1, False)
        self._events_read, self._place, self._pace = 0, 0, None
        for name, value in OF_MODEL.items():
            setattr(self, name, value)

    @property
    def pace_s(self) -> float | None:
        """After how many seconds the page should ask again; None when nothing will change by itself."""
        if self.pending > 0:
            return TICK_S
        if not self.busy:
            return None
        return WAITING_S if self.job.state == "queued" else RUNNING_S

    def soon(self, what: str, work: Callable[[], None]) -> None:
        """Do something short off the request, beside whatever heavy job is running."""
        def run():
            try:
                with tuning.single_threaded():
                    work()
            except BaseException as error:  # what is not caught here is never heard of
                log.exception("%s failed", what)
                self.notify(what, f"{type(error).__name__}: {first_line(error)}")
            finally:
                with self.lock:
                    self.pending -= 1

        with self.lock:
            self.pending += 1
        self.store.light.submit(contextvars.copy_context().run, run)

    def set(self, **values) -> None:
        with self.lock:
            for name, value in values.items():
                setattr(self, name, value)
                self.rev[name] += 1

    def put(self, name: str, key, value, most: int | None = None) -> None:
        """Add to a named mapping, as the newest of it; beyond `most` the oldest go."""
        with self.lock:
            entries = {each: kept for each, kept in getattr(self, name).items() if each != key} | {key: value}
            surplus = 0 if most is None else max(0, len(entries) - most)
            self.set(**{name: dict(islice(entries.items(), surplus, None))})

    def notify(self, tab: str, text: str = "", kind: str = "error") -> None:
        """The one line under a screen's buttons; empty takes it away."""
        with self.lock:
            if self.notices.get(tab, ("", "")) != (text, kind if text else ""):
                self.notices[tab] = (text, kind if text else "")
                self.rev[f"notice-{tab}"] += 1

    @property
    def found(self):
        """What can be chosen from: the front and references of the finished search, or of the running one so far; None before."""
        return self.result or self.so_far

    @property
    def busy(self) -> bool:
        return self.job is not None and self.job.active

    @property
    def folder(self) -> Path:
        """Where this session's runs are kept; the id itself is a secret and stays out of file names."""
        root = Path(os.environ.get("ADATSQ_RUNS", "runs"))
        return root / "app" / hashlib.sha256(self.id.encode()).hexdigest()[:16]

    @property
    def downloads(self) -> Path:
        """Where files are made for the browser to fetch."""
        path = Path(self.store.downloads.name) / self.folder.name
        path.mkdir(exist_ok=True)
        return path

    def forget(self, *, exports_too: bool = False) -> None:
        """Nobody can come back to this session: drop what it kept on disk; checkpoints that were exported only if told so."""
        if exports_too:
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.folder.glob("*"):
            if path.is_file():
                path.unlink(missing_ok=True)
        shutil.rmtree(self.downloads, ignore_errors=True)

    def require_idle(self) -> None:
        if self.busy:
            raise BadInput(f"{self.job.kind} is still running; wait for it or cancel it")

    def kept(self, *names: str) -> dict[str, Any]:
        """Values to put back if what is about to start does not finish."""
        return {name: getattr(self, name) for name in names}

    def submit(self, kind: str, tab: str, work, undo: dict[str, Any] | None = None) -> None:
        """Start a job; how it ends is said on `tab`, and `undo` is put back unless it ends well."""
        self.require_idle()

        def finish(state: str, error: str) -> None:
            if state != "done":
                self.set(**(undo or {}))
                kept = "; what was finished is kept, and starting again goes on from there" if kind in RESUMED else ""
                kept += f". The {kind} before it is shown again" if undo and kind in RESUMED else ""
                self.notify(tab, error or f"{kind} was stopped{kept}", "error" if error else "info")
            try:
                self.store.on_ended(self)
            except BaseException as fault:
                self.notify(tab, error or f"after {kind}: {type(fault).__name__}: {first_line(fault)}")
                raise  # the job records it as its failure

        with self.lock:
            self._events_read = 0
            self.set(job=self.board.submit(kind, self.id, work, finish))

    def cancel(self) -> None:
        if self.busy and self.job.owner != SHARED:
            self.board.cancel(self.job)

    def adopt(self, bundle) -> None:
        """A model has been loaded, or set to generate something else: start afresh with it. Prompts typed while the first one was loading,
        or for the same model, are kept."""
        typed = self.prompts if self.bundle is None or self.bundle.model_hash == bundle.model_hash else ()
        self.set(source=bundle.source, quantized=None, prompts=typed or bundle.prompts("calibration")[:SHOWN_PROMPTS],
                 compare_form=(bundle.prompts("showcase")[:4], self.seed, self.steps), bundle=bundle, **OF_MODEL)
        try:
            self.store.on_adopt(self)
        except Exception as fault:  # the model is there, whatever cannot be shown of it
            log.exception("adopting %s", bundle.source)
            self.notify("model", f"{bundle.source} is loaded, but its example cannot be shown: {type(fault).__name__}: {first_line(fault)}")

    def snapshot(self):
        return self.board.snapshot(self.job) if self.job is not None else None

    def sync(self) -> None:
        """Take over what the job has reported since the last look."""
        with self.lock:
            self._sync()

    def _sync(self) -> None:
        pace = self.pace_s
        if pace != self._pace:
            self._pace = pace
            self.rev["pace"] += 1
        if self.job is None:
            return
        if self.bundle is None and self.job is self.store.preload and not self.job.active:
            if self.job.error:
                self.notify("model", self.job.error)
            else:
                self.adopt(self.job.result)
        state = self.job.snapshot()
        seen = (self.job.id, state.version, self.busy)
        if seen != self._drawn:
            self.rev["busy"] += seen[2] != self._drawn[2]
            self.rev["job"] += 1
            self._drawn = seen
            self._take_events()
        elif state.state == "queued" and self._place != self.snapshot().ahead:
            self.rev["job"] += 1
        self._place = self.snapshot().ahead

    def _take_events(self) -> None:
        news = self.job.events[self._events_read:]
        self._events_read += len(news)
        for stage, detail in news:
            if stage == "sensitivity" and isinstance(detail, dict) and "fisher_L" in detail:
                step = detail["step"]
                rows = self.fisher_TL
                if step < len(rows) and self.profile is None:
                    self.set(fisher_TL=(*rows[:step], list(detail["fisher_L"]), *rows[step + 1:]))
            elif hasattr(detail, "thumbnails") and self.drafts is not None:
                self.set(drafts=self.drafts | {stage: (*self.drafts.get(stage, ())[:detail.first], *detail.thumbnails)})
            elif stage == "search" and hasattr(detail, "survivors") and self.result is None:
                self._take_search(detail)

    def _take_search(self, event) -> None:
        from workbench.search.recorder import extended  # brings torch

        self.set(events=(*self.events, event), replay=None)
        if event.plans:
            self.set(so_far=extended(self.so_far, event.plans))


class Store:
    """All sessions of the process; the least recently used are forgotten beyond a limit."""

    def __init__(self, board: Board):
        self.board = board
        self.downloads = tempfile.TemporaryDirectory(prefix="adatsq-")  # removed when the process ends
        self.preload: Job | None = None
        self.light = ThreadPoolExecutor(LIGHT_THREADS, thread_name_prefix="light")
        self.on_adopt: Callable[[Session], None] = lambda session: None  # what to show of a model nobody has profiled yet
        self.on_ended: Callable[[Session], None] = lambda session: None  # a job of the session has ended, and the model is free
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def start_preload(self) -> None:
        """Load the embedded model before anybody asks for it."""
        def work(on_progress):
            on_progress(Progress(stage="importing torch", done=0, total=0))
            return stages().load(EMBEDDED, on_progress=on_progress)

        self.preload = self.board.submit("load", SHARED, work)

    def open(self, session_id: str) -> Session:
        """The session of that id, or a new one under a new id: ids are never chosen by a browser."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                session = Session(self.board, self)
                session.job = self.preload
                self._sessions[session.id] = session
            self._sessions.move_to_end(session.id)
            session.seen_s = time.monotonic()
            self._forget_oldest()
        return session

    def find(self, session_id: str) -> Session | None:
        """The session of that id, if it is still there."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is not None:
                self._sessions.move_to_end(session.id)
                session.seen_s = time.monotonic()
        return session

    def _forget_oldest(self) -> None:
        newest_first = list(reversed(self._sessions.values()))
        profiled = [session for session in newest_first if session.profile is not None and session.example is None]
        limit = limits.here()
        ended = [s for s in newest_first if time.monotonic() - s.seen_s > 60 * limit.idle_minutes]
        for session in {*newest_first[KEPT_SESSIONS:], *profiled[KEPT_PROFILES:], *ended}:
            if not session.busy:
                del self._sessions[session.id]
                session.forget(exports_too=not limit.keeps_exports)
