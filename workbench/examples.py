"""A finished run that is shown before a visitor has made one: written by `assets/build/examples.py`, one file per embedded model.

It holds results only, neither trajectories nor solved weights, so it can be looked at but nothing can be made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from workbench.options import QuantConfig
from workbench.plans import CostTable
from workbench.runs import Run
from workbench.types import Comparison, DistortionTable, SearchResult, SensitivityMap

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "examples"
EVENTS_KEPT = 60  # of the search, the newest


@dataclass(frozen=True, kw_only=True)
class Example:
    """`made` says where and when in one line; `seconds` is how long all of it took there."""

    made: str
    seconds: float
    sensitivity: SensitivityMap
    table: DistortionTable
    costs: CostTable
    quant: QuantConfig
    result: SearchResult
    comparison: Comparison

    @property
    def trace(self) -> None:
        """An example has no trajectories."""
        return None


def save(example: Example, model: str, folder: Path = FOLDER) -> Path:
    """Write a model's example, without what is large and not shown."""
    small = replace(example, sensitivity=replace(example.sensitivity, adjoint_RSTMD=None),
                    result=replace(example.result, events=example.result.events[-EVENTS_KEPT:]),
                    comparison=replace(example.comparison, trajectories=None))
    return Run(folder).save("example", model, small)


def load(model: str, model_hash: str, folder: Path = FOLDER) -> Example | None:
    """The example of a model, if there is one and it was made with these very weights."""
    found = Run(folder).load(Example, "example", model) if folder.is_dir() else None
    return found if found is not None and found.sensitivity.model_hash == model_hash else None
