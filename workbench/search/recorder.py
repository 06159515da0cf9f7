"""What a search has measured so far, and everyone who wants to hear of it: progress, events, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from workbench.options import BadInput, OnProgress, Progress
from workbench.plans import CostTable, ScoredPlan
from workbench.search.beam import BeamStep
from workbench.search.evaluation_cache import EvaluationCache, Evaluator, Path, Row
from workbench.search.pareto import non_dominated, plan_point
from workbench.types import Found, SearchEvent

Checkpoint = Callable[[dict, dict[str, bytes]], None]
FORMAT = "adatsq-search-1"
OWN = ("lagrangian", "beam", "refined")  # origins of the search's own plans; all others are references


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A whole plan and its measured error; `origin` is who proposed it first."""

    weight_bits_L: Row
    act_bits_TL: tuple[Row, ...]
    weight_bytes: int
    act_bits_mean: float
    error: float
    origin: str

    @property
    def point(self) -> tuple[int, float, float]:
        return self.weight_bytes, self.act_bits_mean, self.error


def extended(found: Found | None, new: Iterable[ScoredPlan]) -> Found:
    """What has been found once `new` plans are measured, too: while a search runs, what its result will hold at the end."""
    new = tuple(new)
    before = found or Found(front=(), references=())
    plans = (*before.front, *new)
    return Found(front=tuple(plans[i] for i in non_dominated([plan_point(scored) for scored in plans])),
                 references=(*before.references, *(scored for scored in new if scored.origin not in OWN)))


class SearchRecorder:
    """Owns the evaluation cache, keeps every measured plan, and reports, each as `scored` makes it. Progress counts model steps of a total
    known at the start."""

    def __init__(self, evaluator: Evaluator, costs: CostTable, *, scored: Callable[[Measured], ScoredPlan], steps: int, summed: bool,
                 question: str, on_progress: OnProgress, checkpoint: Checkpoint | None, resume: tuple[dict, dict[str, bytes]] | None,
                 active_TL=None):
        saved, blobs = resume or (None, {})
        if saved is not None and (saved.get("format"), saved.get("question")) != (FORMAT, question):
            raise BadInput("the checkpoint belongs to another model, profile or scoring; repeat its settings or start anew")
        self.cache = EvaluationCache(evaluator, summed=summed, on_extend=self._tick, saved=saved and saved["cache"], blobs=blobs,
                                     active_TL=active_TL)
        self._active_TL = active_TL
        self.measured: dict[tuple, Measured] = {}
        self.references: list[Measured] = []  # what others than the search propose, also where it proposes the same
        self.events: list[SearchEvent] = []
        self.total = 0
        self._costs, self._steps, self._question, self._scored = costs, steps, question, scored
        self._on_progress, self._checkpoint = on_progress, checkpoint
        self._started = time.monotonic()
        self._message, self._phase_end, self._done, self._saved = "", 0, 0, 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def phase(self, planned: int, message: str) -> None:
        """The next `planned` model steps belong to one kind of work; what an earlier phase saved counts as done."""
        self._done, self._phase_end = self._phase_end, self._phase_end + planned
        self._message = message

    def measure(self, paths: Iterable[Path], origins: Iterable[str], what: str) -> None:
        """Take the end-to-end error of complete paths and report them together."""
        new = [self._measured(path, origin) for path, origin in zip(paths, origins)]
        for plan in new:
            self.measured.setdefault((plan.weight_bits_L, plan.act_bits_TL), plan)
            if plan.origin not in OWN:
                self.references.append(plan)
        self.cache.keep([])
        points = _finite((plan.act_bits_mean, plan.error) for plan in new)
        text = f"error {points[0][1]:.3g} at {points[0][0]:.2f} bits" if len(points) == 1 else f"{len(points)} plans measured"
        self._report(self._steps, points, points, f"{what}: {text}" if points else f"{what}: no finite error",
                     tuple(self._scored(plan) for plan in new if math.isfinite(plan.error)))

    def beam_step(self, step: BeamStep) -> None:
        """Report one step of the beam; only what can still be extended keeps its state."""
        self.cache.keep([*step.survivors, *step.anchors] if step.step + 1 < self._steps else step.candidates)
        self._report(step.step + 1, self._so_far(step.candidates), self._so_far(step.survivors),
                     f"step {step.step + 1} of {self._steps}: {len(step.candidates)} candidates, {len(step.survivors)} kept")

    def front(self) -> list[Measured]:
        """The non-dominated measured plans, fewest bytes first."""
        plans = list(self.measured.values())
        return [plans[i] for i in non_dominated([plan.point for plan in plans])]

    def save(self) -> None:
        """Hand a checkpoint to whoever keeps it, unless the last one already has everything."""
        if self._checkpoint is not None and self.cache.fresh > self._saved:
            self._saved = self.cache.fresh
            saved = {"format": FORMAT, "question": self._question, "cache": self.cache.to_json()}
            self._checkpoint(saved, self.cache.blobs())

    def _measured(self, path: Path, origin: str) -> Measured:
        weight_bits_L, act_bits_TL = self.cache.weights[path.weights], self.cache.bits_TL(path)
        return Measured(weight_bits_L=weight_bits_L, act_bits_TL=act_bits_TL, weight_bytes=self._costs.total_bytes(weight_bits_L),
                        act_bits_mean=path.bits / self._counted(path.step), error=self.cache.error(path), origin=origin)

    def _counted(self, steps: int) -> int:
        """Active cells of the first steps."""
        return steps * len(self.cache.rows[0]) if self._active_TL is None else int(self._active_TL[:steps].sum())

    def _so_far(self, paths: Iterable[Path]) -> tuple[tuple[float, float], ...]:
        return _finite((path.bits / self._counted(path.step), path.score) for path in paths)

    def _tick(self) -> None:
        self._on_progress(Progress(stage="search", done=min(self._done, self._phase_end), total=self.total, message=self._message))
        self._done += 1

    def _report(self, step: int, candidates, survivors, message: str, plans: tuple[ScoredPlan, ...] = ()) -> None:
        event = SearchEvent(step=step, steps=self._steps, candidates=candidates, survivors=survivors,
                            evaluations=self.cache.evaluations, seconds=self.seconds,
                            front=tuple(plan.point for plan in self.front()), message=message)
        self.events.append(event)
        self.save()
        self._on_progress(Progress(stage="search", done=min(self._done, self._phase_end), total=self.total, message=message,
                                   detail=replace(event, plans=plans)))


def _finite(points) -> tuple[tuple[float, float], ...]:
    return tuple(point for point in points if math.isfinite(point[1]))
