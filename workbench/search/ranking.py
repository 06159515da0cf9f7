"""What a table predicts for a plan, and how well predictions order plans: Spearman's rank correlation with measured error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.stats import rankdata

from workbench.plans import ScoredPlan
from workbench.types import DistortionTable, Ranking

NEAR = 0.1  # of the budget's mean activation bits
LEAST_PLANS = 5  # below that a rank correlation says nothing


def predict(table: DistortionTable, weight_bits_L, act_bits_TL) -> float:
    """A table's sum over weights and over all (step, layer)."""
    act_TL = torch.tensor([[table.act_bits_C.index(16 if bits is None else bits) for bits in row] for row in act_bits_TL])
    weight_L = torch.tensor([table.weight_bits_C.index(bits) for bits in weight_bits_L])
    return float(table.error_TLC.double().gather(2, act_TL[..., None]).sum()
                 + table.weight_error_LC.double().gather(1, weight_L[:, None]).sum())


def rank_tables(tables: Mapping[str, DistortionTable], scored: Sequence[ScoredPlan], target_bits: float) -> tuple[Ranking, ...]:
    """How each table orders measured plans, over all of them and over those within a tenth of `target_bits`."""
    plans = [each.plan for each in scored]
    predicted = {name: [predict(table, plan.weight_bits_L, plan.act_bits_TL) for plan in plans] for name, table in tables.items()}
    return rank(predicted, [each.error for each in scored], [abs(plan.act_bits_mean - target_bits) < NEAR * target_bits for plan in plans])


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
