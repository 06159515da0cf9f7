"""Dynamic activation quantization as a Triton kernel, on a GPU: factor, rotation and rounding in one pass, to int8 or FP8. Not yet
measured on one.

Dimension letters: M tokens, K features, G groups along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import gpu
from lowbit.act_quant.naive import grid_of, held_as
from lowbit.hadamard.triton import SEGMENT, why_not_rotated


def why_not(x: Tensor, factor_K: Tensor | None, block: int, bits: int, group_size: int, clip: float = 1.0, mid_rise: bool = False,
            fp8: bool = False) -> str:
    """"" if `act_quant` can run with these arguments, else the reason in a few words."""
    return why_not_sizes(x.shape[-1], block, group_size) or gpu.why_not_float(x) or (gpu.why_not_fp8(x) if fp8 else "")


def why_not_sizes(k_in: int, block: int, group_size: int) -> str:
    """"" if tokens of K features, rotated in such blocks, can be rounded in such groups (0: one a token), else the reason."""
    if group_size & (group_size - 1):
        return f"a group of {group_size} is not a power of two"
    return why_not_rotated(k_in, block)


@torch.no_grad()
def act_quant(x: Tensor, factor_K: Tensor | None, block: int, bits: int, group_size: int, clip: float = 1.0, mid_rise: bool = False,
              fp8: bool = False) -> tuple[Tensor, Tensor]:
    """Same as `naive.act_quant`: bit for bit without a rotation, else up to its order of summation."""
    k_in, grid, held = x.shape[-1], grid_of(bits, clip, mid_rise), held_as(bits, fp8)
    if k_in % block:
        raise ValueError(f"{k_in} features are not a multiple of the block {block}")
    if group_size and k_in % group_size:
        raise ValueError(f"{k_in} features are not a multiple of the group size {group_size}")
    if factor_K is not None and factor_K.shape != (k_in,):
        raise ValueError(f"{tuple(factor_K.shape)} factors for {k_in} features")
    if not x.numel():
        return torch.empty(x.shape, dtype=held, device=x.device), torch.zeros(*x.shape[:-1], 1, device=x.device)
    from lowbit.act_quant import triton_kernel

    x_MK, groups = gpu.rows(x), k_in // (group_size or k_in)
    q_MK = torch.empty(x_MK.shape, dtype=held, device=x.device)
    tokens = x_MK.shape[0]
    scale_MG = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    segments = gpu.ceil_power(-(-k_in // SEGMENT))
    width = segments * SEGMENT if block > 1 else gpu.ceil_power(k_in)  # features a program holds, real or not
    group = group_size or width
    with gpu.device_of(x):
        triton_kernel.act_quant[(tokens,)](
            x_MK, gpu.dense(factor_K), q_MK, scale_MG, grid.share, float(grid.cells), float(grid.divisor), float(grid.top), k_in,
            groups, MID_RISE=grid.mid_rise, HAS_FACTOR=factor_K is not None, SEGMENTS=segments, BLOCK=block, GROUPS=width // group,
            GROUP=group, num_warps=gpu.warps(width, 32 if block > 1 else 16), enable_fp_fusion=False)
    return q_MK.view(x.shape), scale_MG.view(*x.shape[:-1], groups)


