"""Allocation from the additive distortion table alone: no model is run.

Minimise sum_i error[i, c_i] subject to sum_i cost[i, c_i] <= limit, one choice c per item i. For a price mu the
Lagrangian splits into argmin_c error[i, c] + mu cost[i, c]; as mu falls each item walks along the lower convex hull
of its (cost, error) points, so sorting all hull edges by slope gives every Lagrangian plan at once
(Shoham and Gersho 1988; Everett 1963).

Letters: T steps, L layers, C choices, I items (step and layer, or layer), E hull edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.options import BadInput
from workbench.types import DistortionTable


def total(value_IC: np.ndarray, columns_I: np.ndarray) -> float:
    """Of a plan's choices; summed in one order everywhere, so that what fits here fits elsewhere."""
    return float(value_IC[np.arange(len(columns_I)), columns_I].sum())


@dataclass(frozen=True, kw_only=True)
class Hull:
    """Lower convex hulls of all items: the cheapest column of each, and the edges upwards, steepest first."""

    error_IC: np.ndarray
    cost_IC: np.ndarray
    cheapest_I: np.ndarray
    edge_item_E: np.ndarray
    edge_column_E: np.ndarray
    edge_cost_E: np.ndarray  # cost added by taking the edge
    slope_E: np.ndarray  # error saved per unit of cost, decreasing

    def at(self, mu: float) -> np.ndarray:
        """argmin_c error + mu cost, per item; of equals the cheaper."""
        return self._after(int(np.searchsorted(-self.slope_E, -mu, side="left")))

    def within(self, limit: float) -> np.ndarray:
        """The last Lagrangian plan that costs at most `limit`, its remainder spent on later edges that still fit."""
        columns_I, taken = self.cheapest_I.copy(), []
        left = limit - total(self.cost_IC, columns_I)
        if left < 0:
            raise BadInput(f"a limit of {limit:g} is below the smallest feasible cost, {self.cost_range[0]:g}")
        for item, column in zip(self.edge_item_E, self.edge_column_E):
            extra = self.cost_IC[item, column] - self.cost_IC[item, columns_I[item]]
            if extra <= left:
                taken.append((item, columns_I[item]))
                columns_I[item], left = column, left - extra
        while taken and total(self.cost_IC, columns_I) > limit:  # `left` is rounded at every edge
            item, before = taken.pop()
            columns_I[item] = before
        return columns_I

    @property
    def cost_range(self) -> tuple[float, float]:
        """Cost of the cheapest plan and of the plan of least error."""
        return total(self.cost_IC, self.cheapest_I), total(self.cost_IC, self.at(0.0))

    def _after(self, edges: int) -> np.ndarray:
        columns_I = self.cheapest_I.copy()
        columns_I[self.edge_item_E[:edges]] = self.edge_column_E[:edges]  # an item's later edge overwrites its earlier one
        return columns_I


def hull(error_IC, cost_IC) -> Hull:
    """Hulls of every item; both arguments (I, C), or broadcastable to it."""
    error_IC = np.asarray(error_IC, dtype=np.float64)
    cost_IC = np.broadcast_to(np.asarray(cost_IC, dtype=np.float64), error_IC.shape)
    cheapest_I, edges = np.zeros(len(error_IC), dtype=np.int64), []
    for item, (error_C, cost_C) in enumerate(zip(error_IC, cost_IC)):
        cheapest_I[item], item_edges = _hull_of_one(error_C, cost_C)
        before = [cheapest_I[item], *(column for column, _ in item_edges)]
        edges += [(-slope, item, column, cost_C[column] - cost_C[previous])
                  for previous, (column, slope) in zip(before, item_edges)]
    edges.sort(key=lambda edge: edge[:2])  # stable: an item's edges keep their order, ties go to the earlier item
    slope_E, item_E, column_E, edge_cost_E = zip(*edges) if edges else ((), (), (), ())
    return Hull(error_IC=error_IC, cost_IC=cost_IC, cheapest_I=cheapest_I, edge_item_E=np.asarray(item_E, dtype=np.int64),
                edge_column_E=np.asarray(column_E, dtype=np.int64), edge_cost_E=np.asarray(edge_cost_E, dtype=np.float64),
                slope_E=-np.asarray(slope_E, dtype=np.float64))


def _hull_of_one(error_C: np.ndarray, cost_C: np.ndarray) -> tuple[int, list[tuple[int, float]]]:
    """The cheapest column and the edges (column reached, error saved per cost), slopes never increasing."""
    columns = np.lexsort((error_C, cost_C))
    here, edges = int(columns[0]), []
    while True:
        gains = [((error_C[here] - error_C[c]) / (cost_C[c] - cost_C[here]), cost_C[c], -c)
                 for c in columns if cost_C[c] > cost_C[here] and error_C[c] < error_C[here]]
        if not gains:
            return int(columns[0]), edges
        slope, _, negative = max(gains)  # of equal slopes the farthest: points on an edge are no corners
        here = int(-negative)
        edges.append((here, min(float(slope), edges[-1][1] if edges else np.inf)))  # rounding must not reorder edges


@dataclass(frozen=True, kw_only=True)
class ActHull:
    """All Lagrangian plans of activation bits: the hull over (step, layer), read as bits (T, L)."""

    hull: Hull
    act_bits_C: tuple[int, ...]
    steps: int

    def rows_at(self, mu: float) -> tuple[tuple[int, ...], ...]:
        """The Lagrangian plan at price mu."""
        return self._bits(self.hull.at(mu))

    def rows_within(self, total_cost: float) -> tuple[tuple[int, ...], ...]:
        """The Lagrangian plan whose costs over all (step, layer) sum to at most `total_cost`, remainder spent."""
        return self._bits(self.hull.within(total_cost))

    def row_after(self, step: int, left: float) -> tuple[int, ...]:
        """Bits (L) of `step` in the Lagrangian plan that spends at most `left` on the steps from there on; the cheapest row
        where nothing more is affordable."""
        made, layers = self.hull, len(self.hull.cheapest_I) // self.steps
        first, last = step * layers, (step + 1) * layers
        rest_I = np.arange(first, len(made.cheapest_I))
        edges = np.flatnonzero(made.edge_item_E >= first)
        spent_E = made.cost_IC[rest_I, made.cheapest_I[first:]].sum() + np.cumsum(made.edge_cost_E[edges])
        edges = edges[:np.searchsorted(spent_E, left, side="right")]
        edges = edges[made.edge_item_E[edges] < last]
        columns_L = made.cheapest_I[first:last].copy()
        columns_L[made.edge_item_E[edges] - first] = made.edge_column_E[edges]
        return tuple(int(self.act_bits_C[column]) for column in columns_L)

    def _bits(self, columns_I: np.ndarray) -> tuple[tuple[int, ...], ...]:
        bits_TL = np.asarray(self.act_bits_C)[columns_I].reshape(self.steps, -1)
        return tuple(tuple(int(bits) for bits in bits_L) for bits_L in bits_TL)


def activation_hull(table: DistortionTable, cost_LC=None) -> ActHull:
    """cost_LC (L, C), or what broadcasts to it, is the price of a choice at each step; by default its bits."""
    error_TLC = table.error_TLC.double().numpy()
    choices = error_TLC.shape[-1]
    cost_LC = np.asarray(table.act_bits_C if cost_LC is None else cost_LC, dtype=np.float64)
    cost_TLC = np.broadcast_to(cost_LC, error_TLC.shape)
    return ActHull(hull=hull(error_TLC.reshape(-1, choices), cost_TLC.reshape(-1, choices)),
                   act_bits_C=tuple(table.act_bits_C), steps=len(error_TLC))


def largest_sum(mean: float, count: int) -> float:
    """The largest sum whose mean over `count` does not exceed `mean` in floating point, when all terms are whole numbers."""
    total = float(np.floor(mean * count)) + 1.0
    while total / count > mean:
        total -= 1.0
    return total
