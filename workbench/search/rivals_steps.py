"""Allocations of activation bits to compare the search with, second part: those that decide every step, and chance.

Letters: T steps, L layers, C choices.
"""

from __future__ import annotations

from math import gcd

import numpy as np

from workbench.options import BadInput
from workbench.search.rivals import AllocationProblem

COST_LEVELS = 20_000  # levels of the dynamic programme where costs are not whole numbers
ONLINE_LOW, ONLINE_HIGH = 4, 8  # activation bits that DVD-Quant switches between


def steps_exact(problem: AllocationProblem) -> np.ndarray:
    """One choice per step for all layers, exactly, by dynamic programming over steps and cost: VaTMP's allocation of
    min sum_t error_t(b) under a mean (Q-DiT4SR), with the table's errors instead of its variance model."""
    error_TC, cost_TC = problem.error_TLC.sum(1), problem.cost_TLC.sum(1)
    level_TC, levels = _whole_levels(cost_TC, problem.limit)
    best_B, back = np.full(levels + 1, np.inf), []  # least error that spends exactly this many levels
    best_B[0] = 0.0
    for error_C, level_C in zip(error_TC, level_TC):
        reached_CB = np.full((len(error_C), levels + 1), np.inf)
        for column, level in enumerate(level_C):
            if level <= levels:
                reached_CB[column, level:] = best_B[:levels + 1 - level] + error_C[column]
        back.append(reached_CB.argmin(axis=0))
        best_B = reached_CB.min(axis=0)
    spent, columns_T = int(best_B.argmin()), []
    for level_C, column_B in zip(level_TC[::-1], back[::-1]):
        columns_T.append(int(column_B[spent]))
        spent -= level_C[columns_T[-1]]
    return _over_layers(problem, np.asarray(columns_T[::-1]))


def _whole_levels(cost_TC: np.ndarray, limit: float) -> tuple[np.ndarray, int]:
    """Costs above each step's cheapest as whole levels, and how many the limit allows. Whole costs stay exact; others are rounded
    up, so the limit is kept."""
    extra_TC = cost_TC - cost_TC.min(axis=1, keepdims=True)
    left = limit - float(cost_TC.min(axis=1).sum())
    if (extra_TC == np.rint(extra_TC)).all():
        unit = float(max(1, gcd(*(int(extra) for extra in extra_TC.ravel()))))
    else:
        unit = max(left, float(extra_TC.max())) / COST_LEVELS
    if left < 0:
        raise BadInput(f"no choice fits everywhere within a limit of {limit:g}")
    most = float(extra_TC.max(axis=1).sum())
    return np.ceil(extra_TC / unit).astype(np.int64), int(np.floor(min(left, most) / unit))


def steps_bisection(problem: AllocationProblem) -> np.ndarray:
    """One choice per step for all layers by adaptive bisection (TMPDiff, arXiv 2603.14062): spans of steps share a choice; the
    half of a span, or the whole, that saves most error per cost when raised is raised, and so becomes a span of its own."""
    error_TC, cost_TC = problem.error_TLC.sum(1), problem.cost_TLC.sum(1)
    order_C = np.argsort(cost_TC.sum(0), kind="stable")
    spans, left = [(0, len(error_TC), 0)], problem.limit - float(cost_TC[:, order_C[0]].sum())
    if left < 0:
        raise BadInput(f"no choice fits everywhere within a limit of {problem.limit:g}")
    while True:
        best = None
        for number, (first, last, rank) in enumerate(spans):
            if rank + 1 == len(order_C):
                continue
            middle = (first + last) // 2
            for start, end in {(first, last), (first, middle), (middle, last)}:
                now, then = order_C[rank], order_C[rank + 1]
                saved = float((error_TC[start:end, now] - error_TC[start:end, then]).sum())
                extra = float((cost_TC[start:end, then] - cost_TC[start:end, now]).sum())
                if start < end and extra <= left and saved > 0:
                    key = (saved / max(extra, 1e-300), -start, -end)
                    best = max(best, (key, number, start, end, extra)) if best else (key, number, start, end, extra)
        if best is None:
            ranks = [rank for first, last, rank in spans for _ in range(first, last)]
            return _over_layers(problem, order_C[ranks])
        _, number, start, end, extra = best
        first, last, rank = spans[number]
        pieces = [(first, start, rank), (start, end, rank + 1), (end, last, rank)]
        spans[number:number + 1] = [piece for piece in pieces if piece[0] < piece[1]]
        left -= extra


def protected_ends(problem: AllocationProblem) -> np.ndarray:
    """The first and last N steps at a better choice than the rest: of all N and all pairs of choices within the limit, the pair and N
    that the table likes best."""
    steps, _, choices = problem.error_TLC.shape
    best = None
    for low in range(choices):
        for high in range(choices):
            for ends in range(steps // 2 + 1):
                columns_T = np.full(steps, low)
                columns_T[:ends] = columns_T[steps - ends:] = high
                plan = _over_layers(problem, columns_T)
                if problem.fits(plan) and (best is None or problem.error(plan) < problem.error(best)):
                    best = plan
    if best is None:
        raise BadInput(f"no choice fits everywhere within a limit of {problem.limit:g}")
    return best


def random_plan(problem: AllocationProblem, random: np.random.Generator) -> np.ndarray:
    """Cells raised by one choice in random order until nothing more fits."""
    rank_TL = np.zeros(problem.error_TLC.shape[:2], dtype=np.int64)
    left = problem.limit - problem.least
    open_cells = list(np.ndindex(rank_TL.shape))
    while open_cells:
        number = int(random.integers(len(open_cells)))
        cell = open_cells[number]
        order_C = problem.order_TLC[cell]
        step = problem.cost_TLC[cell][order_C[rank_TL[cell] + 1:][:1]] - problem.cost_TLC[cell][order_C[rank_TL[cell]]]
        if len(step) == 0 or step[0] > left:
            open_cells[number] = open_cells[-1]
            open_cells.pop()
        else:
            left -= float(step[0])
            rank_TL[cell] += 1
    return np.take_along_axis(problem.order_TLC, rank_TL[..., None], -1)[..., 0]


def online_bits(change: float, moved: float, delta: float) -> tuple[int, float]:
    """DVD-Quant's switch: (activation bits of the next step, change accumulated since the last step at high bits).

    `change` is the relative L1 change of the features over the last step, `moved` what had accumulated before it. The paper's rule
    as read here: once the sum passes `delta` one step runs at 8 bits and the count starts anew."""
    moved += change
    return (ONLINE_HIGH, 0.0) if moved > delta else (ONLINE_LOW, moved)


def _over_layers(problem: AllocationProblem, columns_T: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(columns_T)[:, None], problem.error_TLC.shape[1], axis=1)
