"""The linear layer of packed weights and float activations on a GPU: Triton kernels, and the vendor's product. Not yet measured on one.

Dimension letters as in `linear_wnan/naive.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from lowbit import gpu
from lowbit.linear_wnan import triton as wnan


def why_not(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
            bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool) -> str:
    """"" if `linear_wna16` can run with these arguments, else the reason in a few words."""
    return "no input features" if not x.shape[-1] else gpu.why_not_float(x)


@torch.no_grad()
def linear_wna16(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
                 bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool) -> Tensor:
    """Same as `naive.linear_wna16` up to rounding.

    Few tokens: the weights are unpacked where they are used and their scales applied in float32. Many: the layer is dequantized
    into x's type, N x K numbers that live as long as this call, and multiplied by the vendor's library."""
    stored = wnan.layer(packed_NP, scale_NG, zero_NG, bits, group_size, x.shape[-1])
    x_MK = gpu.rows(x)
    tokens = x_MK.shape[0]
    after = wnan.epilogue(tokens, stored.n_out, bias_N, low, up_NR, gelu_after)
    y_MN = torch.empty(tokens, stored.n_out, dtype=x.dtype, device=x.device)
    if y_MN.numel():
        with gpu.device_of(x):
            if wnan.fits_few(tokens, stored):
                wnan.multiply_few(x_MK, None, stored, after, y_MN)
            else:
                y_MN = _multiply_many(x_MK, stored, after)
    return y_MN.view(*x.shape[:-1], stored.n_out)


def _multiply_many(x_MK: Tensor, stored: wnan.Layer, after: wnan.Epilogue) -> Tensor:
    """y_MN by way of the dequantized layer."""
    w_NK = wnan.expand(stored, x_MK.dtype)[:, : stored.k_in]
    y_MN = linear(x_MK, w_NK, None if after.bias_N is None else after.bias_N.to(x_MK.dtype))
    if after.low_MR is not None:
        y_MN = torch.addmm(y_MN, after.low_MR.to(x_MK.dtype), after.up_NR.to(x_MK.dtype).T)
    return gelu(y_MN, approximate="tanh") if after.gelu_after else y_MN
