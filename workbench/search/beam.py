"""AdaTSQ's Pareto-aware beam search over steps (arXiv 2602.09883; section 4 of the design), made monotonic.

From the noisiest step on, every surviving path is extended by several configurations of the next step; what counts are the bits
spent so far and the measured score. Survivors are chosen slot by slot: slot m picks among the extensions of slots
1..m only, so a narrower beam is a prefix of a wider one and a wider beam is never worse, whatever the evaluator
(Lemons et al., "Beam Search: Faster and Monotonic", arXiv 2204.02929).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.search.evaluation_cache import Path, Row, SearchFailed
from workbench.search.pareto import distance_to_origin, non_dominated


@dataclass(frozen=True, kw_only=True)
class BeamStep:
    """What one step of the beam looked at and kept; `anchors` are the seeds' prefixes."""

    step: int
    candidates: tuple[Path, ...]
    survivors: tuple[Path, ...]
    anchors: tuple[Path, ...]


def beam_search(root: Path, *, steps: int, width: int, configurations: Callable[[Path], Sequence[Row]],
                seeds: Sequence[Sequence[Row]], extend: Callable[[Path, Row], Path],
                on_step: Callable[[BeamStep], None]) -> BeamStep:
    """The last step. `seeds` are whole plans (T, L): each is walked beside the beam, and its prefix may be
    picked by any slot, so nothing found is worse than they are."""
    slots: list[Path | None] = [root]
    anchors = [root] * len(seeds)
    for step in range(steps):
        anchors = [extend(path, seed[step]) for path, seed in zip(anchors, seeds)]
        children = [[extend(path, row) for row in configurations(path)] if path else [] for path in slots]
        candidates = tuple(dict.fromkeys([*anchors, *(path for family in children for path in family)]))
        if not any(np.isfinite(path.score) for path in candidates):
            raise SearchFailed(f"every candidate of step {step + 1} scored NaN or infinity; "
                               "the model breaks down at these weights or inputs")
        slots = _survivors(anchors, children, width)
        last = BeamStep(step=step, candidates=candidates, survivors=tuple(path for path in slots if path),
                        anchors=tuple(dict.fromkeys(anchors)))
        on_step(last)
    return last


def _survivors(anchors: list[Path], children: list[list[Path]], width: int) -> list[Path | None]:
    """One path per slot: slot m's pool are the anchors and the children of slots 1..m."""
    pool: dict[Path, None] = dict.fromkeys(path for path in anchors if np.isfinite(path.score))
    taken: dict[Path | None, None] = {}
    for slot in range(width):
        if slot < len(children):
            pool |= dict.fromkeys(path for path in children[slot] if np.isfinite(path.score))
        taken[next((path for path in _preference(list(pool), slot) if path not in taken), None)] = None
    return list(taken)


def _preference(pool: list[Path], slot: int) -> list[Path]:
    """Non-dominated before dominated, each nearest the origin first; slots 2 and 3 put an end of the front before all."""
    points = [(path.bits, path.score) for path in pool]
    front = non_dominated(points)
    ends = {1: front[:1], 2: front[-1:]}.get(slot, [])
    distance_I, on_front = distance_to_origin(points), set(front)
    rest = sorted(range(len(pool)), key=lambda i: (i not in on_front, distance_I[i]))
    return [pool[i] for i in (*ends, *rest)]
