"""What a choice of activation bits costs at a step, as a table that the allocators do not look into.

A constraint is bits (of which a budget limits the mean) or microseconds (of which it limits the sum over an image), where the cost table
has latencies. Where both are limited, they are mixed at the exchange rate at which the plan meets both.

Letters: T steps, L layers, C choices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from workbench.options import BadInput, Budget
from workbench.plans import CostTable
from workbench.search.lagrangian import ActHull, activation_hull, largest_sum
from workbench.types import DistortionTable

MIXING_ROUNDS = 24  # halvings of the interval in which the exchange rate lies


@dataclass(frozen=True, kw_only=True)
class BudgetConstraint:
    """cost_TLC, 0 where a cell has no activation bits; `limit` is of the sum over all steps and layers."""

    name: str
    unit: str
    cost_TLC: np.ndarray
    limit: float

    def total(self, columns_TL: np.ndarray) -> float:
        return float(np.take_along_axis(self.cost_TLC, columns_TL[..., None], -1).sum())

    def check(self) -> None:
        """BadInput when the cheapest plan exceeds the limit; says by how much."""
        least = float(self.cost_TLC.min(-1).sum())
        if self.limit < least:
            raise BadInput(f"{self.name}: the limit leaves {self.limit:g} {self.unit} for the layers; the cheapest plan takes {least:g}")


def latency_us_LC(costs: CostTable, weight_bits_L, act_bits_C) -> np.ndarray | None:
    """Microseconds of a layer's product at each activation width, given its weight; None where the table has no latencies."""
    if costs.latency is None:
        return None
    columns = [costs.latency.act_bits_A.index(bits) for bits in act_bits_C]
    return costs.latency.act_us_LA(weight_bits_L).numpy()[:, columns]


def fastest_us_LC(costs: CostTable, weight_bits_C, act_bits_C) -> np.ndarray | None:
    """Microseconds of a layer's product at each weight width, its activations at their fastest width; None where nothing is known."""
    if costs.latency is None:
        return None
    layers = len(costs.macs_L)
    return np.stack([latency_us_LC(costs, [bits] * layers, act_bits_C).min(1) for bits in weight_bits_C], axis=1)


def fixed_us(costs: CostTable) -> float:
    """Microseconds of a step that no plan decides."""
    return 0.0 if costs.latency is None else costs.latency.fixed_us


def bit_constraint(act_bits_C, active_TL: np.ndarray, mean: float) -> BudgetConstraint:
    """Bits of the active cells (T, L), of which the mean is limited."""
    cost_TLC = active_TL[..., None] * np.asarray(act_bits_C, dtype=np.float64)
    return BudgetConstraint(name="max_mean_act_bits", unit="bits", cost_TLC=cost_TLC, limit=largest_sum(mean, int(active_TL.sum())))


def budget_constraints(budget: Budget, costs: CostTable, weight_bits_L, act_bits_C, active_TL: np.ndarray) -> list[BudgetConstraint]:
    """One constraint per limit on activations that the budget sets."""
    found, steps = [], len(active_TL)
    if budget.max_mean_act_bits is not None:
        found.append(bit_constraint(act_bits_C, active_TL, budget.max_mean_act_bits))
    if budget.max_latency_ms is not None:
        latency = latency_us_LC(costs, weight_bits_L, act_bits_C)
        if latency is None:
            raise BadInput("max_latency_ms is set, but nothing is known about this machine's latencies; measure them or leave it out")
        left_us = 1000 * budget.max_latency_ms - steps * fixed_us(costs)
        found.append(BudgetConstraint(name="max_latency_ms", unit="us", cost_TLC=active_TL[..., None] * latency, limit=left_us))
    return found


@dataclass(frozen=True, kw_only=True)
class LagrangianPlans:
    """Lagrangian plans under one price: `target` is what the limits allow in the units of `cost_TLC`."""

    hull: ActHull
    cost_TLC: np.ndarray
    target: float

    @property
    def span(self) -> tuple[float, float]:
        """Cost of the cheapest plan, and of the best by the table."""
        return self.hull.hull.cost_range

    def spent(self, rows) -> float:
        """By the first steps of a plan."""
        columns_TL = np.searchsorted(self.hull.act_bits_C, np.asarray(rows))
        return float(np.take_along_axis(self.cost_TLC[:len(rows)], columns_TL[..., None], -1).sum()) if len(rows) else 0.0

    def rows(self, total: float | None = None):
        """The Lagrangian plan that costs at most `total`, by default the target."""
        return self.hull.rows_within(max(self.target if total is None else total, self.span[0]))


def lagrangian_plans(table: DistortionTable, limits: list[BudgetConstraint]) -> LagrangianPlans:
    """Lagrangian plans by `table` under one or two limits."""
    for constraint in limits:
        constraint.check()
    if len(limits) == 1:
        return _under(table, limits[0].cost_TLC, limits[0].limit)
    first, second = limits
    for only, other in ((first, second), (second, first)):
        alone = _under(table, only.cost_TLC, only.limit)
        if other.total(_columns(alone)) <= other.limit:
            return alone
    return _mixed(table, first, second)


def _mixed(table: DistortionTable, first: BudgetConstraint, second: BudgetConstraint) -> LagrangianPlans:
    """Both limits bind. A mean of the two costs, each in units of its limit, lies between the two single prices: halve towards the share
    where neither is exceeded, and tighten the sum where rounding to whole choices still exceeds one."""
    low, high, found = 0.0, 1.0, None
    for _ in range(MIXING_ROUNDS):
        share = (low + high) / 2
        cost_TLC = share * first.cost_TLC / first.limit + (1 - share) * second.cost_TLC / second.limit
        mixed = _under(table, cost_TLC, 1.0)
        over = [constraint.total(_columns(mixed)) / constraint.limit for constraint in (first, second)]
        low, high = (share, high) if over[0] > over[1] else (low, share)
        tight = _tightened(mixed, (first, second), max(over))
        if tight is not None and (found is None or _error(table, tight) < _error(table, found)):
            found = tight
    if found is None:
        raise BadInput(f"{first.name} and {second.name} can be met each, but not both at once; raise one of them")
    return found


def _tightened(mixed: LagrangianPlans, limits, over: float) -> LagrangianPlans | None:
    """With a target as much smaller as it takes to exceed no limit; None where there is none."""
    tried, least = mixed, mixed.span[0]
    while tried.target >= least:
        tried = replace(tried, target=tried.target / max(over, 1.0))
        if tried.target < least:
            return None
        over = max(constraint.total(_columns(tried)) / constraint.limit for constraint in limits)
        if over <= 1.0:
            return tried
        over = max(over, 1.001)
    return None


def _under(table: DistortionTable, cost_TLC: np.ndarray, target: float) -> LagrangianPlans:
    return LagrangianPlans(hull=activation_hull(table, cost_TLC), cost_TLC=cost_TLC, target=target)


def _columns(plans: LagrangianPlans) -> np.ndarray:
    return np.searchsorted(plans.hull.act_bits_C, np.asarray(plans.rows()))


def _error(table: DistortionTable, plans: LagrangianPlans) -> float:
    columns = _columns(plans)
    return float(np.take_along_axis(table.error_TLC.double().numpy(), columns[..., None], -1).sum())
