"""Solved weights on disk: one safetensors file for each layer and width, under the hash of everything it was solved from.

A process that is killed while it solves loses the layer it was at; another budget, plan or command that needs the same layer at the
same width reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from workbench.plans import BitChoice
from workbench.runs import Run
from workbench.types import QuantWeight, SolveReport

STAGE = "weight"


@dataclass(frozen=True, kw_only=True)
class SolvedWeight:
    """One layer at one width. up_NR and down_RK: its low-rank branch, which siblings solved together share."""

    weight: QuantWeight
    report: SolveReport
    up_NR: Tensor | None = None
    down_RK: Tensor | None = None


class WeightStore:
    """Where the solved weights of one set of calibration inputs and settings are kept. Without a run folder: nowhere."""

    def __init__(self, run: Run | None, *made_from):
        self._run, self._base = run, None if run is None else Run.key(*made_from)

    def load(self, siblings: Sequence[str], name: str, choice: BitChoice, alpha_T: Tensor) -> SolvedWeight | None:
        """A layer of siblings that are solved together, at a width; None where it has not been solved."""
        return None if self._run is None else self._run.load(SolvedWeight, STAGE, self._key(siblings, name, choice, alpha_T))

    def save(self, siblings: Sequence[str], name: str, choice: BitChoice, alpha_T: Tensor, solved: SolvedWeight) -> None:
        """Keep it, whole or not at all."""
        if self._run is not None:
            self._run.save(STAGE, self._key(siblings, name, choice, alpha_T), solved)

    def _key(self, siblings: Sequence[str], name: str, choice: BitChoice, alpha_T: Tensor) -> str:
        return Run.key(self._base, tuple(siblings), name, choice, alpha_T)
