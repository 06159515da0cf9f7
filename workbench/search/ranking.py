"""How well predictions order plans: Spearman's rank correlation with measured error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from workbench.types import Ranking

LEAST_PLANS = 5  # below that a rank correlation says nothing


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks, ties at their mean rank; NaN where one side is constant."""
    ranks = [rankdata(values) for values in (first, second)]
    spread = [rank.std() for rank in ranks]
    if min(spread) == 0:
        return float("nan")
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1]))


def rank(predicted: Mapping[str, Sequence[float]], measured: Sequence[float], near: Sequence[bool]) -> tuple[Ranking, ...]:
    """One report per prediction, over all plans and over those near the budget alone, where ordering them is hard."""
    error_I, near_I = np.asarray(measured, dtype=np.float64), np.asarray(near, dtype=bool)
    finite_I = np.isfinite(error_I)
    reports = []
    for name, values in predicted.items():
        value_I = np.asarray(values, dtype=np.float64)
        over = {}
        for which, chosen_I in (("all", finite_I), ("near", finite_I & near_I)):
            count = int(chosen_I.sum())
            rho = spearman(value_I[chosen_I], error_I[chosen_I]) if count >= LEAST_PLANS else float("nan")
            over[which] = (rho if np.isfinite(rho) else None, count)
        reports.append(Ranking(prediction=name, spearman=over["all"][0], plans=over["all"][1], spearman_near=over["near"][0],
                               plans_near=over["near"][1]))
    return tuple(reports)
