"""The Hadamard rotation on a GPU; imported only when a kernel is launched.

Dimension letters: S segments of 256 features, L and R the 16 x 16 features of a segment (feature = 16 L + R), K features.

A Sylvester matrix of size `block` <= 256 is the Kronecker product of two of size <= 16. So a segment, read as a 16 x 16 matrix X,
becomes A X B, where A and B have those smaller matrices along their diagonals: two products of width 16 instead of one of width 256,
on the matrix units. Their entries are 0, 1 and -1, so two TF32 terms of the other factor give its product to about 2^-21.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sylvester(SIZE: tl.constexpr):
    """(16, 16) float32: Sylvester matrices of SIZE <= 16 along the diagonal, entries 1 and -1."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    common = i & j & (SIZE - 1)
    parity = (common ^ (common >> 1) ^ (common >> 2) ^ (common >> 3)) & 1
    return tl.where(i // SIZE == j // SIZE, 1 - 2 * parity, 0).to(tl.float32)


@triton.jit
def times(x, matrix):
    """x @ matrix for a matrix that TF32 holds exactly: x is split into its upper 11 bits and the rest."""
    upper = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return tl.dot(upper, matrix, tl.dot(x - upper, matrix, input_precision="tf32"), input_precision="tf32")


@triton.jit
def rotate(x, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """(SEGMENTS * 16, 16) float32 to the same features rotated in blocks, (SEGMENTS, 16, 16)."""
    RIGHT: tl.constexpr = BLOCK if BLOCK < 16 else 16
    LEFT: tl.constexpr = BLOCK // RIGHT
    x = times(x, sylvester(RIGHT))
    x_SRL = tl.permute(tl.reshape(x, (SEGMENTS, 16, 16)), (0, 2, 1))
    if LEFT > 1:
        x = times(tl.reshape(x_SRL, (SEGMENTS * 16, 16)), sylvester(LEFT))
        x_SRL = tl.reshape(x, (SEGMENTS, 16, 16))
    return tl.permute(x_SRL, (0, 2, 1)) * (1.0 / BLOCK**0.5)


@triton.jit
def load_rotated(x_ptr, factor_ptr, token, K, HAS_FACTOR: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """The token's features times the factor, rotated, zero beyond K: (SEGMENTS * 256,) float32."""
    k = tl.arange(0, SEGMENTS * 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.reshape(rotate(x, SEGMENTS, BLOCK), (SEGMENTS * 256,))


@triton.jit
def block_hadamard(x_ptr, factor_ptr, y_ptr, K, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """One token a program."""
    token = tl.program_id(0)
    k = tl.arange(0, SEGMENTS * 256)
    y = load_rotated(x_ptr, factor_ptr, token, K, True, SEGMENTS, BLOCK)
    tl.store(y_ptr + token.to(tl.int64) * K + k, y.to(y_ptr.dtype.element_ty), mask=k < K)
