"""Reference: y = Q_a(x) W^T + b with a packed weight W and per-token quantized x.

Dimension letters: N out features, K in features, G groups along K, P packed bytes along K.

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),   g = k // group_size

A symmetric weight stores no zero points: its zero is 2^(b-1), so its integers are -2^(b-1) ... 2^(b-1) - 1.
Scales are float16 and used exactly as stored. The last group of a row may be shorter than the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.act_quant.naive import fake_quantize
from lowbit.formats import unpack


def dequantize(packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int | None,
               k_in: int) -> Tensor:
    """w_NK float32."""
    codes_NK = unpack(packed_NP, bits, k_in).float()
    width = group_size or k_in
    groups = -(-k_in // width)
    if scale_NG.shape != (len(codes_NK), groups):
        raise ValueError(f"scales are {tuple(scale_NG.shape)}; {len(codes_NK)} rows of {groups} groups need "
                         f"{(len(codes_NK), groups)}")
    zero_NG = torch.full_like(scale_NG, 1 << bits - 1) if zero_NG is None else zero_NG
    scale_NK = scale_NG.float().repeat_interleave(width, 1)[:, :k_in]
    zero_NK = zero_NG.float().repeat_interleave(width, 1)[:, :k_in]
    return (codes_NK - zero_NK) * scale_NK


def linear_wnan(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int,
                group_size: int | None, k_in: int, act_bits: int, bias: Tensor | None) -> Tensor:
    """The product in float32, returned in x's type."""
    w_NK = dequantize(packed_NP, scale_NG, zero_NG, bits, group_size, k_in)
    y = fake_quantize(x, act_bits).float() @ w_NK.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
