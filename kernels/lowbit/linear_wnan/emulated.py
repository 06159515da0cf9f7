"""The emulated backend: a dequantized weight kept between calls, and a float product.

It shows what a plan does to the numbers, not what it saves in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.act_quant.emulated import fake_quantize
from lowbit.linear_wnan.naive import dequantize
from lowbit.tensor_cache import identity, memory


def linear_wnan(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int,
                group_size: int | None, k_in: int, act_bits: int, bias: Tensor | None, scratch: dict) -> Tensor:
    """Same as `naive.linear_wnan` up to the order of summation. `scratch` keeps the dequantized weight, with what it was made of:
    the caller owns it, and empties it when it wants the memory back."""
    stored = packed_NP, scale_NG, zero_NG
    asked, kept = identity(*stored), scratch.get(x.dtype)
    if kept is None or kept[1] != asked:
        w_NK = dequantize(*stored, bits, group_size, k_in).to(x.dtype)
        kept = scratch[x.dtype] = (w_NK, asked, memory(*stored))
    return torch.nn.functional.linear(fake_quantize(x, act_bits), kept[0], None if bias is None else bias.to(x.dtype))
