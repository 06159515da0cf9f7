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
        left = limit - total(self.cost_IC, self.cheapest_I)
        if left < 0:
            raise BadInput(f"a limit of {limit:g} is below the smallest feasible cost, {self.cost_range[0]:g}")
        left_E = np.subtract.accumulate(np.append(left, self.edge_cost_E))
        first = int(np.argmax(np.append(left_E, -1.0) < 0)) - 1  # so many edges fit one after the other
        columns_I, left, taken = self._after(first), left_E[first], []
        for edge in first + np.flatnonzero(self.edge_cost_E[first:] <= left):
            item, column = self.edge_item_E[edge], self.edge_column_E[edge]
            extra = self.cost_IC[item, column] - self.cost_IC[item, columns_I[item]]
            if extra <= left:
                taken.append((item, columns_I[item]))
                columns_I[item], left = column, left - extra
        while taken and total(self.cost_IC, columns_I) > limit:  # `left` is rounded at every edge
            item, before = taken.pop()
            columns_I[item] = before
        while first and total(self.cost_IC, columns_I) > limit:
            first -= 1
            columns_I = self._after(first)
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
    wider_IC = np.broadcast_to(-np.arange(error_IC.shape[1]), error_IC.shape)  # of equal cost and error the widest: a cell without a choice
    items, cheapest_I = np.arange(len(error_IC)), np.lexsort((wider_IC, error_IC, cost_IC), axis=-1)[:, 0]
    here_I, steepest_I, rounds = cheapest_I, np.full(len(items), np.inf), []
    for _ in range(error_IC.shape[1] - 1):
        found_I, slope_I = _next_corner(error_IC, cost_IC, here_I)
        some = slope_I > -np.inf
        steepest_I = np.minimum(slope_I, steepest_I)  # rounding must not reorder edges
        extra_I = cost_IC[items, found_I] - cost_IC[items, here_I]
        rounds.append((steepest_I[some], items[some], found_I[some], extra_I[some]))
        here_I = np.where(some, found_I, here_I)
    slope_E, item_E, column_E, edge_cost_E = map(np.concatenate, zip(*rounds)) if rounds else np.zeros((4, 0))
    order_E = np.lexsort((item_E, -slope_E))  # stable: an item's edges keep their order, ties go to the earlier item
    return Hull(error_IC=error_IC, cost_IC=cost_IC, cheapest_I=cheapest_I, edge_item_E=item_E[order_E].astype(np.int64),
                edge_column_E=column_E[order_E].astype(np.int64), edge_cost_E=edge_cost_E[order_E], slope_E=slope_E[order_E])


def _next_corner(error_IC: np.ndarray, cost_IC: np.ndarray, here_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every item the column that saves most error per cost from the present one, and how much; -inf where none saves any."""
    saved_IC = np.take_along_axis(error_IC, here_I[:, None], 1) - error_IC
    extra_IC = cost_IC - np.take_along_axis(cost_IC, here_I[:, None], 1)
    possible = (extra_IC > 0) & (saved_IC > 0)
    slope_IC = np.where(possible, saved_IC / np.where(possible, extra_IC, 1.0), -np.inf)
    slope_I = slope_IC.max(axis=1)
    # of equal slopes the farthest: points on an edge are no corners
    return np.where(slope_IC == slope_I[:, None], cost_IC, -np.inf).argmax(axis=1), slope_I


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
        return tuple(map(tuple, bits_TL.tolist()))


def activation_hull(table: DistortionTable, cost_TLC=None) -> ActHull:
    """cost_TLC, or what broadcasts to it, is the price of a choice; by default its bits."""
    error_TLC = table.error_TLC.double().numpy()
    choices = error_TLC.shape[-1]
    cost_TLC = np.broadcast_to(np.asarray(table.act_bits_C if cost_TLC is None else cost_TLC, dtype=np.float64), error_TLC.shape)
    return ActHull(hull=hull(error_TLC.reshape(-1, choices), cost_TLC.reshape(-1, choices)),
                   act_bits_C=tuple(table.act_bits_C), steps=len(error_TLC))


def largest_sum(mean: float, count: int) -> float:
    """The largest sum whose mean over `count` does not exceed `mean` in floating point, when all terms are whole numbers."""
    total = float(np.floor(mean * count)) + 1.0
    while total / count > mean:
        total -= 1.0
    return total
