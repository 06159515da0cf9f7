"""Fast torch version of the block Hadamard transform.

Dimension letters: M rows, K features.

H of size a*b is the Kronecker product of H_a and H_b, so a block reshaped to (a, b) is transformed by two small
products, H_a X H_b: (a + b) instead of a*b multiply-adds per feature. On the CPU this takes a quarter of the time
of the product with the whole 256 x 256 matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.hadamard.naive import matrix

_MATRICES: dict[tuple, tuple[Tensor, Tensor]] = {}


def _factors(block: int, like: Tensor) -> tuple[Tensor, Tensor]:
    key = (block, like.dtype, like.device)
    if key not in _MATRICES:
        left = 1 << (block.bit_length() - 1) // 2
        _MATRICES[key] = (matrix(left, like.dtype, like.device), matrix(block // left, like.dtype, like.device))
    return _MATRICES[key]


def block_hadamard(x_MK: Tensor, block: int, signs_K: Tensor) -> Tensor:
    """Same as `naive.block_hadamard`, up to the order of summation."""
    left, right = _factors(block, x_MK)
    tiles = (x_MK * signs_K).reshape(-1, len(right)) @ right
    return torch.matmul(left, tiles.view(-1, len(left), len(right))).view(x_MK.shape)
