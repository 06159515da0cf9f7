"""Heavy work off the request: a job runs in one worker thread, reports progress, can be cancelled and found again by id.

A stage only knows the `on_progress` callback it was given; cancelling makes that callback raise `Cancelled`, so a stage
stops at its next report. One job runs at a time, the others wait in line and know their place; whoever has used the machine
for n seconds lets those pass who come up to n seconds later.
"""

from __future__ import annotations

import bisect
import contextvars
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.options import BadInput, Cancelled, OnProgress, Progress, first_line

log = logging.getLogger("workbench.jobs")
FINISHED = ("done", "cancelled", "failed")
OnFinish = Callable[[str, str], None]
USE_REMEMBERED_S = 600.0  # how long what somebody has used counts
SHARED = ""  # owner of a job that every session may see


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a job is doing now. `eta_s` is for the present stage; `version` grows with every change."""

    id: str
    kind: str
    state: str  # queued, running, done, cancelled, failed
    ahead: int  # jobs that come first
    stage: str
    done: int
    total: int
    message: str
    seconds: float
    eta_s: float | None
    error: str
    version: int

    @property
    def active(self) -> bool:
        return self.state not in FINISHED


class Job:
    """One piece of heavy work. `events` holds (stage, detail) of every report that carried a detail."""

    def __init__(self, kind: str, owner: str, work: Callable[[OnProgress], Any], on_finish: OnFinish | None):
        self.id = secrets.token_urlsafe(12)
        self.kind, self.owner = kind, owner
        self.state, self.error, self.result = "queued", "", None
        self.events: list[tuple[str, Any]] = []
        self._work, self._on_finish = work, on_finish
        self._context = contextvars.copy_context()  # of the request: a ZeroGPU Space charges the visitor it finds there
        self._cancel = threading.Event()
        self._finished = threading.Event()
        self._last = Progress(stage="", done=0, total=0)
        self._started_s = self._stage_started_s = self._ended_s = 0.0
        self._version = 0
        self._lock = threading.Lock()  # state, report and version change together: a page that has seen a version has seen what it counts
        self.turn_s = 0.0  # jobs wait in the order of this; set by the board

    @property
    def active(self) -> bool:
        return self.state not in FINISHED

    def cancel(self) -> None:
        """Ask the job to stop; a running stage stops at its next report."""
        self._cancel.set()
        with self._lock:
            self._version += 1

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._finished.wait(timeout_s)

    def report(self, progress: Progress) -> None:
        """The callback that stages call."""
        if self._cancel.is_set():
            raise Cancelled(f"{self.kind} was cancelled")
        with self._lock:
            if progress.stage != self._last.stage:
                self._stage_started_s = time.monotonic()
            self._last = progress
            if progress.detail is not None:
                self.events.append((progress.stage, progress.detail))
            self._version += 1

    def run(self) -> None:
        """Do the work in the calling thread; every ending is recorded, none escapes: not that of the work, even where it asks the
        process to exit, and not that of `on_finish`."""
        if self._cancel.is_set():
            return self._end("cancelled")
        with self._lock:
            self._started_s = self._stage_started_s = time.monotonic()
            self.state, self._version = "running", self._version + 1
        try:
            self.result = self._context.run(self._work, self.report)
        except Cancelled:
            self._end("cancelled")
        except BadInput as error:
            self._end("failed", first_line(error))
        except BaseException as error:
            self._end("failed", self._fault(error, "failed"))
        else:
            self._end("done")

    def _fault(self, error: BaseException, when: str) -> str:
        log.error("job %s %s", self.kind, when, exc_info=error)
        return f"{self.kind} {when}: {type(error).__name__}: {first_line(error)}"

    def _end(self, state: str, error: str = "") -> None:
        self._ended_s = time.monotonic()
        try:
            if self._on_finish is not None:
                self._on_finish(state, error)
        except BaseException as fault:
            line = self._fault(fault, "failed after its work had ended")
            state, error = "failed", error or line
        with self._lock:
            self.state, self.error = state, error
            self._version += 1
        self._work = self._on_finish = self._context = None  # what they captured may be large
        self._finished.set()

    def snapshot(self, ahead: int = 0) -> Snapshot:
        with self._lock:
            last, now = self._last, self._ended_s or time.monotonic()
            eta_s = None
            if self.state == "running" and 0 < last.done <= last.total:
                eta_s = (now - self._stage_started_s) / last.done * (last.total - last.done)
            message = "stopping" if self._cancel.is_set() and self.active else last.message
            return Snapshot(id=self.id, kind=self.kind, state=self.state, ahead=ahead, stage=last.stage, done=last.done,
                            total=last.total, message=message, seconds=now - self._started_s if self._started_s else 0.0,
                            eta_s=eta_s, error=self.error, version=self._version)


class Board:
    """All jobs of the process: one worker takes them, one at a time, in the order of their turns.

    A job's turn is when it came plus the seconds that its owner has used the machine lately. It is fixed when the job comes, so
    nobody waits for ever: who comes later than that is behind, however little they have used."""

    def __init__(self):
        self._jobs: weakref.WeakValueDictionary[str, Job] = weakref.WeakValueDictionary()  # a result is kept by who asked for it
        self._waiting: list[Job] = []
        self._used: dict[str, list[tuple[float, float]]] = {}  # owner: (when it ended, seconds)
        self._running: Job | None = None
        self._change = threading.Condition()
        self._worker: threading.Thread | None = None

    def submit(self, kind: str, owner: str, work: Callable[[OnProgress], Any],
               on_finish: OnFinish | None = None) -> Job:
        """Queue `work(on_progress)`. `on_finish(state, error)` runs in the worker thread, whatever the ending, before the
        job counts as finished: whoever sees a finished job also sees what it left behind."""
        job = Job(kind, owner, work, on_finish)
        with self._change:
            if self._worker is None or not self._worker.is_alive():
                worker = threading.Thread(target=self._drain, name="jobs", daemon=True)
                worker.start()  # first: a job is in line only where somebody takes it
                self._worker = worker
            self._jobs[job.id] = job
            now = time.monotonic()
            job.turn_s = now + self._used_lately_s(owner, now)
            bisect.insort(self._waiting, job, key=lambda each: each.turn_s)
            self._change.notify()
        return job

    def get(self, job_id: str, owner: str) -> Job | None:
        """The job, if it exists and belongs to `owner` or to everyone. One that has ended exists while somebody holds it."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner in (owner, SHARED) else None

    def snapshot(self, job: Job) -> Snapshot:
        with self._change:
            ahead = self._waiting.index(job) + (self._running is not None) if job in self._waiting else 0
        return job.snapshot(ahead)

    def cancel(self, job: Job) -> None:
        """Stop a job; one that still waits ends at once."""
        job.cancel()
        with self._change:
            waiting = job in self._waiting
            if waiting:
                self._waiting.remove(job)
        if waiting:
            job.run()

    def _used_lately_s(self, owner: str, now_s: float) -> float:
        recent = {each: [use for use in uses if now_s - use[0] < USE_REMEMBERED_S] for each, uses in self._used.items()}
        self._used = {each: uses for each, uses in recent.items() if uses}  # of everybody: most visitors never come back
        return sum(seconds for _, seconds in self._used.get(owner, ()))

    def _drain(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting)
                self._running = self._waiting.pop(0)
            job = self._running
            job.run()
            with self._change:
                if job.owner != SHARED:
                    self._used.setdefault(job.owner, []).append((time.monotonic(), job.snapshot().seconds))
                self._running = None
            del job  # or the last job's result would stay until the next one comes
