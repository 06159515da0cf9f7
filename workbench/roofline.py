"""Time as the published peak rates of a chip allow it: a model, which is always labelled so.

Dimension letters: L layers, W weight widths, A activation widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.models import Bundle
from workbench.options import ACT_BITS, WEIGHT_BITS, QuantConfig
from workbench.plans import BitChoice, LatencyTable
from workbench.quant import grids
from workbench.types import LayerInfo


@dataclass(frozen=True)
class Chip:
    """Published dense peak rates, in 10^12 operations a second by operand width, and memory bandwidth in 10^9 bytes a second."""

    label: str
    tera_ops: dict[int, float]  # operand bits -> rate; 16 is BF16 with float32 accumulation
    bandwidth: float
    source: str


CHIPS = {
    "a100": Chip("NVIDIA A100 80 GB SXM, INT4", {16: 312, 8: 624, 4: 1248}, 2039, "NVIDIA A100 Tensor Core GPU Architecture, 2020"),
    "h100": Chip("NVIDIA H100 SXM, INT8", {16: 989, 8: 1979}, 3350, "NVIDIA H100 Tensor Core GPU Architecture, 2022"),
    "rtx4090": Chip("NVIDIA RTX 4090, INT4", {16: 165, 8: 661, 4: 1321}, 1008, "NVIDIA Ada GPU Architecture, 2022"),
    "rtx5090": Chip("NVIDIA RTX 5090, FP4", {16: 210, 8: 838, 4: 1676}, 1792, "NVIDIA RTX Blackwell GPU Architecture, 2025"),
    "b200": Chip("NVIDIA B200, FP4", {16: 2250, 8: 4500, 4: 9000}, 8000, "NVIDIA Blackwell Architecture Technical Brief, 2024"),
}


def model(bundle: Bundle, quant: QuantConfig, target: str) -> LatencyTable:
    """Roofline of a chip: a layer takes the longer of its arithmetic at peak and its traffic at full bandwidth.

    The operands' width is that of the wider of weight and activation; the rest of a step is charged for 16-bit modulation and
    embedders alone, because attention and norms depend on kernels that a peak rate says nothing about."""
    chip = CHIPS[target]
    us_LWA = torch.tensor([[[_roofline_us(chip, layer, weight_bits, act_bits, quant) for act_bits in ACT_BITS]
                            for weight_bits in WEIGHT_BITS] for layer in bundle.layers], dtype=torch.float64)
    other_bytes = bundle.float_bytes - sum(2 * layer.n_out * layer.k_in for layer in bundle.layers if layer.has_act_bits)
    return LatencyTable(target=f"{chip.label} (modelled)", measured=False, provenance=f"peak rates: {chip.source}",
                        weight_bits_W=WEIGHT_BITS, act_bits_A=ACT_BITS, us_LWA=us_LWA, fixed_us=other_bytes / chip.bandwidth / 1e3)


def _roofline_us(chip: Chip, layer: LayerInfo, weight_bits: int, act_bits: int, quant: QuantConfig) -> float:
    if not layer.has_act_bits:  # in what a step takes beyond its layers
        return 0.0
    width = max(weight_bits, act_bits)
    rate = chip.tera_ops[min(bits for bits in chip.tera_ops if bits >= width)]
    choice = BitChoice.of(weight_bits, quant, layer)
    held_bits = 16 if act_bits == 16 else 8 if act_bits > 4 else 4
    traffic_bytes = (grids.predicted_bytes(layer.n_out, layer.k_in, choice, layer.has_bias)
                     + layer.tokens * (layer.k_in * held_bits / 8 + layer.n_out * 2))
    return max(2 * layer.macs_per_step / rate / 1e6, traffic_bytes / chip.bandwidth / 1e3)
