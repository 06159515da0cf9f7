"""What every choice costs. Bytes are exact; bit operations are modelled (multiply-accumulates x weight bits x activation bits);
milliseconds come from `latency.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.models import Bundle
from workbench.options import WEIGHT_BITS, QuantConfig
from workbench.plans import BitChoice, CostTable, LatencyTable, usual_bits
from workbench.quant import sizes
from workbench.types import LayerInfo


def tabulate(bundle: Bundle, quant: QuantConfig, steps: int = 0, group_size_L: Sequence[int | None] | None = None,
             latency: LatencyTable | None = None) -> CostTable:
    """Bytes of each layer at every weight width, and of all that no plan chooses: what siblings share, the modulation's outputs at `steps`
    steps where they are cached, the rest in 16 bits. `group_size_L`: where layers have their own."""
    layers, ranks = bundle.layers, sizes.ranks(bundle.layers, quant)
    sizes_L = group_size_L or [quant.group_size] * len(layers)
    rows = [[sizes.layer_bytes(layer, sized(BitChoice.of(bits, quant, layer), layer, size), quant, ranks[layer.name])
             for bits in WEIGHT_BITS] for layer, size in zip(layers, sizes_L)]
    in_float = sum(2 * layer.n_out * (layer.k_in + layer.has_bias) for layer in layers)
    fixed_bytes = bundle.float_bytes - in_float + sizes.shared_bytes(layers, quant) + sizes.cached_bytes(layers, quant, steps)
    return CostTable(weight_bits_C=WEIGHT_BITS, weight_bytes_LC=torch.tensor(rows, dtype=torch.int64), fixed_bytes=fixed_bytes,
                     macs_L=torch.tensor([layer.macs_per_step for layer in layers], dtype=torch.int64), latency=latency,
                     usual_bits_L=tuple(None if layer.has_act_bits else usual_bits(quant) for layer in layers),
                     generation=bundle.generation)


def sized(choice: BitChoice, layer: LayerInfo, group_size: int | None) -> BitChoice:
    """The choice with another group size; modulation keeps its own."""
    return choice.model_copy(update={"group_size": group_size}) if layer.has_act_bits else choice


def layer_parameters(bundle: Bundle) -> int:
    """Parameters of the layers with activation bits, biases included."""
    return sum(layer.n_out * (layer.k_in + layer.has_bias) for layer in bundle.layers if layer.has_act_bits)


def outside_bytes(bundle: Bundle, quant: QuantConfig, steps: int) -> int:
    """Bytes of everything but the layers with activation bits, the modulation at its usual width: what is left when their codes, scales,
    branches and vectors are taken away."""
    table = tabulate(bundle, quant, steps)
    column = table.weight_bits_C.index(usual_bits(quant))
    modulation = [layer.index for layer in bundle.layers if not layer.has_act_bits]
    return table.fixed_bytes - sizes.shared_bytes(bundle.layers, quant) + int(table.weight_bytes_LC[modulation, column].sum())


def effective_bits(weight_bytes: int, parameters: int) -> float:
    """8 x bytes / parameters: what a label such as W4 really costs."""
    return 8 * weight_bytes / parameters
