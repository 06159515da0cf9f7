"""What the Triton kernels' callers share. Nothing here imports Triton until a kernel is launched.

Dimension letters: M tokens, K features. Triton offers two ways to run a kernel: compiled, on a GPU, or interpreted by NumPy on the CPU,
which is slow and there for tests (`TRITON_INTERPRET=1`, set before Triton is first imported).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys

import torch
from torch import Tensor

from lowbit.act_quant.naive import FP8_BITS

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)  # int8 and bfloat16 matrix instructions
OLDEST_FP8 = (8, 9)
FP8_CHOSEN = ((10, 3),)  # Blackwell Ultra gave most of its int8 units up (NVIDIA's data sheet); elsewhere FP8 is equal at best


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


def why_not(x: Tensor) -> str:
    """"" if a kernel can run on this tensor's device, else the reason in a few words."""
    return _why_not_triton() or _why_not_on(x.device, x.is_cuda)


def why_not_cuda() -> str:
    """`why_not` for the CUDA device that tensors are put on, of which none need exist."""
    return _why_not_triton() or _why_not_on(torch.device("cuda"), torch.cuda.is_available())


def _why_not_triton() -> str:
    return "Triton is not installed" if "triton" not in sys.modules and importlib.util.find_spec("triton") is None else ""


def _why_not_on(device: torch.device, is_cuda: bool) -> str:
    if interpreted():
        return "" if device.type == "cpu" else "Triton's interpreter reads tensors of the CPU only"
    if not is_cuda:
        return "the tensor is not on a GPU" if torch.cuda.is_available() else "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *OLDEST_CAPABILITY)
    return ""


def why_not_fp8(x: Tensor) -> str:
    """"" if the tensor's device has FP8 matrix units, else the reason in a few words. The interpreter computes with them in float32."""
    return _why_not_fp8_on(x.device)


def _why_not_fp8_on(device: torch.device | str) -> str:
    if interpreted():
        return ""
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= OLDEST_FP8 else "compute capability {}.{} has no FP8 units".format(*capability)


def chooses_fp8(x: Tensor, act_bits: int) -> bool:
    """Whether codes of x are to be held in FP8: they are exact in it, and the device's FP8 units are the faster ones by published rates,
    or asked for (`LOWBIT_GPU=fp8`; `int8` never takes them)."""
    return x.is_cuda and act_bits in FP8_BITS and _takes_fp8(x.device)


def _takes_fp8(device: torch.device | str) -> bool:
    if _why_not_fp8_on(device):
        return False
    asked = os.environ.get("LOWBIT_GPU", "")
    if asked not in ("", "fp8", "int8"):
        raise ValueError(f"LOWBIT_GPU is {asked!r}; use fp8, int8 or nothing")
    return asked == "fp8" or (not asked and torch.cuda.get_device_capability(device) in FP8_CHOSEN)


def units() -> str:
    """What multiplies on the CUDA device, for the screen; with the reason where FP8 units were asked for and there are none."""
    if _takes_fp8("cuda"):
        return f"int8 matrix units (FP8 ones for activations up to {max(FP8_BITS)} bits)"
    missing = _why_not_fp8_on("cuda") if os.environ.get("LOWBIT_GPU", "") == "fp8" else ""
    return f"int8 matrix units (FP8 ones were asked for: {missing})" if missing else "int8 matrix units"


def why_not_float(x: Tensor) -> str:
    """`why_not`, for an input that must be a float type the kernels know."""
    if x.dtype not in FLOAT_TYPES:
        return f"{str(x.dtype).removeprefix('torch.')} input"
    return why_not(x)


def dense(x: Tensor | None) -> Tensor | None:
    """x itself where its memory is contiguous (asking costs less than torch's own no-op), else a copy."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """x as a contiguous matrix (M, K) of its last axis."""
    return dense(x).view(x.shape[:-1].numel(), x.shape[-1])


def ceil_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int, per_thread: int = 16) -> int:
    """Warps (of 32 threads) so that each thread holds about `per_thread` of `elements`; 1 to 32."""
    return min(max(ceil_power(elements // (32 * per_thread)), 1), 32)


def device_of(x: Tensor):
    """A context in which kernels are launched on x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
