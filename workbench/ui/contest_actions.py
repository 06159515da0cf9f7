"""The Methods screen: run a comparison as a job, skip a method, write the table.

The session's `contest` is (model hash, JSON object so far, grid image or None); what belongs to another model is not shown.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from workbench import zerogpu
from workbench.options import BadInput, ContestConfig, TraceConfig
from workbench.prompts import parse_lines
from workbench.ui import inputs, limits

CONTEST_INPUTS = ("weight_bits", "act_bits", "modulation")
TAB = "methods"
PROMPTS_COMPARED = 64  # at most, and where a place allows fewer, those


def names() -> list[tuple[str, str]]:
    """(label, name) of every method, for the choice."""
    from workbench.methods import METHODS

    return [(method.label, name) for name, method in METHODS.items()]


def default_names() -> list[str]:
    """A first choice that takes a minute or two."""
    return ["rtn", "quarot", "svdquant", "adatsq"]


def most_prompts() -> int:
    """Prompts of one comparison of methods, here."""
    return min(PROMPTS_COMPARED, limits.here().prompts)


def current(session) -> tuple[dict | None, object]:
    """(JSON object, grid image) of the comparison on the loaded model."""
    held = getattr(session, "contest", None)
    if held is None or session.bundle is None or held[0] != session.bundle.model_hash:
        return None, None
    return held[1], held[2]


def run(session, chosen, prompts_text, seed, steps, *contest_config) -> None:
    """Compare the chosen methods; rows appear as methods finish, and what the session's run folder holds is not run again."""
    if session.bundle is None:
        raise BadInput("no model is loaded yet; wait for it or load one on the Model screen")
    bundle, images = session.bundle, inputs.read(TraceConfig, ("steps", "seed"), (steps, seed), prompts=parse_lines(prompts_text or ""))
    config = inputs.read(ContestConfig, CONTEST_INPUTS, contest_config)
    if not chosen:
        raise BadInput("no method is chosen; tick at least one")
    if not 1 <= len(images.prompts) <= most_prompts():
        raise BadInput(f"{len(images.prompts)} prompts to compare; write 1 to {most_prompts()}, one per line")
    limits.here().check(steps=images.steps)
    contest, make = importlib.import_module("workbench.contest"), importlib.import_module("workbench.contest.make")
    runs = importlib.import_module("workbench.runs")
    settings = make.Settings(contest_config=config, trace=TraceConfig(steps=images.steps))
    for name in contest.chosen(tuple(chosen)):
        make.check(contest.METHODS[name], config)

    def work(on_progress):
        def report(progress):
            if getattr(session, "skip_method", False):
                session.skip_method = False
                raise contest.SkipMethod
            on_progress(progress)

        def show(found, image=None):
            if found["results"]:  # what an earlier comparison found stays until there is something new
                session.set(contest=(bundle.model_hash, found, image))

        float_run, results, found = contest.run_comparison(bundle, tuple(chosen), settings, prompts=images.prompts, seed=images.seed,
                                                           run=runs.Run(session.folder), on_progress=report, on_result=show,
                                                           stages=zerogpu.stages(zerogpu.CONTEST) if zerogpu.ON_ZERO_GPU else None)
        show(found, contest.image_grid(float_run, results) if results else None)

    session.skip_method = False
    session.submit("contest", TAB, work)


def skip(session) -> None:
    """Leave out the method that is running and go on with the next."""
    if session.busy and session.job.kind == "contest":
        session.skip_method = True


def stop(session) -> None:
    session.cancel()


def table_file(session, kind: str) -> str | None:
    """The table as a file to download: csv or md."""
    found, _ = current(session)
    if found is None or not found["results"]:
        return None
    contest = importlib.import_module("workbench.contest")
    path = Path(session.downloads) / f"methods.{kind}"
    path.write_text((contest.csv_text if kind == "csv" else contest.markdown_text)(found), encoding="utf-8")
    return str(path)
