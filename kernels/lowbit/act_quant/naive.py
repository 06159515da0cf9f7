"""Reference: dynamic quantization of activations, per token or per token and group, on a grid that is symmetric around zero.

Dimension letters: M tokens, K features, G groups along K.

    span = c max|x|                                the clip ratio c
    mid-tread   scale = span / (2^(b-1) - 1),      q = clamp(round(x / scale))          2^b - 1 levels, one of them zero
    mid-rise    scale = span / 2^b,                q = clamp(2 floor(x / 2 scale) + 1)  2^b levels at odd multiples of half a step

and x ~ q * scale in both. Mid-rise codes are the odd integers up to 2^b - 1, so they are as much an int8 to a product as any others
(through 7 bits; 8 bits have no room for them and stay mid-tread), and 3 bits have eight levels instead of seven. At 3 bits a mid-rise
grid spans 0.9 c max|x|: that is part of the format, as what is stored was solved and measured with it. A token that is all zero has
scale 0 and stays zero.
Before that the input may be multiplied by a vector (smoothing, random signs, or both in one) and rotated by a block Hadamard.

Codes are held as int8 or, where a GPU's FP8 units are to multiply them, as FP8 (e4m3), which has every integer up to 16: the same codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.hadamard.naive import block_hadamard

ACT_BITS = (3, 4, 5, 6, 7, 8)
MID_RISE_BITS = tuple(bits for bits in ACT_BITS if bits < 8)  # whose codes an int8 holds
FP8_BITS = tuple(bits for bits in ACT_BITS if bits <= 4)  # whose codes e4m3 holds exactly
MID_RISE_SHARE = {3: 0.9}  # of the span: eight levels over all of it leave the outer ones nearly empty; 1 at other widths


class Grid(NamedTuple):
    """cells: steps from zero to the end of the grid, divisor: scale = span / divisor, top: largest code, share: of max|x|, the span."""

    mid_rise: bool
    cells: int
    divisor: int
    top: int
    share: float


def grid_of(bits: int, clip: float, mid_rise: bool) -> Grid:
    """The grid of that many bits. Raises ValueError for widths that do not exist."""
    if bits not in ACT_BITS:
        raise ValueError(f"{bits}-bit activations are not supported; use one of {(*ACT_BITS, 16)}")
    half = 1 << bits - 1
    if mid_rise and bits in MID_RISE_BITS:
        return Grid(True, half, 2 * half, 2 * half - 1, clip * MID_RISE_SHARE.get(bits, 1.0))
    return Grid(False, half - 1, half - 1, half - 1, clip)


def quantize_per_token(x_MK: Tensor, bits: int, clip: float = 1.0, mid_rise: bool = False) -> tuple[Tensor, Tensor]:
    """(q_MK int8, scale_M1 float32)."""
    grid = grid_of(bits, clip, mid_rise)
    span_M1 = x_MK.float().abs().amax(-1, keepdim=True) * grid.share
    # a subnormal span would overflow the quotient; such a token is next to nothing to every later operation. Python's `cells / tensor`
    # would round twice: it multiplies with a reciprocal
    inverse_M1 = torch.where(span_M1 > torch.finfo(torch.float32).tiny * grid.cells, torch.full_like(span_M1, grid.cells) / span_M1, 0.0)
    x_MK = x_MK.float() * inverse_M1
    q_MK = 2 * x_MK.floor() + 1 if grid.mid_rise else x_MK.round()
    return q_MK.clamp(-grid.top, grid.top).to(torch.int8), span_M1 / grid.divisor


def held_as(bits: int, fp8: bool) -> torch.dtype:
    """The type that codes are held in. Raises ValueError where FP8 would round them."""
    if fp8 and bits not in FP8_BITS:
        raise ValueError(f"FP8 does not hold the codes of {bits}-bit activations; it does at {FP8_BITS}")
    return torch.float8_e4m3fn if fp8 else torch.int8


def act_quant(x: Tensor, factor_K: Tensor | None, block: int, bits: int, group_size: int, clip: float = 1.0, mid_rise: bool = False,
              fp8: bool = False) -> tuple[Tensor, Tensor]:
    """(q of x's shape, int8 or float8_e4m3fn, scale float32 with G in place of K): x * factor, rotated in blocks, then quantized.

    `factor_K` None stands for ones and `block` 1 for no rotation; `group_size` 0 is one scale per token, else it must divide K.
    The arithmetic before rounding is float32. Raises ValueError for groups that do not divide K and for codes that FP8 would round."""
    wide, held = x.float(), held_as(bits, fp8)
    if factor_K is not None or block > 1:
        wide = block_hadamard(wide, block, torch.ones(x.shape[-1], device=x.device) if factor_K is None else factor_K.float())
    width = group_size or x.shape[-1]
    if width and x.shape[-1] % width:
        raise ValueError(f"{x.shape[-1]} features are not a multiple of the group size {width}")
    if not wide.numel():
        return torch.empty(x.shape, dtype=held, device=x.device), wide.new_zeros(*x.shape[:-1], x.shape[-1] // width if width else 1)
    q, scale = quantize_per_token(wide.unflatten(-1, (-1, width)), bits, clip, mid_rise)
    return q.flatten(-2).to(held), scale[..., 0]


def fake_quantize(x: Tensor, bits: int, clip: float = 1.0, mid_rise: bool = False) -> Tensor:
    """What the quantized activation stands for, in x's own type; 16 bits return x itself."""
    if bits == 16:
        return x
    q, scale = quantize_per_token(x, bits, clip, mid_rise)
    return (q * scale).to(x.dtype)
