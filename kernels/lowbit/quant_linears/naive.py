"""Reference: quantize an input once, then multiply it with every weight that reads it (q, k and v of an attention, and the MLP beside
them in a single block). The kernel is `lowbit_quant_linears` in linear_wnan/cpu.c.

Dimension letters: M tokens, N out features, K in features, G groups along K, P packed bytes along K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.gpu import chooses_fp8


def quant_linears(x: Sequence[Tensor], factor_K: Tensor | None, block: int, act_bits: Sequence[int], act_group: int,
                  packed: Sequence[Tensor], scale: Sequence[Tensor], zero: Sequence[Tensor | None], weight_bits: Sequence[int],
                  group_size: int, bias: Sequence[Tensor | None], gelu_after: Sequence[bool], residual: Tensor | None,
                  gate_BN: Tensor | None, clip: float = 1.0, mid_rise: bool = False) -> list[Tensor]:
    """One y (..., N) in x's type per weight: `linear_wnan` of `act_quant(x, factor_K, block, act_bits[i], act_group, clip, mid_rise)`.

    x: one tensor (..., K), or parts of it side by side. packed (N, P), scale (N, G), zero (N, G) or None and bias (N) or None of each
    weight, which share K and `group_size` (0: one scale per row). `act_group` is 0 (one scale per token) or the weights' group size.
    With a residual (B, S, N) and its gate (B, N), of a single weight: residual + gate y."""
    whole = x[0] if len(x) == 1 else torch.cat(tuple(x), -1)
    quantized = {bits: torch.ops.lowbit.act_quant(whole, factor_K, block, bits, act_group, clip, mid_rise, chooses_fp8(whole, bits))
                 for bits in set(act_bits)}
    made = [torch.ops.lowbit.linear_wnan(*quantized[act], *stored, group_size, bias_N, None, None, gelu, whole.dtype)
            for act, *stored, bias_N, gelu in zip(act_bits, packed, scale, zero, weight_bits, bias, gelu_after)]
    return made if residual is None else [torch.addcmul(residual, gate_BN[:, None], made[0])]
