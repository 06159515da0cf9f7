"""The operations by their one name each. Callers import these and never a backend.

A backend that could be faster but does not run says why, and the screen shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.act_quant.emulated import fake_quantize
from lowbit.hadamard.emulated import block_hadamard
from lowbit.linear_wnan import emulated

__all__ = ["backend", "block_hadamard", "fake_quantize", "linear_wnan"]


def backend(device: str | torch.device = "cpu", weight_bits: int = 4, act_bits: int = 4) -> tuple[str, str]:
    """(name, reason) of what `linear_wnan` runs for such a layer."""
    return "emulated", "dequantized weights, float product"


@torch.no_grad()
def linear_wnan(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int,
                group_size: int | None, k_in: int, act_bits: int, bias: Tensor | None,
                scratch: dict | None = None) -> Tensor:
    """y = Q_a(x) W^T + b. Without gradient: rounding has none that is useful.

    `scratch`, if given, is a dict in which a backend may keep what it derives from the weight between calls."""
    return emulated.linear_wnan(x, packed_NP, scale_NG, zero_NG, bits, group_size, k_in, act_bits, bias,
                                {} if scratch is None else scratch)
