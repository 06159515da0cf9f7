"""Reference: symmetric, dynamic, per-token quantization of activations.

Dimension letters: M tokens, K features.

    scale = max|x| / (2^(b-1) - 1),   q = clamp(round(x / scale)),   x ~ q * scale

Codes are symmetric, so b bits use 2^b - 1 of their 2^b values; an all-zero token has scale 0 and stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACT_BITS = (3, 4, 6, 8)


def largest_code(bits: int) -> int:
    """2^(b-1) - 1."""
    if bits not in ACT_BITS:
        raise ValueError(f"{bits}-bit activations are not supported; use one of {(*ACT_BITS, 16)}")
    return (1 << bits - 1) - 1


def quantize_per_token(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(q_MK int8, scale_M1 float32)."""
    top = largest_code(bits)
    absmax_M1 = x_MK.float().abs().amax(-1, keepdim=True)
    # a subnormal absmax would overflow the reciprocal; such a token is zero to every later operation
    inverse_M1 = torch.where(absmax_M1 > torch.finfo(torch.float32).tiny * top, top / absmax_M1, 0.0)
    q_MK = (x_MK.float() * inverse_M1).round().clamp(-top, top)
    return q_MK.to(torch.int8), absmax_M1 / top


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """What the quantized activation stands for, in x's own type; 16 bits return x itself."""
    if bits == 16:
        return x
    q, scale = quantize_per_token(x, bits)
    return (q * scale).to(x.dtype)
