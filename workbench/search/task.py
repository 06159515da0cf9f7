"""What a search is asked, and every allocation that follows from the tables alone.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from workbench.options import BadInput, Budget, QuantConfig, SearchConfig
from workbench.plans import CostTable
from workbench.search.knapsack import allocate_weights
from workbench.search.lagrangian import ActHull, activation_hull, largest_sum
from workbench.search.ledger import Path, Row
from workbench.search.rivals import uniform_rows, uniform_weights
from workbench.types import DistortionTable, LayerInfo

Rows = tuple[Row, ...]  # activation bits (T, L)

RUNGS = (3.1, 3.3, 3.6, 4.0, 4.5, 5.0, 5.7, 6.5, 8.0)  # mean activation bits of the Lagrangian plans that seed the beam
LOW, HIGH = 0.85, 1.4  # the beam's configurations steer towards means from LOW to HIGH times the target
TYPICAL_ACT_BITS = 4.0  # the target where no mean of activation bits is set
TYPICAL_WEIGHT_BITS = 4  # what the beam runs on where no memory limit is set
COMPANION_BITS = {2: 3.3, 3: 3.3, 4: 4.0, 6: 6.0, 8: 8.0, 16: 8.0}  # mean activation bits that suit weights of a width


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, and the allocations that follow from the tables alone."""

    layers: tuple[LayerInfo, ...]
    sigma_T: tuple[float, ...]
    table: DistortionTable
    costs: CostTable
    quant: QuantConfig
    model_hash: str
    budget: Budget
    config: SearchConfig

    @property
    def steps(self) -> int:
        return len(self.sigma_T)

    @cached_property
    def hull(self) -> ActHull:
        return activation_hull(self.table)

    @property
    def target_bits(self) -> float:
        """The mean of activation bits that matters most."""
        return self.budget.max_mean_act_bits or max(TYPICAL_ACT_BITS, min(self.table.act_bits_C))

    def check(self) -> None:
        expected = (self.steps, len(self.layers), len(self.table.act_bits_C))
        if tuple(self.table.error_TLC.shape) != expected:
            raise BadInput(f"the distortion table is {tuple(self.table.error_TLC.shape)}; steps, layers and choices are {expected}")
        limit, least = self.budget.max_mean_act_bits, min(self.table.act_bits_C)
        if limit is not None and limit < least:
            raise BadInput(f"max_mean_act_bits is {limit:g}; the smallest feasible is {least}")
        if self.budget.max_weight_bytes is not None:
            self.weights_within(self.budget.max_weight_bytes)

    def rows_within(self, mean_bits: float) -> Rows:
        """The Lagrangian plan of activation bits with at most this mean."""
        return self.hull.rows_within(largest_sum(mean_bits, self.steps * len(self.layers)))

    def rows_uniform(self, act_bits: int) -> Rows:
        return uniform_rows(act_bits, self.steps, len(self.layers))

    def weights_within(self, max_bytes: int) -> Row:
        return allocate_weights(self.table.weight_error_LC, self.costs, max_bytes, self.table.weight_bits_C)

    @cached_property
    def uniform_bytes(self) -> dict[int, int]:
        return {bits: size for bits, size in uniform_weights(self.costs).items() if bits in self.table.weight_bits_C}

    def weight_candidates(self) -> list[Row]:
        """What the beam may run on: the best allocation within the memory limit and the best uniform one; without a limit
        the typical uniform width."""
        limit, layers = self.budget.max_weight_bytes, len(self.layers)
        if limit is None:
            nearest = min(self.uniform_bytes, key=lambda bits: (abs(bits - TYPICAL_WEIGHT_BITS), bits))
            return [(nearest,) * layers]
        uniform = [(bits,) * layers for bits, size in self.uniform_bytes.items() if size <= limit]
        return list(dict.fromkeys([self.weights_within(limit), *uniform[-1:]]))

    def other_weights(self) -> dict[Row, list[Rows]]:
        """Allocations that span the range of memory, the best within the bytes of every uniform width, each with the plans of
        activation bits it is measured with: one that suits the width, and the target."""
        levels: dict[Row, list[Rows]] = {}
        beam_on, least = self.weight_candidates(), min(self.table.act_bits_C)
        for width, size in self.uniform_bytes.items():
            weights = self.weights_within(size)
            if weights in levels or weights in beam_on:
                continue
            suited = self.rows_within(max(least, COMPANION_BITS[width]))
            # The smallest plan of all makes every feasible budget selectable; float weights gain nothing at few bits.
            first = suited if levels else self.rows_uniform(least)
            at_few = width == 16 and self.target_bits < COMPANION_BITS[16]
            levels[weights] = list(dict.fromkeys([first] if at_few else [first, self.rows_within(self.target_bits)]))
        return levels

    def rungs(self) -> list[Rows]:
        """Lagrangian plans from few bits to many, one of them at the target."""
        means = [mean for mean in RUNGS if mean >= min(self.table.act_bits_C) and abs(mean - self.target_bits) > 0.2]
        return list(dict.fromkeys(self.rows_within(mean) for mean in sorted([*means, self.target_bits])))

    def configurations(self, path: Path) -> list[Row]:
        """The rows that extend a path, from low to high: the next row of the Lagrangian plans that would end at, below and above
        the target, given what the path has spent."""
        cells = self.steps * len(self.layers)
        least, most = min(self.table.act_bits_C), max(self.table.act_bits_C)
        means = np.clip(np.linspace(LOW, HIGH, self.config.configs - 1) * self.target_bits, least, most)
        totals = [largest_sum(mean, cells) for mean in sorted({float(self.target_bits), *means.tolist()})]
        return list(dict.fromkeys(self.hull.row_after(path.step, total - path.bits) for total in totals))

    def predicted_error(self, weight_bits_L: Row, act_bits_TL: Rows) -> float:
        """The table's sum over weights and over all (step, layer)."""
        act_TL = torch.tensor([[self.table.act_bits_C.index(bits) for bits in row] for row in act_bits_TL])
        weight_L = torch.tensor([self.table.weight_bits_C.index(bits) for bits in weight_bits_L])
        return float(self.table.error_TLC.double().gather(2, act_TL[..., None]).sum()
                     + self.table.weight_error_LC.double().gather(1, weight_L[:, None]).sum())

    def fingerprint(self) -> str:
        """Of everything a measurement depends on. The budget and the beam's width are not among it: what one search has measured
        serves another. The tables stand for the calibration prompts, which a search does not see."""
        parts = (self.model_hash, self.sigma_T, [layer.name for layer in self.layers], self.quant, self.config.scoring,
                 self.config.samples, self.config.seed, self.table.act_bits_C, self.table.weight_bits_C)
        digest = hashlib.sha256(repr(parts).encode())
        for tensor in (self.table.error_TLC, self.table.weight_error_LC):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
