"""What every choice costs. Bytes are exact; bit operations are modelled (multiply-accumulates x weight bits x activation bits);
milliseconds come from `latency.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.models import Bundle
from workbench.options import WEIGHT_BITS, QuantConfig
from workbench.plans import CostTable, LatencyTable
from workbench.quant import sizes
from workbench.quant.sizes import choice_of

__all__ = ["choice_of", "effective_bits", "layer_parameters", "outside_bytes", "tabulate"]


def tabulate(bundle: Bundle, quant: QuantConfig, steps: int = 0, group_size_L: Sequence[int | None] | None = None,
             latency: LatencyTable | None = None) -> CostTable:
    """Bytes of each layer at every weight width, and of all that no plan chooses: what layers share, modulation at its own width
    (or its outputs at `steps` steps, where they are cached), the rest in 16 bits. `group_size_L`: where layers have their own."""
    sizes_L, ranks = group_size_L or [quant.group_size] * len(bundle.layers), sizes.ranks(bundle.layers, quant)
    rows = [[sizes.layer_bytes(layer, choice_of(bits, quant).model_copy(update={"group_size": size}), quant, ranks[layer.name])
             for bits in WEIGHT_BITS] for layer, size in zip(bundle.layers, sizes_L)]
    in_float = sum(2 * layer.n_out * (layer.k_in + layer.has_bias) for layer in (*bundle.layers, *bundle.modulation))
    fixed_bytes = (bundle.float_bytes - in_float + sizes.shared_bytes(bundle.layers, quant)
                   + sizes.modulation_bytes(bundle.modulation, quant, steps))
    return CostTable(weight_bits_C=WEIGHT_BITS, weight_bytes_LC=torch.tensor(rows, dtype=torch.int64), fixed_bytes=fixed_bytes,
                     macs_L=torch.tensor([layer.macs_per_step for layer in bundle.layers], dtype=torch.int64), latency=latency)


def layer_parameters(bundle: Bundle) -> int:
    """Parameters of the quantizable layers, biases included."""
    return sum(layer.n_out * (layer.k_in + layer.has_bias) for layer in bundle.layers)


def outside_bytes(bundle: Bundle, quant: QuantConfig, steps: int) -> int:
    """Bytes of everything but the quantizable layers: what is left when their codes, scales, branches and vectors are taken away."""
    return tabulate(bundle, quant, steps).fixed_bytes - sizes.shared_bytes(bundle.layers, quant)


def effective_bits(weight_bytes: int, parameters: int) -> float:
    """8 x bytes / parameters: what a label such as W4 really costs."""
    return 8 * weight_bytes / parameters
