"""Sets of points where no point is at least as good as another in everything. Every axis is minimised.

Letters: I points, D axes (weight bytes, mean activation bits, error).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.options import BadInput, Budget
from workbench.plans import ScoredPlan


def non_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the non-dominated points in ascending (lexicographic) order. Of equal points the first is kept;
    points with NaN or infinity never are."""
    points_ID = np.asarray(points, dtype=np.float64)
    if points_ID.size == 0:
        return []
    # In lexicographic order nobody is dominated by a later point, so one pass against those kept is enough.
    kept: list[int] = []
    for i in np.lexsort(points_ID.T[::-1]):
        point_D = points_ID[i]
        if np.isfinite(point_D).all() and not (points_ID[kept] <= point_D).all(axis=1).any():
            kept.append(int(i))
    return kept


def distance_to_origin(points: Sequence[Sequence[float]]) -> np.ndarray:
    """Distance of each point to the origin once every axis runs from 0 to 1 over the finite points."""
    if len(points) == 0:
        return np.zeros(0)
    points_ID = np.asarray(points, dtype=np.float64)
    finite_ID = points_ID[np.isfinite(points_ID).all(axis=1)]
    if len(finite_ID) == 0:
        return np.full(len(points_ID), np.inf)
    low_D, high_D = finite_ID.min(axis=0), finite_ID.max(axis=0)
    span_D = np.where(high_D > low_D, high_D - low_D, 1.0)
    distance_I = np.sqrt((((points_ID - low_D) / span_D) ** 2).sum(axis=1))
    return np.where(np.isfinite(distance_I), distance_I, np.inf)


def knee(points: Sequence[Sequence[float]]) -> int:
    """Index of the non-dominated point nearest the origin; the first of equals."""
    front = non_dominated(points)
    if not front:
        raise BadInput("no point is finite, so none can be the best compromise")
    distance_I = distance_to_origin([points[i] for i in front])
    return front[int(np.argmin(distance_I))]


def plan_point(scored: ScoredPlan) -> tuple[int, float, float]:
    """A plan on the three axes: weight bytes, mean activation bits, measured error."""
    return scored.plan.weight_bytes, scored.plan.act_bits_mean, scored.error


def within(point: Sequence[float], budget: Budget) -> bool:
    """Whether a point (weight bytes, mean activation bits, ...) respects every limit that is set."""
    bytes_ok = budget.max_weight_bytes is None or point[0] <= budget.max_weight_bytes
    return bytes_ok and (budget.max_mean_act_bits is None or point[1] <= budget.max_mean_act_bits)


def fits(scored: ScoredPlan, budget: Budget) -> bool:
    """Whether a plan respects every limit that is set; a plan of unknown latency does not respect one on time."""
    if not within(plan_point(scored), budget):
        return False
    if budget.max_latency_ms is None:
        return True
    return scored.plan.latency_ms is not None and scored.plan.latency_ms <= budget.max_latency_ms


def select(front: Sequence[ScoredPlan], budget: Budget) -> ScoredPlan:
    """The plan of least error within budget; ties go to fewer bytes, then fewer bits, then the plan's id."""
    fitting = [scored for scored in front if fits(scored, budget)]
    if not fitting:
        raise BadInput(_nothing_fits(front, budget))
    return min(fitting, key=lambda s: (s.error, s.plan.weight_bytes, s.plan.act_bits_mean, s.plan.plan_id))


def _nothing_fits(front: Sequence[ScoredPlan], budget: Budget) -> str:
    if not front:
        return "the front is empty: no plan has been measured"
    least_bytes = min(scored.plan.weight_bytes for scored in front)
    least_bits = min(scored.plan.act_bits_mean for scored in front)
    if budget.max_weight_bytes is not None and budget.max_weight_bytes < least_bytes:
        return f"max_weight_bytes is {budget.max_weight_bytes}; the smallest plan needs {least_bytes}"
    if budget.max_mean_act_bits is not None and budget.max_mean_act_bits < least_bits:
        return f"max_mean_act_bits is {budget.max_mean_act_bits:g}; the smallest mean of a plan is {least_bits:g}"
    if budget.max_latency_ms is not None:
        times = [scored.plan.latency_ms for scored in front if scored.plan.latency_ms is not None]
        if not times or budget.max_latency_ms < min(times):
            known = f"the fastest plan takes {min(times):.4g}" if times else "no plan's is known"
            return f"max_latency_ms is {budget.max_latency_ms:g}; {known}"
    if budget.max_weight_bytes is None or budget.max_mean_act_bits is None or budget.max_latency_ms is not None:
        return "no plan meets all limits at once; raise one of them"
    both = [scored for scored in front if scored.plan.weight_bytes <= budget.max_weight_bytes]
    bits = min(scored.plan.act_bits_mean for scored in both)
    return (f"no plan meets both limits: within {budget.max_weight_bytes} bytes the smallest mean of activation bits "
            f"is {bits:g}, not {budget.max_mean_act_bits:g}")
