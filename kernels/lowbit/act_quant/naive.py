"""Reference: symmetric, dynamic quantization of activations, per token or per token and group.

Dimension letters: M tokens, K features, G groups along K.

    scale = max|x| / (2^(b-1) - 1),   q = clamp(round(x / scale)),   x ~ q * scale

Codes are symmetric, so b bits use 2^b - 1 of their 2^b values; an all-zero token has scale 0 and stays zero.
Before that the input may be multiplied by a vector (smoothing, random signs, or both in one) and rotated by a block Hadamard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.hadamard.naive import block_hadamard

ACT_BITS = (3, 4, 5, 6, 7, 8)


def largest_code(bits: int) -> int:
    """2^(b-1) - 1."""
    if bits not in ACT_BITS:
        raise ValueError(f"{bits}-bit activations are not supported; use one of {(*ACT_BITS, 16)}")
    return (1 << bits - 1) - 1


def quantize_per_token(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(q_MK int8, scale_M1 float32)."""
    top = largest_code(bits)
    absmax_M1 = x_MK.float().abs().amax(-1, keepdim=True)
    # a subnormal absmax would overflow the quotient; such a token is zero to every later operation. Python's `top / tensor` would
    # round twice: it multiplies with a reciprocal
    inverse_M1 = torch.where(absmax_M1 > torch.finfo(torch.float32).tiny * top, torch.full_like(absmax_M1, top) / absmax_M1, 0.0)
    q_MK = (x_MK.float() * inverse_M1).round().clamp(-top, top)
    return q_MK.to(torch.int8), absmax_M1 / top


def act_quant(x: Tensor, factor_K: Tensor | None, block: int, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(q int8 of x's shape, scale float32 with G in place of K): x * factor, rotated in blocks, then quantized.

    `factor_K` None stands for ones and `block` 1 for no rotation; `group_size` 0 is one scale per token, else it must divide K.
    The arithmetic before rounding is float32."""
    wide = x.float()
    if factor_K is not None or block > 1:
        wide = block_hadamard(wide, block, torch.ones(x.shape[-1], device=x.device) if factor_K is None else factor_K.float())
    width = group_size or x.shape[-1]
    if width and x.shape[-1] % width:
        raise ValueError(f"{x.shape[-1]} features are not a multiple of the group size {width}")
    if not wide.numel():
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), wide.new_zeros(*x.shape[:-1], x.shape[-1] // width if width else 1)
    q, scale = quantize_per_token(wide.unflatten(-1, (-1, width)), bits)
    return q.flatten(-2), scale[..., 0]


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """What the quantized activation stands for, in x's own type; 16 bits return x itself."""
    if bits == 16:
        return x
    q, scale = quantize_per_token(x, bits)
    return (q * scale).to(x.dtype)
