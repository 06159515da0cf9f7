"""The operations by their one name each, registered with torch (`torch.ops.lowbit.*`). Callers import these and never a backend.

    block_hadamard(x, block, factor_K)                     rotation in blocks, after a factor per channel
    act_quant(x, factor_K, block, bits, group_size, ...)   (q int8, scale): the same, then dynamic quantization
    linear_wnan(q, act_scale, packed_NP, scale_NG, ...)    packed weight x quantized activations
    quant_linears(x, factor_K, block, act_bits, ...)       both in one pass, for every weight that reads x
    linear_wna16(x, packed_NP, scale_NG, ...)              packed weight x float activations
    modulate(x, shift, scale, eps)                         adaptive layer norm
    attention(query, key, value, norms, cos, sin, eps)     of streams of tokens, with RMS norm and rotary embedding

Signatures and arithmetic are those of each folder's `naive.py`, which is also the portable default (for the rotation its faster
torch form). A faster backend that does not run says why (`backend`), and the screen shows it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import act_quant as act_quant_folder
from lowbit import attention as attention_folder
from lowbit import build, cpu, gpu
from lowbit import modulate as modulate_folder
from lowbit import quant_linears as quant_linears_folder
from lowbit.act_quant import triton as act_triton
from lowbit.act_quant.emulated import fake_quantize
from lowbit.act_quant.naive import held_as
from lowbit.hadamard import emulated as hadamard_emulated
from lowbit.linear_wna16 import naive as wna16_naive
from lowbit.linear_wnan import emulated
from lowbit.linear_wnan import naive as wnan_naive
from lowbit.quant_linears.cpu import FusedLinears
from lowbit.quant_linears.cpu import quant_linears as fused_quant_linears

__all__ = ["Backend", "act_quant", "attention", "backend", "block_hadamard", "emulated_linear", "fake_quantize", "linear_wna16",
           "linear_wnan", "modulate", "quant_linears"]


@dataclass(frozen=True)
class Backend:
    """What runs a quantized layer: a kernel on packed bits, or "emulated" (the same numbers in a float product), and why."""

    name: str
    reason: str

    @property
    def is_kernel(self) -> bool:
        return self.name == "kernel"


def backend(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """The backend for layers on such a device with inputs of such a type. Waits for the kernels where they are being built."""
    return _backend(device_type, dtype, build.result() if device_type == "cpu" else None)


@functools.lru_cache(maxsize=32)
def _backend(device_type: str, dtype: torch.dtype, built: build.Built | None) -> Backend:
    """`built`: what the build for the CPU came to, so that what is remembered of one library is not told of another."""
    if dtype not in cpu.FORMATS:
        return Backend("emulated", f"{str(dtype).removeprefix('torch.')} is not a format of the kernels")
    if built is not None:
        return Backend("emulated" if built.library is None else "kernel", built.reason)
    if device_type != "cuda":
        return Backend("emulated", f"no kernel for {device_type} devices")
    reason = gpu.why_not_cuda()
    return Backend("emulated", reason) if reason else Backend("kernel", f"{gpu.units()}, by Triton; not yet measured on a GPU")


def why_not_layer(device_type: str, k_in: int, block: int, act_group: int) -> str:
    """"" if the kernels of such a device take layers with K input features that are rotated in such blocks (1: not) and rounded in such
    groups (0: one a token), else the reason. Without it `backend` would promise kernels to a layer that runs without one."""
    return act_triton.why_not_sizes(k_in, block, act_group) if device_type == "cuda" else ""


SCHEMAS = {
    "block_hadamard": "(Tensor x, int block, Tensor factor_K) -> Tensor",
    "act_quant": "(Tensor x, Tensor? factor_K, int block, int bits, int group_size, float clip=1.0, bool mid_rise=False, "
                 "bool fp8=False) -> (Tensor, Tensor)",
    "linear_wnan": "(Tensor q, Tensor act_scale, Tensor packed_NP, Tensor scale_NG, Tensor? zero_NG, int bits, int group_size, "
                   "Tensor? bias_N, Tensor? low, Tensor? up_NR, bool gelu_after, ScalarType dtype) -> Tensor",
    "quant_linears": "(Tensor[] x, Tensor? factor_K, int block, int[] act_bits, int act_group, Tensor[] packed, Tensor[] scale, "
                     "Tensor?[] zero, int[] weight_bits, int group_size, Tensor?[] bias, bool[] gelu_after, Tensor? residual, "
                     "Tensor? gate_BN, float clip=1.0, bool mid_rise=False) -> Tensor[]",
    "linear_wna16": "(Tensor x, Tensor packed_NP, Tensor scale_NG, Tensor? zero_NG, int bits, int group_size, "
                    "Tensor? bias_N, Tensor? low, Tensor? up_NR, bool gelu_after) -> Tensor",
    "modulate": "(Tensor x_BSD, Tensor shift_BD, Tensor scale_BD, float eps) -> Tensor",
    "attention": "(Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] query_norm, Tensor[] key_norm, Tensor cos_SC, Tensor sin_SC, "
                 "float eps) -> Tensor[]",
}
_DEFAULT = {"block_hadamard": hadamard_emulated.block_hadamard, "act_quant": act_quant_folder.act_quant,
            "linear_wnan": wnan_naive.linear_wnan, "quant_linears": quant_linears_folder.quant_linears,
            "linear_wna16": wna16_naive.linear_wna16, "modulate": modulate_folder.modulate,
            "attention": attention_folder.attention}
_CPU = {name: fused_quant_linears if name == "quant_linears" else getattr(cpu, name) for name in SCHEMAS}
_TRITON = {"block_hadamard": "hadamard", "act_quant": "act_quant", "linear_wnan": "linear_wnan", "linear_wna16": "linear_wna16"}


def _on_cpu(name: str):
    fast, slow = _CPU[name], _DEFAULT[name]

    def run(*arguments):
        flat = [part for a in arguments for part in (a if isinstance(a, list) else (a,))]
        known = all(a.dtype in cpu.FORMATS for a in flat if isinstance(a, Tensor) and a.is_floating_point())
        known = known and all(a in cpu.FORMATS for a in flat if isinstance(a, torch.dtype))
        return fast(*arguments) if known and not cpu.why_not() else slow(*arguments)
    return run


def _on_gpu(name: str):
    slow, folder = _DEFAULT[name], _TRITON.get(name)

    def run(*arguments):
        if folder is None:
            return slow(*arguments)
        kernel = importlib.import_module(f"lowbit.{folder}.triton")
        reason = kernel.why_not(*arguments)
        if not reason:
            return getattr(kernel, name)(*arguments)
        if arguments[0].numel():  # Python shows a warning of one text once
            warnings.warn(f"lowbit.{name} runs without a kernel: {reason}", RuntimeWarning, stacklevel=2)
        return slow(*arguments)
    return run


def _fake_act_quant(x, factor_K, block, bits, group_size, clip=1.0, mid_rise=False, fp8=False):
    groups = x.shape[-1] // group_size if group_size else 1
    q = torch.empty_like(x, dtype=held_as(bits, fp8), memory_format=torch.contiguous_format)
    return q, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


_FAKE = {
    "block_hadamard": lambda x, block, factor_K: torch.empty_like(x, memory_format=torch.contiguous_format),
    "act_quant": _fake_act_quant,
    "linear_wnan": lambda q, act_scale, packed_NP, *rest: q.new_empty((*q.shape[:-1], packed_NP.shape[0]), dtype=rest[-1]),
    "quant_linears": lambda x, _, block, bits, group, packed, *rest: [x[0].new_empty((*x[0].shape[:-1], len(p))) for p in packed],
    "linear_wna16": lambda x, packed_NP, *rest: x.new_empty((*x.shape[:-1], packed_NP.shape[0])),
    "modulate": lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
    "attention": lambda query, key, value, *rest: [torch.empty_like(v, memory_format=torch.contiguous_format) for v in value],
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"lowbit::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"lowbit::{_name}", "default", _DEFAULT[_name])
    torch.library.impl(f"lowbit::{_name}", "cpu", _on_cpu(_name))
    torch.library.impl(f"lowbit::{_name}", "cuda", _on_gpu(_name))
    torch.library.register_fake(f"lowbit::{_name}", _FAKE[_name])


def _shortcut(name: str):
    """The registered op; on plain CPU tensors the kernel itself, because torch's dispatcher takes as long as a small layer."""
    registered, kernel = getattr(torch.ops.lowbit, name).default, _CPU[name]

    def call(x: Tensor, *arguments):
        first = x if isinstance(x, Tensor) else x[0]
        plain = type(first) is Tensor and first.device.type == "cpu" and first.dtype in _SHORT and not torch.compiler.is_compiling()
        if plain and (name != "linear_wnan" or arguments[-1] in cpu.FORMATS) and not cpu.why_not():
            return kernel(x, *arguments)
        return registered(x, *arguments)
    call.__name__, call.__doc__ = name, f"`torch.ops.lowbit.{name}`: see its folder's naive.py."
    return call


def fused_linears(x: Tensor, *weights) -> FusedLinears | None:
    """`quant_linears` prepared for calls with inputs like x (see `FusedLinears` for `weights`); None where no CPU kernel takes them, or
    where it would read copies of the weights, which follow no change."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in cpu.FORMATS or cpu.why_not():
        return None
    prepared = FusedLinears(*weights)
    return None if prepared.copied else prepared


_SHORT = {*cpu.FORMATS, torch.int8}
block_hadamard, act_quant, linear_wnan, quant_linears, linear_wna16, modulate, attention = map(_shortcut, SCHEMAS)


@torch.no_grad()
def emulated_linear(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int | None,
                    act_bits: int, bias: Tensor | None, scratch: dict) -> Tensor:
    """y = Q_a(x) W^T + b as a float product of a dequantized weight that `scratch` keeps between calls: where no kernel runs."""
    return emulated.linear_wnan(x, packed_NP, scale_NG, zero_NG, bits, group_size, x.shape[-1], act_bits, bias, scratch)
