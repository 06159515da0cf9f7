"""What the shell shows: a progress bar with time left, tables, one JSON object, and Ctrl-C as a clean cancel."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from workbench.options import BadInput, Cancelled, Progress

PIPE_COLUMNS = 160  # of a table that goes into a file or a pipe, which have no width of their own


class Listener:
    """Draws one bar per stage on stderr if that is a terminal. After Ctrl-C the next report cancels the stage."""

    def __init__(self, bars):
        self._bars, self._tasks = bars, {}
        self.interrupted = self.reporting = False

    def __call__(self, progress: Progress) -> None:
        self.reporting = True
        if self.interrupted:
            raise Cancelled
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=progress.total)
        self._bars.update(self._tasks[progress.stage], completed=progress.done, total=progress.total,
                          message=progress.message)

    def interrupt(self, _signal, _frame) -> None:
        """First Ctrl-C: stop at the next report. A second one, or one before any report, stops at once."""
        if self.interrupted or not self.reporting:
            raise KeyboardInterrupt
        self.interrupted = True


@contextmanager
def listening():
    """A Listener that hears Ctrl-C and clears its bars at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("[dim]{task.fields[message]}"))
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        listener = Listener(_WithMessage(bars))
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, listener.interrupt) if in_main_thread else None
        try:
            yield listener
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, before)


class _WithMessage:
    """rich's bars, with a message column that is empty until the first report."""

    def __init__(self, bars):
        self.add_task = lambda stage, total: bars.add_task(stage, total=total, message="")
        self.update = bars.update


def quieten() -> None:
    """Loading libraries talk on stderr about things nobody here can change; only our own lines belong there."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def check_output(flag: str, path: str | None) -> None:
    """Refuse an output file that could not be written, before hours are spent on what it should hold."""
    if path in (None, "-"):
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise BadInput(f"{flag} {path} is a folder; give a file name")
    if not folder.is_dir():
        raise BadInput(f"{flag} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{flag} {path}: the folder {folder} is not writable")


@contextmanager
def only_json(path: str | None):
    """With `-`, everything that is printed meanwhile goes to stderr, also what C libraries write on file descriptor 1 (HiGHS does), so
    that the JSON object stands alone in stdout. Otherwise nothing changes."""
    if path != "-":
        yield
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        # What C has buffered for stdout must leave while that is still stderr.
        ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
        os.dup2(real, 1)
        os.close(real)


def deliver(path: str | None, result: dict, *tables) -> None:
    """Print the tables and write the JSON object; `-` prints the JSON object alone."""
    result = finite(result)
    if path == "-":
        sys.stdout.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    for each in tables:
        console.print(each)
    if path:
        from workbench.runs import write_json

        write_json(Path(path), result)
        console.print(f"written: {path}", soft_wrap=True, highlight=False)


def table(title: str, columns: tuple[str, ...], rows) -> object:
    """A table for people; the first column is text, the others are numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def finite(value):
    """The same nested value with null where JSON has no number (the bounds of an interval over one prompt)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [finite(item) for item in value]
    return value
