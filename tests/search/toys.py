"""Evaluators small enough to enumerate, and the tables that belong to them.

Letters as in `workbench/types.py`: T steps, L layers, C choices.
"""

import hashlib
import json
import math
from itertools import product

import torch

from workbench.options import Budget, QuantConfig, SearchConfig
from workbench.plans import CostTable
from workbench.search.search import search
from workbench.types import DistortionTable, LayerInfo

ACT_BITS = (3, 4, 8, 16)
WEIGHT_BITS = (2, 4, 8, 16)


def make_table(seed: int, steps: int = 4, layers: int = 3, act_bits=ACT_BITS, weight_bits=WEIGHT_BITS) -> DistortionTable:
    """Errors that fall with the bits at very different scales per step and layer, with some noise; float is 0."""
    generator = torch.Generator().manual_seed(seed)

    def errors(bits, *shape):
        scale = torch.exp(1.5 * torch.randn(*shape, 1, generator=generator))
        fall = torch.tensor([0.0 if b == 16 else 4.0 ** -b for b in bits])
        return 100 * scale * fall * torch.exp(0.3 * torch.randn(*shape, len(bits), generator=generator))

    return DistortionTable(act_bits_C=act_bits, error_TLC=errors(act_bits, steps, layers),
                           weight_bits_C=weight_bits, weight_error_LC=errors(weight_bits, layers))


def make_costs(layers: int = 3, weight_bits=WEIGHT_BITS, fixed_bytes: int = 1000) -> CostTable:
    """Layers of different sizes; a width costs its bits and, below 16, scales."""
    sizes = [96 + 64 * (layer % 3) + 8 * layer for layer in range(layers)]
    rows = [[size * bits // 8 + (size // 32 * 2 if bits < 16 else 0) for bits in weight_bits] for size in sizes]
    return CostTable(weight_bits_C=weight_bits, weight_bytes_LC=torch.tensor(rows), fixed_bytes=fixed_bytes,
                     macs_L=torch.tensor(sizes))


def make_layers(layers: int) -> tuple[LayerInfo, ...]:
    return tuple(LayerInfo(index=i, name=f"layer.{i}", block="block", role="role", n_out=8, k_in=8 + i, tokens=4, has_bias=False,
                           same_input=i, fused_with=i) for i in range(layers))


class TableEvaluator:
    """The table is the truth: a state is (weights, rows so far), its score the error of those rows."""

    def __init__(self, table: DistortionTable, samples: int = 4):
        self.table, self.samples, self.weights, self.calls = table, samples, None, 0

    def use_weights(self, weight_bits_L):
        self.weights = tuple(weight_bits_L)

    def start(self):
        return self.weights, ()

    def at(self, step):
        return self.weights, ((16,) * self.table.error_TLC.shape[1],) * step

    def extend(self, state, step, act_bits_L):
        assert len(state[1]) == step and state[0] == self.weights
        self.calls += 1
        return state[0], (*state[1], tuple(act_bits_L))

    def row_error(self, step, row):
        return sum(float(self.table.error_TLC[step, i, self.table.act_bits_C.index(bits)]) for i, bits in enumerate(row))

    def score(self, state, step):
        return sum(self.row_error(t, row) for t, row in enumerate(state[1]))

    def error(self, state):
        weight = sum(float(self.table.weight_error_LC[i, self.table.weight_bits_C.index(bits)]) for i, bits in enumerate(state[0]))
        return weight + self.score(state, None)

    def change(self, before, after):
        step = len(before[1])
        return 1.0 / (1 + step) if len(after[1]) == step + 1 else math.nan

    def save(self, state):
        return json.dumps(state).encode()

    def load(self, blob):
        weights, rows = json.loads(blob)
        return tuple(weights), tuple(tuple(row) for row in rows)


class EntangledEvaluator(TableEvaluator):
    """Errors multiply by a factor that depends on the whole path: nothing about it is additive, nothing is random."""

    def score(self, state, step):
        return super().score(state, step) * _factor(state)

    def error(self, state):
        return super().error(state)  # its score is entangled already


def _factor(state) -> float:
    digest = hashlib.sha256(repr(state[1]).encode()).digest()
    return math.exp(digest[0] / 128 - 1)


def run(table, evaluator, *, budget=None, resume=None, checkpoint=None, on_progress=lambda progress: None, **config):
    """A search over the toy."""
    steps, layers, _ = table.error_TLC.shape
    return search(layers=make_layers(layers), sigma_T=[1 - t / steps for t in range(steps)], table=table,
                  costs=make_costs(layers, table.weight_bits_C), quant=QuantConfig(), model_hash="a toy model",
                  budget=budget or Budget(max_weight_bytes=1300, max_mean_act_bits=5.0),
                  config=SearchConfig(**config), evaluator=evaluator, resume=resume, checkpoint=checkpoint, on_progress=on_progress)


def all_rows(act_bits, layers):
    """Every row of activation bits there is."""
    return list(product(act_bits, repeat=layers))


def answer(result) -> tuple:
    """All of a result that must not depend on the clock."""
    events = [(e.step, e.candidates, e.survivors, e.evaluations, e.front, e.message) for e in result.events]
    return result.front, result.references, result.chosen, result.evaluations, events
