"""What a search is asked, and every allocation that follows from the tables alone.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from workbench.options import BadInput, Budget, QuantConfig, SearchConfig
from workbench.plans import CostTable
from workbench.search.cost_model import LagrangianPlans, bit_constraint, budget_constraints, fastest_us_LC, fixed_us, lagrangian_plans
from workbench.search.evaluation_cache import Row
from workbench.search.knapsack import allocate_weights
from workbench.search.lagrangian import largest_sum, total
from workbench.search.ranking import predict
from workbench.search.rivals import AllocationProblem, uniform_rows, uniform_weights
from workbench.types import DistortionTable, LayerInfo

Rows = tuple[Row, ...]  # activation bits (T, L)

SEED_ACT_BITS = (3.2, 3.6, 4.0, 4.5, 5.5, 8.0)  # mean activation bits of the Lagrangian plans that seed the beam
LOW, HIGH = 0.85, 1.4  # the beam's configurations steer towards LOW to HIGH times the target
TYPICAL_ACT_BITS = 4.0  # the target where nothing limits activations
TIME_SHARES = (1 / 3, 2 / 3, 1.0)  # of the time a budget leaves, for wider weights; the rest is for activations
TYPICAL_WEIGHT_BITS = 4  # what the beam runs on where no memory limit is set
ACT_BITS_WITH = {2: 3.3, 3: 3.3, 4: 4.0, 6: 6.0, 8: 8.0, 16: 8.0}  # mean activation bits that suit weights of a width


def pin_weights(pinned_L: tuple[int | None, ...], table: DistortionTable, costs: CostTable) -> tuple[DistortionTable, CostTable]:
    """Both tables with the same error and the same bytes at every width of a layer whose width is not to be chosen."""
    error_LC, bytes_LC = table.weight_error_LC.clone(), costs.weight_bytes_LC.clone()
    for layer, bits in enumerate(pinned_L):
        if bits is not None:
            error_LC[layer] = table.weight_error_LC[layer, table.weight_bits_C.index(bits)]
            bytes_LC[layer] = costs.weight_bytes_LC[layer, costs.weight_bits_C.index(bits)]
    usual_L = costs.usual_bits_L or (None,) * len(pinned_L)
    usual_L = tuple(usual if bits is None else bits for bits, usual in zip(pinned_L, usual_L))
    return replace(table, weight_error_LC=error_LC), replace(costs, weight_bytes_LC=bytes_LC, usual_bits_L=usual_L)


@dataclass(frozen=True, kw_only=True)
class SearchProblem:
    """What is asked, and the allocations that follow from the tables alone.

    `table` is the additive distortion table that rivals plan by; `planning_table` is what this search plans by. `prompts` are those
    that measurements are made on. `ranked` are tables of which the result says how well they order what was measured. `pinned_L`: weight
    bits of the layers that are not to be chosen; their rows of both tables and of the costs are the same at every width."""

    layers: tuple[LayerInfo, ...]
    sigma_T: tuple[float, ...]
    table: DistortionTable
    planning_table: DistortionTable
    costs: CostTable
    quant: QuantConfig
    model_hash: str
    budget: Budget
    config: SearchConfig
    prompts: str = ""
    ranked: Mapping[str, DistortionTable] = field(default_factory=dict)
    pinned_L: tuple[int | None, ...] | None = None

    @property
    def steps(self) -> int:
        return len(self.sigma_T)

    @cached_property
    def active_TL(self) -> np.ndarray:
        """The cells that have activation bits."""
        return np.tile(np.array([layer.has_act_bits for layer in self.layers]), (self.steps, 1))

    def pinned(self, weight_bits_L: Row) -> Row:
        """The weights with the widths that are not to be chosen."""
        if self.pinned_L is None:
            return weight_bits_L
        return tuple(bits if pin is None else pin for bits, pin in zip(weight_bits_L, self.pinned_L))

    @property
    def act_budget(self) -> Budget:
        """The budget, with a typical mean where nothing limits activations."""
        if self.budget.max_mean_act_bits is not None or self.budget.max_latency_ms is not None:
            return self.budget
        return self.budget.model_copy(update={"max_mean_act_bits": max(TYPICAL_ACT_BITS, min(self.table.act_bits_C))})

    @property
    def target_bits(self) -> float:
        """The mean of activation bits that matters most."""
        return self.act_budget.max_mean_act_bits or max(TYPICAL_ACT_BITS, min(self.table.act_bits_C))

    def check(self) -> None:
        expected = (self.steps, len(self.layers), len(self.table.act_bits_C))
        for table in (self.table, self.planning_table):
            if tuple(table.error_TLC.shape) != expected:
                raise BadInput(f"the distortion table is {tuple(table.error_TLC.shape)}; steps, layers and choices are {expected}")
        limit, least = self.budget.max_mean_act_bits, min(self.table.act_bits_C)
        if limit is not None and limit < least:
            raise BadInput(f"max_mean_act_bits is {limit:g}; the smallest feasible is {least}")
        for weights in self.weight_candidates:
            self.lagrangian_plans(weights)

    def under(self, budget: Budget) -> SearchProblem:
        """The same task under another budget."""
        return replace(self, budget=budget)

    def in_time(self, weight_bits_L: Row, act_bits_TL: Rows) -> bool:
        """Whether a plan keeps the budget's latency, where it sets one."""
        limits = budget_constraints(self.budget, self.costs, weight_bits_L, self.table.act_bits_C, self.active_TL)
        columns_TL = np.searchsorted(self.table.act_bits_C, np.asarray(act_bits_TL))
        return all(constraint.total(columns_TL) <= constraint.limit for constraint in limits if constraint.unit == "us")

    def lagrangian_plans(self, weight_bits_L: Row, table: DistortionTable | None = None) -> LagrangianPlans:
        """Lagrangian plans under the budget's limits on activations, by the guide unless another table is given."""
        limits = budget_constraints(self.act_budget, self.costs, weight_bits_L, self.table.act_bits_C, self.active_TL)
        return lagrangian_plans(table or self.planning_table, limits)

    @cached_property
    def by_bits(self) -> LagrangianPlans:
        """Lagrangian plans priced by bits alone."""
        return lagrangian_plans(self.planning_table, [bit_constraint(self.table.act_bits_C, self.active_TL, self.target_bits)])

    def rows_within(self, mean_bits: float) -> Rows:
        """The Lagrangian plan of activation bits with at most this mean."""
        return self.by_bits.rows(largest_sum(mean_bits, int(self.active_TL.sum())))

    def rows_uniform(self, act_bits: int) -> Rows:
        return uniform_rows(act_bits, self.active_TL)

    def allocation_problem(self, weight_bits_L: Row) -> AllocationProblem:
        """What rivals solve: the additive table under the same limit."""
        relaxed = self.lagrangian_plans(weight_bits_L, self.table)
        error_TLC = self.table.error_TLC.double().numpy()
        return AllocationProblem(error_TLC=error_TLC, cost_TLC=np.broadcast_to(relaxed.cost_TLC, error_TLC.shape), limit=relaxed.target)

    def bits_of(self, columns_TL) -> Rows:
        """A plan of columns as bits; 16 in cells that have none."""
        bits_TL = np.where(self.active_TL, np.asarray(self.table.act_bits_C)[np.asarray(columns_TL)], 16)
        return tuple(map(tuple, bits_TL.tolist()))

    def weights_within(self, max_bytes: int, error_LC=None, *, in_time: bool = True, share: float = 1.0) -> Row:
        """The best weights by the guide (or by `error_LC`) within the bytes, of which some plan keeps the budget's latency; they take at
        most `share` of what that leaves beyond the fastest weights."""
        error_LC, bits_C = self.planning_table.weight_error_LC if error_LC is None else error_LC, self.planning_table.weight_bits_C
        second_constraint = self.time_left if in_time else None
        if second_constraint is not None and share < 1 and (least := float(second_constraint[0].min(1).sum())) <= second_constraint[1]:
            second_constraint = second_constraint[0], least + share * (second_constraint[1] - least)
        found = allocate_weights(error_LC, self.costs, max_bytes, bits_C, second_constraint=second_constraint)
        if found is None:
            fastest = allocate_weights(second_constraint[0], self.costs, max_bytes, bits_C)
            least_ms = self.steps * (self.fastest_us(fastest) + fixed_us(self.costs)) / 1000
            raise BadInput(f"max_latency_ms is {self.budget.max_latency_ms:g}; the smallest feasible within {max_bytes / 1e6:.2f} MB is "
                           f"{math.ceil(100 * least_ms) / 100:g}")
        return self.pinned(found)

    @cached_property
    def time_left(self) -> tuple[np.ndarray, float] | None:
        """Microseconds of a step's layers at every weight width (L, C), activations at their fastest, and what the budget leaves for
        their sum; None where it sets no latency or none is known."""
        us_LC = fastest_us_LC(self.costs, self.planning_table.weight_bits_C, self.table.act_bits_C)
        if self.budget.max_latency_ms is None or us_LC is None:
            return None
        left_us = 1000 * self.budget.max_latency_ms / self.steps - fixed_us(self.costs)
        return us_LC, left_us - 1e-12 * abs(left_us)  # sums are rounded

    def fastest_us(self, weight_bits_L: Row) -> float:
        """Microseconds of a step's layers with activations at their fastest width."""
        return total(self.time_left[0], np.array([self.planning_table.weight_bits_C.index(bits) for bits in weight_bits_L]))

    def fast_enough(self, weight_bits_L: Row) -> bool:
        """Whether some plan on these weights keeps the budget's latency."""
        return self.time_left is None or self.fastest_us(weight_bits_L) <= self.time_left[1]

    @cached_property
    def uniform_bytes(self) -> dict[int, int]:
        return {bits: size for bits, size in uniform_weights(self.costs).items() if bits in self.table.weight_bits_C}

    @property
    def weight_candidates(self) -> list[Row]:
        """What the beam may run on, see `first_rows`."""
        return list(self.first_rows)

    @cached_property
    def first_rows(self) -> dict[Row, Rows]:
        """Weights that the beam may run on, each with the activation bits it is judged by: float, or as good as the time allows where
        that is limited. Of several that time alone limits, the two of least predicted error whose activations keep every limit."""
        allocated = self._allocated()
        if self.budget.max_latency_ms is None:
            return dict.fromkeys(allocated, self.rows_uniform(16))
        if self.budget.max_weight_bytes is not None:
            return {weights: self.lagrangian_plans(weights).rows() for weights in allocated}
        found = {}
        for weights in allocated:
            with suppress(BadInput):
                found[weights] = self.lagrangian_plans(weights).rows()
        if not found:
            self.lagrangian_plans(allocated[0])  # raises the reason
        best = sorted(found, key=lambda weights: self.predicted_error(weights, found[weights]))[:2]
        return {weights: found[weights] for weights in best}

    def _allocated(self) -> list[Row]:
        """The best allocation within the memory limit and the best uniform one; without a limit the typical uniform width, and where time
        is limited those that spend some or all of it on weights. Only weights that some plan keeps the budget's latency with."""
        limit, uniform_of = self.budget.max_weight_bytes, self.costs.uniform
        most = max(self.uniform_bytes.values()) if limit is None else limit
        uniform = [bits for bits, size in self.uniform_bytes.items() if size <= most and self.fast_enough(uniform_of(bits))]
        if limit is not None:
            return list(dict.fromkeys([self.weights_within(most), *[uniform_of(bits) for bits in uniform[-1:]]]))
        typical = [uniform_of(bits) for bits in sorted(uniform, key=lambda bits: (abs(bits - TYPICAL_WEIGHT_BITS), bits))[:1]]
        if self.time_left is None:
            return typical
        return list(dict.fromkeys([*typical, *(self.weights_within(most, share=share) for share in TIME_SHARES)]))

    def other_weights(self) -> dict[Row, list[Rows]]:
        """Allocations that span the range of memory, the best within the bytes of every uniform width, each with the plans of
        activation bits it is measured with: one that suits the width."""
        levels: dict[Row, list[Rows]] = {}
        beam_on, least = self.weight_candidates, min(self.table.act_bits_C)
        for width, size in self.uniform_bytes.items():
            weights = self.weights_within(size, in_time=False)
            if weights in levels or weights in beam_on:
                continue
            suited = self.rows_within(max(least, ACT_BITS_WITH[width]))
            # The smallest plan of all makes every feasible budget selectable.
            levels[weights] = [suited] if levels else [self.rows_uniform(least), suited]
        return levels

    def seed_plans(self, weight_bits_L: Row) -> list[Rows]:
        """Lagrangian plans from few bits to many, and the one at the target."""
        means = [mean for mean in SEED_ACT_BITS if mean >= min(self.table.act_bits_C) and abs(mean - self.target_bits) > 0.2]
        plans = [self.rows_within(mean) for mean in means]
        return list(dict.fromkeys(sorted([*plans, self.lagrangian_plans(weight_bits_L).rows()], key=lambda rows: sum(map(sum, rows)))))

    def configurations(self, relaxed: LagrangianPlans, step: int, spent: float) -> list[Row]:
        """The rows that extend a path, from low to high: the next row of the Lagrangian plans that would end at, below and above
        the target, given what the path has spent."""
        least, most = relaxed.span
        totals = np.clip(np.linspace(LOW, HIGH, self.config.configs - 1) * relaxed.target, least, most)
        wanted = sorted({float(relaxed.target), *totals.tolist()})
        return list(dict.fromkeys(relaxed.hull.row_after(step, total - spent) for total in wanted))

    def predicted_error(self, weight_bits_L: Row, act_bits_TL: Rows, table: DistortionTable | None = None) -> float:
        """A table's sum over weights and over all (step, layer); by default the guide's."""
        return predict(table or self.planning_table, weight_bits_L, act_bits_TL)

    def scaled(self, act_TLC: np.ndarray, weight_L: np.ndarray) -> DistortionTable:
        """The planning table with its errors multiplied."""
        return replace(self.planning_table, error_TLC=self.planning_table.error_TLC.double() * torch.as_tensor(act_TLC),
                       weight_error_LC=self.planning_table.weight_error_LC.double() * torch.as_tensor(weight_L)[:, None])

    def fingerprint(self) -> str:
        """Of everything a measurement depends on. The budget and the beam's width are not among it: what one search has measured
        serves another. The tables stand for the calibration prompts, which a search does not see."""
        parts = (self.model_hash, self.costs.generation, self.sigma_T, [layer.name for layer in self.layers], self.quant,
                 self.config.scoring, self.config.samples, self.config.seed, self.table.act_bits_C, self.table.weight_bits_C, self.prompts)
        digest = hashlib.sha256(repr(parts).encode())
        for tensor in (self.table.error_TLC, self.table.weight_error_LC):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
