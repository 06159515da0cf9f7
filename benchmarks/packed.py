"""A quantized linear layer for the GPU benchmarks: nearest rounding, packed weights, and the kernels or their references.

Dimension letters: M tokens, N out features, K in features, G groups along K, P packed bytes along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from lowbit import gpu
from lowbit.act_quant import naive as act_naive
from lowbit.act_quant import triton as act_triton
from lowbit.formats import pack
from lowbit.hadamard.emulated import block_hadamard
from lowbit.hadamard.naive import block_size
from lowbit.linear_wna16 import naive as wna16_naive
from lowbit.linear_wna16 import triton as wna16_triton
from lowbit.linear_wnan import naive as wnan_naive
from lowbit.linear_wnan import triton as wnan_triton
from lowbit.tensor_cache import LastInputCache
from torch import Tensor, nn

KERNELS = SimpleNamespace(act_quant=act_triton.act_quant, linear_wnan=wnan_triton.linear_wnan, linear_wna16=wna16_triton.linear_wna16)
REFERENCES = SimpleNamespace(act_quant=act_naive.act_quant, linear_wnan=wnan_naive.linear_wnan, linear_wna16=wna16_naive.linear_wna16)
_last = LastInputCache()


@dataclass(frozen=True)
class Choice:
    """How a layer is stored and run. `group_size` 0: one scale per row; 16 activation bits: float, and no rotation. fp8: what is multiplied
    is held in FP8, not int8."""

    weight_bits: int
    act_bits: int
    group_size: int = 0
    fp8: bool = False

    def __str__(self) -> str:
        held = " FP8" if self.fp8 else ""
        return f"W{self.weight_bits}A{self.act_bits} {f'g{self.group_size}' if self.group_size else 'row'}{held}"


def operations(x: Tensor):
    """(the kernels, "") if they run on x's device, else (the references, the reason)."""
    reason = gpu.why_not(x)
    return (REFERENCES, reason) if reason else (KERNELS, "")


def quantize(w_NK: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(packed_NP, scale_NG float16), symmetric and rounded to the nearest."""
    n_out, k_in = w_NK.shape
    w_NGJ = w_NK.float().view(n_out, -1, group_size or k_in)
    middle = 1 << bits - 1
    scale_NG = (w_NGJ.abs().amax(-1) / (middle - 1)).clamp_min(2.0**-14).half()
    codes = (w_NGJ / scale_NG.float()[..., None]).round_().clamp_(-middle, middle - 1).add_(middle)
    return pack(codes.to(torch.uint8).view(n_out, k_in), bits), scale_NG


class PackedLinear(nn.Module):
    """y = Q(x) W^T + b, with GELU after it if asked. Layers that read one tensor at one width share its quantization."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, choice: Choice, *, gelu_after: bool = False):
        super().__init__()
        k_in = weight_NK.shape[1]
        self.choice, self.gelu_after = choice, gelu_after
        self.block = block_size(k_in) if choice.act_bits < 16 else 1
        signs_K = torch.randint(0, 2, (k_in,), generator=torch.Generator().manual_seed(k_in)).mul(2).sub(1)
        self.register_buffer("signs_K", signs_K.float().to(weight_NK.device))  # one per width, so that layers may share
        if self.block > 1:
            weight_NK = block_hadamard(weight_NK.float(), self.block, self.signs_K)
        packed_NP, scale_NG = quantize(weight_NK, choice.weight_bits, choice.group_size)
        self.register_buffer("packed_NP", packed_NP)
        self.register_buffer("scale_NG", scale_NG)
        self.register_buffer("bias_N", bias_N)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight, its scales and the bias."""
        return sum(each.numel() * each.element_size() for each in (self.packed_NP, self.scale_NG, self.bias_N) if each is not None)

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(q, scale) of the rotated input."""
        run, _ = operations(x)
        return run.act_quant(x, self.signs_K, self.block, self.choice.act_bits, 0, 1.0, False, self.choice.fp8)

    def forward(self, x: Tensor) -> Tensor:
        run, _ = operations(x)
        stored = (self.packed_NP, self.scale_NG, None, self.choice.weight_bits, self.choice.group_size)
        after = (self.bias_N, None, None, self.gelu_after)
        if self.choice.act_bits == 16:
            return run.linear_wna16(x, *stored, *after)
        q, scale = _last.get(x, (self.choice.act_bits, self.block, self.choice.fp8), lambda: self.activations(x))
        return run.linear_wnan(q, scale, *stored, *after, x.dtype)
