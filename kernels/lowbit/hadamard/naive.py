"""Reference: block Hadamard transform with signs.

Dimension letters: M rows, K features.

    y = (x * signs) B,   B = diag(H, ..., H) / sqrt(block),   H the Sylvester matrix of size `block`

B is symmetric and orthonormal, so (x W^T) is kept when W is transformed alike, and the transpose inverts exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_BLOCK = 256


def block_size(k: int) -> int:
    """Largest power of two that divides k, at most 256."""
    return min(k & -k, LARGEST_BLOCK)


def matrix(block: int, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix of a power of two."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two, not {block}")
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / block**0.5


def block_hadamard(x_MK: Tensor, block: int, signs_K: Tensor) -> Tensor:
    """The transform, along the last axis."""
    if x_MK.shape[-1] % block:
        raise ValueError(f"{x_MK.shape[-1]} features are not a multiple of the block {block}")
    blocks = (x_MK * signs_K).reshape(-1, block)
    return (blocks @ matrix(block, x_MK.dtype, x_MK.device)).reshape(x_MK.shape)


def inverse(y_MK: Tensor, block: int, signs_K: Tensor) -> Tensor:
    """The transpose of `block_hadamard`."""
    blocks = y_MK.reshape(-1, block) @ matrix(block, y_MK.dtype, y_MK.device)
    return blocks.reshape(y_MK.shape) * signs_K
