"""Dynamic activation quantization on a GPU; imported only when a kernel is launched.

Dimension letters: K features, G groups along K, J features of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.hadamard.triton_kernel import load_rotated

# v + ROUND - ROUND rounds v to the nearest integer, half to even, for |v| < 2^22: the sum has no fraction bits left.
# Exact only while the compiler may not fuse the multiplication before it: launch with `enable_fp_fusion=False`.
ROUND: tl.constexpr = tl.constexpr(1.5 * 2**23)
TINY: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def act_quant(x_ptr, factor_ptr, q_ptr, scale_ptr, top, K, G, HAS_FACTOR: tl.constexpr, SEGMENTS: tl.constexpr,
              BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """One token a program: GROUPS * GROUP features, of which K are real. With BLOCK > 1 these are SEGMENTS * 256 as well.
    `top` is the largest code, as a float."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, GROUPS * GROUP)
    if BLOCK > 1:
        x = load_rotated(x_ptr, factor_ptr, token, K, HAS_FACTOR, SEGMENTS, BLOCK)
    else:
        x = tl.load(x_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            x *= tl.load(factor_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    x_GJ = tl.reshape(x, (GROUPS, GROUP))
    absmax_G = tl.max(tl.abs(x_GJ), axis=1)
    # same two roundings as the reference; a subnormal absmax would overflow the reciprocal
    live_G = absmax_G > TINY * top
    inverse_G = tl.where(live_G, tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), tl.where(live_G, absmax_G, 1.0)) * top, 0.0)
    q_GJ = (x_GJ * inverse_G[:, None] + ROUND) - ROUND
    g = tl.arange(0, GROUPS)
    tl.store(q_ptr + token * K + k, tl.reshape(q_GJ, (GROUPS * GROUP,)).to(tl.int8), mask=k < K)
    tl.store(scale_ptr + token * G + g, tl.div_rn(absmax_G, tl.zeros((GROUPS,), tl.float32) + top), mask=g < G)
