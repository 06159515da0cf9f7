"""Allocations of activation bits to compare the search with, first part: those that decide every (step, layer) or every layer.

A rival is a short function `rival(problem) -> columns_TL`, the chosen column of every (step, layer); nothing is measured here.
All of them spend the same budget by the same account: the sum of `cost_TLC` over the chosen columns never exceeds `limit`.

Letters: T steps, L layers, C choices, I items.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workbench.options import BadInput
from workbench.plans import CostTable
from workbench.search.knapsack import knapsack, relaxed
from workbench.search.lagrangian import total


@dataclass(frozen=True, kw_only=True)
class AllocationProblem:
    """Minimise the sum of `error_TLC` while the sum of `cost_TLC` stays within `limit`. Costs are bits or microseconds."""

    error_TLC: np.ndarray
    cost_TLC: np.ndarray
    limit: float

    def __post_init__(self):
        if self.error_TLC.shape != self.cost_TLC.shape:
            raise ValueError(f"errors {self.error_TLC.shape} and costs {self.cost_TLC.shape} disagree")
        if self.limit < self.least:
            raise BadInput(f"a limit of {self.limit:g} is below the smallest feasible cost, {self.least:g}")

    @cached_property
    def order_TLC(self) -> np.ndarray:
        """Columns of every (step, layer) from the cheapest up; of equal costs the better first."""
        return np.lexsort((self.error_TLC, self.cost_TLC), axis=-1)

    @property
    def least(self) -> float:
        """Cost of the cheapest plan."""
        return float(self.cost_TLC.min(-1).reshape(-1).sum())

    def cost(self, columns_TL: np.ndarray) -> float:
        return self._total(self.cost_TLC, columns_TL)

    def error(self, columns_TL: np.ndarray) -> float:
        return self._total(self.error_TLC, columns_TL)

    @staticmethod
    def _total(value_TLC: np.ndarray, columns_TL: np.ndarray) -> float:
        return total(value_TLC.reshape(-1, value_TLC.shape[-1]), columns_TL.reshape(-1))

    def fits(self, columns_TL: np.ndarray) -> bool:
        return self.cost(columns_TL) <= self.limit


def uniform(problem: AllocationProblem) -> np.ndarray:
    """The best of the plans with one choice everywhere."""
    plans = [np.full(problem.error_TLC.shape[:2], column) for column in range(problem.error_TLC.shape[-1])]
    fitting = [plan for plan in plans if problem.fits(plan)]
    if not fitting:
        raise BadInput(f"no choice fits everywhere within a limit of {problem.limit:g}")
    return min(fitting, key=problem.error)


def greedy(problem: AllocationProblem) -> np.ndarray:
    """By sensitivity: the (step, layer) with the largest error left is raised by one choice, again and again, while it fits.

    What an upgrade costs does not count, and one that does not fit closes its cell."""
    rank_TL = np.zeros(problem.error_TLC.shape[:2], dtype=np.int64)
    left, choices = problem.limit - problem.least, problem.error_TLC.shape[-1]
    heap = [(-problem.error_TLC[(*cell, problem.order_TLC[(*cell, 0)])], cell) for cell in np.ndindex(rank_TL.shape)]
    heapq.heapify(heap)
    while heap:
        _, cell = heapq.heappop(heap)
        if rank_TL[cell] + 1 == choices:
            continue
        now, then = problem.order_TLC[cell][rank_TL[cell]:rank_TL[cell] + 2]
        extra = problem.cost_TLC[(*cell, then)] - problem.cost_TLC[(*cell, now)]
        if extra <= left:
            left -= extra
            rank_TL[cell] += 1
            heapq.heappush(heap, (-problem.error_TLC[(*cell, then)], cell))
    return np.take_along_axis(problem.order_TLC, rank_TL[..., None], -1)[..., 0]


def mixed_integer(problem: AllocationProblem) -> np.ndarray:
    """The best plan by the additive table, as a multiple-choice knapsack solved by HiGHS within some seconds."""
    steps, layers, choices = problem.error_TLC.shape
    columns_I = knapsack(problem.error_TLC.reshape(-1, choices), problem.cost_TLC.reshape(-1, choices), problem.limit)
    return columns_I.reshape(steps, layers)


def layers_only(problem: AllocationProblem) -> np.ndarray:
    """ModelOpt's `auto_quantize` and auto-round in kind: a linear programme over the layers, without a time axis."""
    cost_LC = problem.cost_TLC.sum(0)  # the cheapest of these sums may be rounded to just above the limit that the cheapest plan keeps
    columns_L = relaxed(problem.error_TLC.sum(0), cost_LC, max(problem.limit, float(cost_LC.min(-1).sum())))
    return np.broadcast_to(columns_L, problem.error_TLC.shape[:2]).copy()


def uniform_rows(act_bits: int, active_TL: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """The same activation bits in every active cell (T, L), 16 in the others."""
    return tuple(tuple(act_bits if active else 16 for active in active_L) for active_L in active_TL.tolist())


def uniform_weights(costs: CostTable) -> dict[int, int]:
    """Bytes of the transformer in plans of one width, per width in ascending order."""
    return {bits: costs.total_bytes(costs.uniform(bits)) for bits in sorted(costs.weight_bits_C)}
