"""What every choice costs. Bytes are exact; bit operations are modelled (multiply-accumulates x weight bits x activation bits);
milliseconds come from `latency.py`."""

from __future__ import annotations

import torch

from workbench.families import Bundle
from workbench.options import WEIGHT_BITS, QuantConfig
from workbench.plans import BitChoice, CostTable, LatencyTable
from workbench.quant.quantize import predicted_bytes


def tabulate(bundle: Bundle, quant: QuantConfig, latency: LatencyTable | None = None) -> CostTable:
    """Bytes of each layer at every weight width, and of all that no plan chooses: modulation at its own width, the rest in 16 bits."""
    rows = [[predicted_bytes(layer.n_out, layer.k_in, choice_of(bits, quant), layer.has_bias) for bits in WEIGHT_BITS]
            for layer in bundle.layers]
    chosen = sum(predicted_bytes(layer.n_out, layer.k_in, choice_of(16, quant), layer.has_bias)
                 for layer in (*bundle.layers, *bundle.modulation))
    modulation = sum(predicted_bytes(layer.n_out, layer.k_in, choice_of(quant.modulation_bits, quant, modulation=True), layer.has_bias)
                     for layer in bundle.modulation)
    return CostTable(weight_bits_C=WEIGHT_BITS, weight_bytes_LC=torch.tensor(rows, dtype=torch.int64),
                     fixed_bytes=bundle.float_bytes - chosen + modulation,
                     macs_L=torch.tensor([layer.macs_per_step for layer in bundle.layers], dtype=torch.int64), latency=latency)


def choice_of(bits: int, quant: QuantConfig, *, modulation: bool = False) -> BitChoice:
    """The storage a width stands for. Modulation linears always share a scale over 64 weights."""
    return BitChoice(weight_bits=bits, group_size=64 if modulation else quant.group_size)


def effective_bits(weight_bytes: int, parameters: int) -> float:
    """8 x bytes / parameters: what a label such as W4 really costs."""
    return 8 * weight_bytes / parameters
