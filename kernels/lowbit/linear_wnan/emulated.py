"""The emulated backend: a dequantized weight kept between calls, and a float product.

It shows what a plan does to the numbers, not what it saves in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.act_quant.emulated import fake_quantize
from lowbit.linear_wnan.naive import dequantize


def linear_wnan(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int,
                group_size: int | None, k_in: int, act_bits: int, bias: Tensor | None, scratch: dict) -> Tensor:
    """Same as `naive.linear_wnan` up to the order of summation. `scratch` keeps what is derived from the weight:
    the caller owns it, and empties it when it wants the memory back or the weight changes."""
    kept = scratch.get(x.dtype)
    if kept is None:
        w_NK = dequantize(packed_NP, scale_NG, zero_NG, bits, group_size, k_in).to(x.dtype)
        kept = scratch[x.dtype] = (w_NK, None if bias is None else bias.to(x.dtype))
    return torch.nn.functional.linear(fake_quantize(x, act_bits), *kept)
