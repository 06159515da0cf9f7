"""The Hadamard rotation as a Triton kernel, on a GPU. Not yet measured on one.

Dimension letters: M tokens, K features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import gpu
from lowbit.hadamard.naive import LARGEST_BLOCK

SEGMENT = 256  # features that are rotated together (triton_kernel.py)
LARGEST_K = 1 << 15  # a token's features stay in the registers of one program


def why_not_rotated(k_in: int, block: int) -> str:
    """"" if a token of K features can be rotated in such blocks, else the reason in a few words."""
    if k_in > LARGEST_K:
        return f"{k_in} features are more than {LARGEST_K}"
    if block > LARGEST_BLOCK or block < 1 or block & (block - 1):
        return f"a block of {block} is not a power of two up to {LARGEST_BLOCK}"
    return ""


def why_not(x: Tensor, block: int, factor_K: Tensor) -> str:
    """"" if `block_hadamard` can run with these arguments, else the reason in a few words."""
    return gpu.why_not_float(x) or why_not_rotated(x.shape[-1], block)


@torch.no_grad()
def block_hadamard(x: Tensor, block: int, factor_K: Tensor) -> Tensor:
    """Same as `naive.block_hadamard`, up to the order of summation, in x's type; the arithmetic is float32 for every type."""
    k_in = x.shape[-1]
    if k_in % block:
        raise ValueError(f"{k_in} features are not a multiple of the block {block}")
    if factor_K.shape != (k_in,):
        raise ValueError(f"{tuple(factor_K.shape)} factors for {k_in} features")
    x_MK = gpu.rows(x)
    y_MK = torch.empty_like(x_MK)
    if x.numel():
        from lowbit.hadamard import triton_kernel

        segments = gpu.ceil_power(-(-k_in // SEGMENT))
        with gpu.device_of(x):
            triton_kernel.block_hadamard[(x_MK.shape[0],)](x_MK, gpu.dense(factor_K), y_MK, k_in, SEGMENTS=segments, BLOCK=block,
                                                       num_warps=gpu.warps(segments * SEGMENT, 32))
    return y_MK.view(x.shape)
