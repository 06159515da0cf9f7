"""Budgets for people: what is reachable, which limit is to blame, and plans picked by a wish instead of a number.

Letters: L layers, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.options import BadInput, Budget
from workbench.plans import CostTable, ScoredPlan
from workbench.search.cost_model import fixed_us, latency_us_LC
from workbench.search.pareto import fits, knee

MEGABYTE = 1_000_000
LABELS = ((4, 4), (4, 8), (8, 8))  # weight and activation bits of the uniform plans that people compare with
FLOOR_ERROR = 1e-12  # where an error of 0 is drawn on a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Feasible:
    """Smallest and largest reachable cost on every axis, and what uniform plans would take. Latencies are None where unknown."""

    weight_bytes: tuple[int, int]
    mean_act_bits: tuple[float, float]
    latency_ms: tuple[float, float] | None
    uniform: tuple[tuple[str, int, float, float | None], ...]  # label, weight bytes, mean activation bits, ms


def feasible(costs: CostTable, act_bits_C: Sequence[int], steps: int) -> Feasible:
    """What any plan of this model can cost."""
    bytes_LC = costs.weight_bytes_LC.numpy()
    known = [(weight, act) for weight, act in LABELS if weight in costs.weight_bits_C and act in act_bits_C]
    uniform = tuple((f"W{weight}A{act}", costs.total_bytes(costs.uniform(weight)), float(act),
                     _uniform_ms(costs, weight, act, act_bits_C, steps)) for weight, act in known)
    least, most = int(bytes_LC.min(1).sum()), int(bytes_LC.max(1).sum())
    return Feasible(weight_bytes=(costs.fixed_bytes + least, costs.fixed_bytes + most),
                    mean_act_bits=(float(min(act_bits_C)), float(max(act_bits_C))), latency_ms=_latency_range(costs, act_bits_C, steps),
                    uniform=uniform)


def _uniform_ms(costs, weight_bits: int, act_bits: int, act_bits_C, steps: int) -> float | None:
    latency_LC = latency_us_LC(costs, costs.uniform(weight_bits), act_bits_C)
    return None if latency_LC is None else _ms(costs, steps, latency_LC[:, list(act_bits_C).index(act_bits)])


def _latency_range(costs, act_bits_C, steps: int) -> tuple[float, float] | None:
    tables = [latency_us_LC(costs, [bits] * len(costs.macs_L), act_bits_C) for bits in costs.weight_bits_C]
    if tables[0] is None:
        return None
    latency_WLC = np.stack(tables)
    return _ms(costs, steps, latency_WLC.min((0, 2))), _ms(costs, steps, latency_WLC.max((0, 2)))


def _ms(costs, steps: int, us_L) -> float:
    return steps * (float(np.sum(us_L)) + fixed_us(costs)) / 1000


def blame(budget: Budget, reachable: Feasible) -> tuple[str, ...]:
    """One line for each limit that no plan can keep: which, by how much, and what would be right. Empty: the budget is feasible."""
    limits = [("memory", budget.max_weight_bytes, reachable.weight_bytes, 1 / MEGABYTE, "MB"),
              ("mean activation bits", budget.max_mean_act_bits, reachable.mean_act_bits, 1.0, "bits")]
    if reachable.latency_ms is not None:
        limits.append(("time of an image", budget.max_latency_ms, reachable.latency_ms, 1.0, "ms"))
    return tuple(f"{name}: {limit * scale:.4g} {unit} is {(least - limit) * scale:.2g} {unit} below the smallest feasible, "
                 f"{least * scale:.4g} {unit}" for name, limit, (least, _), scale, unit in limits if limit is not None and limit < least)


def quality_db(error: float) -> float:
    """Signal to noise of the final latent in dB: -10 log10 of its normalised squared error."""
    return -10 * math.log10(max(error, FLOOR_ERROR))


def pick_knee(front: Sequence[ScoredPlan], budget: Budget | None = None) -> ScoredPlan:
    """The best compromise: of the plans (within budget, if one is given) the one nearest the ideal on bytes, bits and dB."""
    fitting = [scored for scored in front if budget is None or fits(scored, budget)]
    if not fitting:
        raise BadInput("no plan of the front is within the budget, so none can be picked")
    return fitting[knee([(scored.plan.weight_bytes, scored.plan.act_bits_mean, -quality_db(scored.error)) for scored in fitting])]


def pick_cheapest(front: Sequence[ScoredPlan], floor_db: float) -> ScoredPlan:
    """The cheapest plan of at least `floor_db`. Cheap is the sum of two shares: bytes of the largest plan's, activation bits of 16."""
    best = max((quality_db(scored.error) for scored in front), default=-math.inf)
    good = [scored for scored in front if quality_db(scored.error) >= floor_db]
    if not good:
        raise BadInput(f"no plan of the front reaches {floor_db:.4g} dB; the best has {best:.4g} dB")
    most = max(scored.plan.weight_bytes for scored in front)

    def price(scored: ScoredPlan) -> tuple[float, float, str]:
        return scored.plan.weight_bytes / most + scored.plan.act_bits_mean / 16, scored.error, scored.plan.plan_id
    return min(good, key=price)
