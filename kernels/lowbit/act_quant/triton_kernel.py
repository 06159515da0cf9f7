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
def act_quant(x_ptr, factor_ptr, q_ptr, scale_ptr, share, cells, divisor, top, K, G, MID_RISE: tl.constexpr, HAS_FACTOR: tl.constexpr,
              SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """One token a program: GROUPS * GROUP features, of which K are real. With BLOCK > 1 these are SEGMENTS * 256 as well.
    `share` to `top` are those of `naive.Grid`, as floats."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, GROUPS * GROUP)
    if BLOCK > 1:
        x = load_rotated(x_ptr, factor_ptr, token, K, HAS_FACTOR, SEGMENTS, BLOCK)
    else:
        x = tl.load(x_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            x *= tl.load(factor_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    x_GJ = tl.reshape(x, (GROUPS, GROUP))
    span_G = tl.max(tl.abs(x_GJ), axis=1) * share
    # the reference's roundings; a subnormal span would overflow the reciprocal
    live_G = span_G > TINY * cells
    inverse_G = tl.where(live_G, tl.div_rn(tl.zeros((GROUPS,), tl.float32) + cells, tl.where(live_G, span_G, 1.0)), 0.0)
    x_GJ *= inverse_G[:, None]
    q_GJ = 2.0 * tl.floor(x_GJ) + 1.0 if MID_RISE else (x_GJ + ROUND) - ROUND
    q_GJ = tl.minimum(tl.maximum(q_GJ, -top), top)
    g = tl.arange(0, GROUPS)
    tl.store(q_ptr + token * K + k, tl.reshape(q_GJ, (GROUPS * GROUP,)).to(q_ptr.dtype.element_ty), mask=k < K)
    tl.store(scale_ptr + token * G + g, tl.div_rn(span_G, tl.zeros((GROUPS,), tl.float32) + divisor), mask=g < G)
