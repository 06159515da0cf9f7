"""The operations by their one name each, registered with torch (`torch.ops.lowbit.*`). Callers import these and never a backend.

    block_hadamard(x, block, factor_K)                     rotation in blocks, after a factor per channel
    act_quant(x, factor_K, block, bits, group_size)        (q int8, scale): the same, then dynamic quantization
    linear_wnan(q, act_scale, packed_NP, scale_NG, ...)    packed weight x quantized activations
    linear_wna16(x, packed_NP, scale_NG, ...)              packed weight x float activations

Signatures and arithmetic are those of each folder's `naive.py`, which is also the portable default (for the
rotation its faster torch form). A faster backend that does not run says why (`backend`), and the screen shows it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import act_quant as act_quant_folder
from lowbit import cpu
from lowbit.act_quant.emulated import fake_quantize
from lowbit.hadamard import emulated as hadamard_emulated
from lowbit.linear_wna16 import naive as wna16_naive
from lowbit.linear_wnan import emulated
from lowbit.linear_wnan import naive as wnan_naive

__all__ = ["Backend", "act_quant", "backend", "block_hadamard", "emulated_linear", "fake_quantize", "linear_wna16", "linear_wnan"]


@dataclass(frozen=True)
class Backend:
    """What runs a quantized layer: a kernel on packed bits, or "emulated" (the same numbers in a float product), and why."""

    name: str
    reason: str

    @property
    def is_kernel(self) -> bool:
        return self.name == "kernel"


@functools.lru_cache(maxsize=32)
def backend(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """The backend for layers on such a device with inputs of such a type. Waits for the kernels where they are being built."""
    if device_type != "cpu":
        return Backend("emulated", f"no kernel for {device_type} devices")
    if dtype not in cpu.FORMATS:
        return Backend("emulated", f"{str(dtype).removeprefix('torch.')} is not a format of the kernels")
    reason = cpu.why_not()
    return Backend("emulated", reason) if reason else Backend("kernel", cpu.label())


SCHEMAS = {
    "block_hadamard": "(Tensor x, int block, Tensor factor_K) -> Tensor",
    "act_quant": "(Tensor x, Tensor? factor_K, int block, int bits, int group_size) -> (Tensor, Tensor)",
    "linear_wnan": "(Tensor q, Tensor act_scale, Tensor packed_NP, Tensor scale_NG, Tensor? zero_NG, int bits, int group_size, "
                   "Tensor? bias_N, Tensor? low, Tensor? up_NR, bool gelu_after, ScalarType dtype) -> Tensor",
    "linear_wna16": "(Tensor x, Tensor packed_NP, Tensor scale_NG, Tensor? zero_NG, int bits, int group_size, "
                    "Tensor? bias_N, Tensor? low, Tensor? up_NR, bool gelu_after) -> Tensor",
}
_DEFAULT = {"block_hadamard": hadamard_emulated.block_hadamard, "act_quant": act_quant_folder.act_quant,
          "linear_wnan": wnan_naive.linear_wnan, "linear_wna16": wna16_naive.linear_wna16}


def _on_cpu(name: str):
    fast, slow = getattr(cpu, name), _DEFAULT[name]

    def run(*arguments):
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        return slow(*arguments) if cpu.why_not(*tensors) else fast(*arguments)
    return run


def _fake_act_quant(x, factor_K, block, bits, group_size):
    groups = x.shape[-1] // group_size if group_size else 1
    q = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return q, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


_FAKE = {
    "block_hadamard": lambda x, block, factor_K: torch.empty_like(x, memory_format=torch.contiguous_format),
    "act_quant": _fake_act_quant,
    "linear_wnan": lambda q, act_scale, packed_NP, *rest: q.new_empty((*q.shape[:-1], packed_NP.shape[0]), dtype=rest[-1]),
    "linear_wna16": lambda x, packed_NP, *rest: x.new_empty((*x.shape[:-1], packed_NP.shape[0])),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"lowbit::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"lowbit::{_name}", "default", _DEFAULT[_name])
    torch.library.impl(f"lowbit::{_name}", "cpu", _on_cpu(_name))
    torch.library.register_fake(f"lowbit::{_name}", _FAKE[_name])

block_hadamard = torch.ops.lowbit.block_hadamard.default
act_quant = torch.ops.lowbit.act_quant.default
linear_wnan = torch.ops.lowbit.linear_wnan.default
linear_wna16 = torch.ops.lowbit.linear_wna16.default


@torch.no_grad()
def emulated_linear(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int | None,
                    act_bits: int, bias: Tensor | None, scratch: dict) -> Tensor:
    """y = Q_a(x) W^T + b as a float product of a dequantized weight that `scratch` keeps between calls: where no kernel runs."""
    return emulated.linear_wnan(x, packed_NP, scale_NG, zero_NG, bits, group_size, x.shape[-1], act_bits, bias, scratch)
