"""Reference: a linear layer with a packed n-bit weight and float activations.

Dimension letters as in `linear_wnan/naive.py`: the same weight format, the same epilogue.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from lowbit.linear_wnan.naive import dequantize


def linear_wna16(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
                 bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool) -> Tensor:
    """y = x W^T + bias + low up^T (..., N) in x's type, the product in float32; `group_size` 0: one scale per row."""
    y = x.float() @ dequantize(packed_NP, scale_NG, zero_NG, bits, group_size or None, x.shape[-1]).T
    if bias_N is not None:
        y = y + bias_N.float()
    if low is not None:
        y = y + low.float() @ up_NR.float().T
    return (gelu(y, approximate="tanh") if gelu_after else y).to(x.dtype)
