"""Products with packed weights on a GPU; imported only when a kernel is launched.

Dimension letters as in `naive.py`: M tokens, N out features, K in features, G groups along K, P packed bytes along K, R rank;
and C cells, the shortest runs of codes that fill whole bytes (`formats.py`).

Two ways, by the number of tokens:
    few    `multiply_few` unpacks each weight tile where it is used. It reads the packed bytes once, and they are what costs.
    many   `expand` unpacks the layer into int8 first, then `multiply` runs on the int8 matrix units. Unpacking inside would be
           repeated for every tile of tokens, and costs more instructions than the product itself.
Integers are exact: each group is summed in int32 and only then scaled, in float32. Codes of 4 bits and less may come in FP8 (e4m3)
instead, and then meet the FP8 units. Hopper's keep about 14 bits of a sum (DeepSeek-V3, arXiv 2412.19437, section 3.5.2), which is
all of it for up to 64 products of such integers, at most 15 x 15 each: after so many it is added to a float32 sum, exact up to 2^24.

Compiled for Hopper, an int8 product is waited for before the next block of K is fetched (only float32 accumulators stay in flight):
wide blocks of K and several programs on a multiprocessor hide that. A group of 64 also costs a conversion and a multiply-add per
output, as long as its product takes; whole rows under one scale run fastest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit import gpu

FP8_PRODUCTS: tl.constexpr = tl.constexpr(64)


@triton.jit
def load_codes(packed_ptr, n_N, first_cell, P, ROWS: tl.constexpr, CELLS: tl.constexpr, BITS: tl.constexpr):
    """Codes of CELLS cells from `first_cell` on, int32 (ROWS, CELLS * codes of a cell); zero beyond the row."""
    CODES: tl.constexpr = 8 if BITS == 3 else 4 if BITS == 2 or BITS == 6 else 8 // BITS
    BYTES: tl.constexpr = CODES * BITS // 8
    cell_C = first_cell + tl.arange(0, CELLS)
    words_NC = tl.zeros((ROWS, CELLS), tl.int32)
    for j in tl.static_range(BYTES):
        p_C = cell_C * BYTES + j
        bytes_NC = tl.load(packed_ptr + n_N.to(tl.int64)[:, None] * P + p_C[None, :], mask=(p_C < P)[None, :], other=0)
        words_NC |= bytes_NC.to(tl.int32) << (8 * j)
    shift = BITS * tl.arange(0, CODES)
    return tl.reshape((words_NC[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1), (ROWS, CELLS * CODES))


@triton.jit
def expand(packed_ptr, scale_ptr, zero_ptr, w_ptr, N, K, P, G, stride_w, GROUP: tl.constexpr, BITS: tl.constexpr,
           HAS_ZERO: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr, CELLS: tl.constexpr):
    """w_NK = code - zero as int8 or FP8, or times the scale as a float. 8-bit codes, whose difference would not fit, are centred at 128."""
    CODES: tl.constexpr = 8 if BITS == 3 else 4 if BITS == 2 or BITS == 6 else 8 // BITS
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.program_id(1) * (CELLS * CODES) + tl.arange(0, CELLS * CODES)
    w_NK = load_codes(packed_ptr, tl.minimum(n_N, N - 1), tl.program_id(1) * CELLS, P, BLOCK_N, CELLS, BITS)
    mask_NK = (n_N < N)[:, None] & (k_K < K)[None, :]
    at_NK = n_N.to(tl.int64)[:, None] * G + (k_K // GROUP)[None, :]
    if HAS_ZERO:
        w_NK -= tl.load(zero_ptr + at_NK, mask=mask_NK, other=0).to(tl.int32)
    else:
        w_NK -= 1 << (BITS - 1)
    if SCALED:
        w_NK = w_NK.to(tl.float32) * tl.load(scale_ptr + at_NK, mask=mask_NK, other=0.0).to(tl.float32)
    elif w_ptr.dtype.element_ty != tl.int8:
        w_NK = w_NK.to(tl.float32)
    tl.store(w_ptr + n_N.to(tl.int64)[:, None] * stride_w + k_K[None, :], w_NK.to(w_ptr.dtype.element_ty), mask=mask_NK)


@triton.jit
def group_sums(q_ptr, sums_ptr, M, K, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """sums_GM = sum of q over each group, int32."""
    m, g = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, GROUP, BLOCK):
        j = first + tl.arange(0, BLOCK)
        k = g * GROUP + j
        total += tl.load(q_ptr + m.to(tl.int64) * K + k, mask=(j < GROUP) & (k < K), other=0).to(tl.int32)
    tl.store(sums_ptr + g * M + m, tl.sum(total, axis=0))


@triton.jit
def gelu(x):
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as x / (1 + exp(-2u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def finish(y_MN, m_M, n_N, bias_ptr, low_ptr, up_ptr, y_ptr, M, N, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
           WIDE: tl.constexpr, GELU_AFTER: tl.constexpr):
    """Bias, low-rank branch, GELU, and the store."""
    if HAS_BIAS:
        y_MN += tl.load(bias_ptr + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]
    for first in tl.static_range(0, RANK, 16):
        r_R = first + tl.arange(0, 16)
        low_MR = tl.load(low_ptr + m_M.to(tl.int64)[:, None] * RANK + r_R[None, :], mask=(m_M < M)[:, None] & (r_R < RANK)[None, :],
                         other=0.0)
        up_RN = tl.load(up_ptr + n_N[None, :] * RANK + r_R[:, None], mask=(n_N < N)[None, :] & (r_R < RANK)[:, None], other=0.0)
        if WIDE:
            y_MN = tl.dot(low_MR.to(tl.float32), up_RN.to(tl.float32), y_MN, input_precision="ieee")
        else:
            y_MN = tl.dot(low_MR, up_RN, y_MN)
    if GELU_AFTER:
        y_MN = gelu(y_MN)
    tl.store(y_ptr + m_M.to(tl.int64)[:, None] * N + n_N[None, :], y_MN.to(y_ptr.dtype.element_ty),
             mask=(m_M < M)[:, None] & (n_N < N)[None, :])


@triton.jit
def exact_dot(a_MK, w_KN, sum_MN):
    """sum_MN plus the product of integers held in int8 (sums int32) or in FP8 (sums float32)."""
    if sum_MN.dtype == tl.int32:
        return tl.dot(a_MK, w_KN, sum_MN, out_dtype=tl.int32)
    return tl.dot(a_MK, w_KN, sum_MN, max_num_imprecise_acc=min(a_MK.shape[1], FP8_PRODUCTS))


@triton.jit
def product(a_MK, w_KN, k_K, left, sum_MN, EVEN: tl.constexpr):
    """sum_MN plus one block of K, of which `left` features remain; EVEN: all of them."""
    if EVEN:
        return exact_dot(tl.load(a_MK), tl.load(w_KN), sum_MN)
    mask_K = k_K < left
    a = tl.load(a_MK, mask=mask_K[None, :], other=0.0)
    return exact_dot(a, tl.load(w_KN, mask=mask_K[:, None], other=0.0), sum_MN)


@triton.jit
def scaled_group(a_MK, w_KN, k_K, g, m_M, n_N, act_scale_ptr, scale_ptr, sums_ptr, zero_ptr, M, N, K, group, SINGLE: tl.constexpr,
                 EVEN: tl.constexpr, ACT_GROUPED: tl.constexpr, HAS_SUMS: tl.constexpr):
    """Group g's share of y_MN, before a scale per token. SINGLE: a group is one block of K; EVEN: no block is cut off."""
    scale_N = tl.load(scale_ptr + g * N + n_N, mask=n_N < N, other=0.0).to(tl.float32)  # early: it arrives while the product runs
    first, end = g * group, tl.minimum(g * group + group, K)
    sum_MN = tl.zeros((m_M.shape[0], n_N.shape[0]), tl.int32 if a_MK.dtype.element_ty == tl.int8 else tl.float32)
    if SINGLE:
        sum_MN = product(a_MK + first, w_KN + first, k_K, end - first, sum_MN, EVEN)
    else:
        for k in range(first, end, k_K.shape[0]):
            sum_MN = product(a_MK + k, w_KN + k, k_K, end - k, sum_MN, EVEN)
    if HAS_SUMS:  # code - zero = (code - 128) + (128 - zero)
        shift_N = 128 - tl.load(zero_ptr + g * N + n_N, mask=n_N < N, other=0).to(tl.int32)
        sum_MN += tl.load(sums_ptr + g * M + m_M, mask=m_M < M, other=0)[:, None] * shift_N[None, :]
    part_MN = sum_MN.to(tl.float32) * scale_N[None, :]
    if ACT_GROUPED:
        part_MN *= tl.load(act_scale_ptr + g * M + m_M, mask=m_M < M, other=0.0)[:, None]
    return part_MN


@triton.jit
def multiply(q_ptr, w_ptr, act_scale_ptr, scale_ptr, sums_ptr, zero_ptr, bias_ptr, low_ptr, up_ptr, y_ptr, M, N, K, stride_w, G,
             group, m_bucket, ONE: tl.constexpr, SINGLE: tl.constexpr, EVEN: tl.constexpr, ACT_GROUPED: tl.constexpr,
             HAS_SUMS: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, GELU_AFTER: tl.constexpr,
             BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TALL: tl.constexpr):
    """y_MN from int8 q_MK and int8 w_NK, or from both in FP8 (rows of w_NK: `stride_w`).

    Scales and zeros lie group by group: act_scale_GM or _M, scale_GN, sums_GM, zero_GN. ONE: one group, no second accumulator.
    TALL tiles of tokens in turn use the weights that the cache holds."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (TALL * tiles_n) * TALL
    height = tl.minimum(tiles_m - band, TALL)
    within = tl.program_id(0) % (TALL * tiles_n)
    m_M = (band + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    # rows beyond the end read the last row again: their results are not stored
    read_M, read_N = tl.minimum(m_M, M - 1), tl.minimum(n_N, N - 1)
    a_MK = q_ptr + read_M.to(tl.int64)[:, None] * K + k_K[None, :]
    w_KN = w_ptr + read_N.to(tl.int64)[None, :] * stride_w + k_K[:, None]
    if ONE:
        y_MN = scaled_group(a_MK, w_KN, k_K, 0, m_M, n_N, act_scale_ptr, scale_ptr, sums_ptr, zero_ptr, M, N, K, K,
                            False, EVEN, ACT_GROUPED, HAS_SUMS)
    else:
        y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for g in range(0, G):
            y_MN += scaled_group(a_MK, w_KN, k_K, g, m_M, n_N, act_scale_ptr, scale_ptr, sums_ptr, zero_ptr, M, N, K, group,
                                 SINGLE, EVEN, ACT_GROUPED, HAS_SUMS)
    if not ACT_GROUPED:
        y_MN *= tl.load(act_scale_ptr + m_M, mask=m_M < M, other=0.0)[:, None]
    finish(y_MN, m_M, n_N, bias_ptr, low_ptr, up_ptr, y_ptr, M, N, HAS_BIAS, RANK, WIDE, GELU_AFTER)


@triton.jit
def multiply_few(a_ptr, packed_ptr, act_scale_ptr, scale_ptr, zero_ptr, bias_ptr, low_ptr, up_ptr, y_ptr, M, N, K, P, G, group,
                 BITS: tl.constexpr, ACT_GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
                 WIDE: tl.constexpr, GELU_AFTER: tl.constexpr, WIDE_A: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):
    """y_MN from packed_NP and a_MK, which is int8 or FP8 with scales act_scale_MG or _M, or a float type without.

    A group starts at a whole cell. The integers code - zero are exact in every type that they are multiplied in; WIDE_A: float32."""
    CODES: tl.constexpr = 8 if BITS == 3 else 4 if BITS == 2 or BITS == 6 else 8 // BITS
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    FP8: tl.constexpr = a_ptr.dtype.element_ty == tl.float8e4nv
    m_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read_M, read_N = tl.minimum(m_M, M - 1).to(tl.int64), tl.minimum(n_N, N - 1).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(0, G):
        scale_N = tl.load(scale_ptr + read_N * G + g).to(tl.float32)
        end = tl.minimum(g * group + group, K)
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
        for k in range(g * group, end, BLOCK_K):
            a_MK = tl.load(a_ptr + read_M[:, None] * K + (k + k_K)[None, :], mask=(k + k_K < end)[None, :], other=0.0)
            w_NK = load_codes(packed_ptr, read_N, k // CODES, P, BLOCK_N, BLOCK_K // CODES, BITS)
            if HAS_ZERO:
                w_NK -= tl.load(zero_ptr + read_N * G + g).to(tl.int32)[:, None]
            else:
                w_NK -= 1 << (BITS - 1)
            if INTEGER:
                sum_MN = exact_dot(a_MK, tl.trans(w_NK.to(tl.int8)), sum_MN)
            elif FP8:
                sum_MN = exact_dot(a_MK, tl.trans(w_NK.to(tl.float32).to(tl.float8e4nv)), sum_MN)
            elif WIDE_A:
                sum_MN = tl.dot(a_MK.to(tl.float32), tl.trans(w_NK.to(tl.float32)), sum_MN, input_precision="ieee")
            else:
                sum_MN = tl.dot(a_MK, tl.trans(w_NK.to(a_ptr.dtype.element_ty)), sum_MN)
        part_MN = sum_MN.to(tl.float32) * scale_N[None, :]
        if ACT_GROUPED:
            part_MN *= tl.load(act_scale_ptr + read_M * G + g)[:, None]
        y_MN += part_MN
    if (INTEGER or FP8) and not ACT_GROUPED:
        y_MN *= tl.load(act_scale_ptr + read_M)[:, None]
    finish(y_MN, m_M, n_N, bias_ptr, low_ptr, up_ptr, y_ptr, M, N, HAS_BIAS, RANK, WIDE, GELU_AFTER)


def _tuned(kernel, configs: list[triton.Config], key: list[str]):
    """The kernel with the fastest of `configs` (measured at a shape's first use), and EVEN set where no block of K is cut off."""
    even = triton.heuristics({"EVEN": lambda a: a["K"] % a["BLOCK_K"] == 0 and (a["ONE"] or a["group"] % a["BLOCK_K"] == 0)})
    return triton.autotune(configs, key, cache_results=True)(even(kernel))


def _tile(m: int, n: int, warps: int, stages: int, tall: int = 8, **blocks: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "TALL": tall, **blocks}, num_warps=warps, num_stages=stages)


_KEY = ["m_bucket", "N", "K", "group", "ACT_GROUPED", "HAS_SUMS"]  # Triton adds the arguments' types
_ONE = [_tile(128, 256, 8, 4, BLOCK_K=128), _tile(256, 128, 8, 4, BLOCK_K=128), _tile(128, 128, 8, 3, BLOCK_K=128),
        _tile(128, 256, 8, 2, BLOCK_K=256), _tile(128, 128, 8, 3, BLOCK_K=256), _tile(64, 256, 4, 3, BLOCK_K=128),
        _tile(64, 128, 4, 4, BLOCK_K=128), _tile(64, 64, 4, 4, BLOCK_K=128)]
# two accumulators: larger tiles than 128 x 128 would spill registers
_GROUPED = [_tile(128, 128, 8, 4), _tile(128, 128, 16, 4), _tile(128, 64, 8, 4), _tile(64, 128, 8, 4), _tile(64, 128, 4, 4),
            _tile(64, 64, 4, 4)]
_INTERPRETED = [_tile(32, 32, 4, 2, tall=2)]

multiply_one = _tuned(multiply, [_tile(32, 32, 4, 2, tall=2, BLOCK_K=64)] if gpu.interpreted() else _ONE, _KEY)
multiply_grouped = _tuned(multiply, _INTERPRETED if gpu.interpreted() else _GROUPED, _KEY)
