"""Reference: a linear layer whose packed n-bit weight meets n-bit activations.

Dimension letters: M tokens, N out features, K in features, G groups along K, J features of one group, P packed bytes along K,
R rank of the low-rank branch.

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),   g = k // group_size
    y[m, n] = sum_g a[m, g'] scale[n, g] ( sum_k code[n, k] q[m, k]  -  zero[n, g] sum_k q[m, k] )  + bias[n] + low[m] . up[n]

The inner sums run over the k of group g and are exact integers; a[m, g'] is the activation's scale, one per token or one per group.
A symmetric weight stores no zero points: its zero is 2^(b-1), so its integers are -2^(b-1) ... 2^(b-1) - 1.
Scales are float16 and used exactly as stored. The last group of a row may be shorter than the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from lowbit.formats import unpack


def dequantize(packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int | None,
               k_in: int) -> Tensor:
    """w_NK float32."""
    codes_NK = unpack(packed_NP, bits, k_in).float()
    width = group_size or k_in
    groups = -(-k_in // width)
    if scale_NG.shape != (len(codes_NK), groups):
        raise ValueError(f"scales are {tuple(scale_NG.shape)}; {len(codes_NK)} rows of {groups} groups need "
                         f"{(len(codes_NK), groups)}")
    zero_NG = torch.full_like(scale_NG, 1 << bits - 1) if zero_NG is None else zero_NG
    scale_NK = scale_NG.float().repeat_interleave(width, 1)[:, :k_in]
    zero_NK = zero_NG.float().repeat_interleave(width, 1)[:, :k_in]
    return (codes_NK - zero_NK) * scale_NK


def group_sums(q_MK: Tensor, packed_NP: Tensor, zero_NG: Tensor | None, bits: int, group_size: int, k_in: int) -> Tensor:
    """The exact integers sum_k (code - zero) q of every group, int32 (G, M, N)."""
    codes_NK = unpack(packed_NP, bits, k_in).int()
    sums = []
    for g, first in enumerate(range(0, k_in, group_size or k_in)):
        columns = slice(first, min(first + (group_size or k_in), k_in))
        zero_N1 = 1 << bits - 1 if zero_NG is None else zero_NG[:, g : g + 1].int()
        # float64 holds every such sum exactly, and has a fast product
        sums.append((q_MK[:, columns].double() @ (codes_NK[:, columns] - zero_N1).double().T).int())
    return torch.stack(sums) if sums else q_MK.new_zeros(0, len(q_MK), len(packed_NP), dtype=torch.int32)


def linear_wnan(q: Tensor, act_scale: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int,
                group_size: int, bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool,
                dtype: torch.dtype) -> Tensor:
    """y (..., N) in `dtype` from q (..., K) int8 and act_scale (..., 1 or G) float32; `group_size` 0: one scale per row.

    With G activation scales their groups are the weight's. `low` (..., R) is the input already brought to the low rank, unquantized;
    `gelu_after` applies GELU (tanh form) to everything. Float parts in float32."""
    k_in = q.shape[-1]
    q_MK, act_scale_MG = q.reshape(-1, k_in), act_scale.reshape(-1, act_scale.shape[-1])
    sums_GMN = group_sums(q_MK, packed_NP, zero_NG, bits, group_size, k_in).float()
    y_MN = torch.einsum("gmn,mg,ng->mn", sums_GMN, act_scale_MG.expand(-1, len(sums_GMN)), scale_NG.float())
    if bias_N is not None:
        y_MN = y_MN + bias_N.float()
    if low is not None:
        y_MN = y_MN + low.reshape(len(q_MK), low.shape[-1]).float() @ up_NR.float().T
    if gelu_after:
        y_MN = gelu(y_MN, approximate="tanh")
    return y_MN.to(dtype).reshape(*q.shape[:-1], len(packed_NP))
