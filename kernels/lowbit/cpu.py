"""The C kernels as functions of tensors, with the references' signatures. Everything a kernel will read is checked here:
a size that does not fit is refused before a pointer is taken.

A layer of a small model takes tens of microseconds, so what Python does around it counts: functions are bound once, dense
tensors are passed as they are, and a weight that was checked is remembered on its tensor.

Dimension letters: M tokens, N out features, K in features, G groups along K, P packed bytes along K, R rank,
B samples, S tokens of one, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import abi, build
from lowbit.act_quant.naive import grid_of, held_as
from lowbit.attention.naive import attention as torch_attention
from lowbit.formats import PACKED_BITS, packed_bytes
from lowbit.tensor_cache import TensorCache

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_STREAMS, MOST_CHANNELS = 4, 512  # of one call, and of a head, as attention/cpu.c has it
MOST_TOKENS = 1024  # that attend to each other in the kernel: more do not fit in a cache, and torch's own reads less memory


def why_not() -> str:
    """Empty where the kernels are built, else the reason."""
    built = build.result()
    return "" if built.library is not None else built.reason


def call(name: str, *arguments) -> None:
    """Call the function of that name in the library that is in use, with the number of threads as its last argument. Raises MemoryError."""
    if build.result().library.functions[name](*arguments, torch.get_num_threads()):
        raise out_of_memory(name)


def out_of_memory(name: str) -> MemoryError:
    return MemoryError(f"{name}: out of memory for its scratch space")


def dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _wide(tensor: Tensor) -> Tensor:
    """A parameter or table as dense float32, converted once as long as it does not change."""
    if tensor.dtype == torch.float32:
        return dense(tensor)
    if tensor.is_inference():  # such tensors count no versions
        return dense(tensor.float())
    asked, kept = (tensor.data_ptr(), tensor._version), getattr(tensor, "_lowbit_wide", None)
    if kept is None or kept.asked != asked:  # the memory is kept too, or `.data = other` twice could bring the address back
        kept = tensor._lowbit_wide = TensorCache(asked, (dense(tensor.float()), tensor.untyped_storage()))
    return kept.made[0]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def checked_factor(factor_K: Tensor | None, k_in: int) -> Tensor | None:
    if factor_K is None:
        return None
    if factor_K.shape != (k_in,):
        raise ValueError(f"the factor has shape {tuple(factor_K.shape)}; the input has {k_in} features")
    return dense(factor_K if factor_K.dtype == torch.float32 else factor_K.float())


def check_block(block: int, k_in: int) -> None:
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two, not {block}")
    if k_in % block:
        raise ValueError(f"{k_in} features are not a multiple of the block {block}")


def block_hadamard(x: Tensor, block: int, factor_K: Tensor | None) -> Tensor:
    """See hadamard/naive.py."""
    k_in = x.shape[-1]
    check_block(block, k_in)
    x, factor_K = dense(x), checked_factor(factor_K, k_in)
    y = torch.empty_like(x)
    if y.numel():
        call("lowbit_hadamard", x.data_ptr(), FORMATS[x.dtype], address(factor_K), block, x.numel() // k_in, k_in, y.data_ptr())
    return y


@functools.lru_cache(maxsize=256)
def grid_structs(act_bits: tuple[int, ...], clip: float, mid_rise: bool):
    """(address of the structs, the structs); refuses widths that do not exist."""
    grids = [grid_of(bits, clip, mid_rise) for bits in act_bits]
    structs = (abi.ActGrid * len(grids))(*((bits, grid.mid_rise, grid.share) for bits, grid in zip(act_bits, grids)))
    return ctypes.addressof(structs), structs


def act_quant(x: Tensor, factor_K: Tensor | None, block: int, bits: int, group_size: int, clip: float = 1.0, mid_rise: bool = False,
              fp8: bool = False) -> tuple[Tensor, Tensor]:
    """See act_quant/naive.py."""
    k_in = x.shape[-1]
    width, (grid, _kept), held = group_size or k_in, grid_structs((bits,), clip, mid_rise), held_as(bits, fp8)
    check_block(block, k_in)
    if width and k_in % width:
        raise ValueError(f"{k_in} features are not a multiple of the group size {width}")
    x, factor_K = dense(x), checked_factor(factor_K, k_in)
    q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty((*x.shape[:-1], k_in // width if width else 1), dtype=torch.float32)
    if x.numel():
        call("lowbit_act_quant", x.data_ptr(), FORMATS[x.dtype], address(factor_K), block, grid, width, x.numel() // k_in, k_in,
              q.data_ptr(), scale.data_ptr())
    else:
        scale.zero_()
    return (q.to(held) if fp8 else q), scale


def linear_wnan(q: Tensor, act_scale: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
                bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool, dtype: torch.dtype) -> Tensor:
    """See linear_wnan/naive.py."""
    k_in, groups = q.shape[-1], scale_NG.shape[-1]
    packed_NP, scale_NG, zero_NG = dense(packed_NP), dense(scale_NG), zero_NG if zero_NG is None else dense(zero_NG)
    weight = weight_struct(packed_NP, scale_NG, zero_NG, bits, group_size, k_in)
    scales = act_scale.shape[-1]
    if q.dtype != torch.int8 or act_scale.dtype != torch.float32 or act_scale.shape[:-1] != q.shape[:-1] or scales not in (1, groups):
        raise ValueError(f"activations are {q.dtype} {tuple(q.shape)} with scales {act_scale.dtype} {tuple(act_scale.shape)}; "
                         f"int8 is needed, and 1 or {groups} float32 scales a token")
    if scales > 1 and k_in % group_size:
        raise ValueError(f"grouped activations need whole groups; {k_in} is not a multiple of {group_size}")
    q, act_scale = dense(q), dense(act_scale)
    y = torch.empty((*q.shape[:-1], weight.n_out), dtype=dtype)
    rows = q.numel() // k_in
    end, _kept = epilogue_struct(y, bias_N, low, up_NR, gelu_after, rows)
    if y.numel():
        call("lowbit_linear_wnan", weight, end, q.data_ptr(), act_scale.data_ptr(), scales, rows)
    return y


def linear_wna16(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
                 bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool) -> Tensor:
    """See linear_wna16/naive.py."""
    k_in = x.shape[-1]
    packed_NP, scale_NG, zero_NG = dense(packed_NP), dense(scale_NG), zero_NG if zero_NG is None else dense(zero_NG)
    weight = weight_struct(packed_NP, scale_NG, zero_NG, bits, group_size, k_in)
    x = dense(x)
    y = torch.empty((*x.shape[:-1], weight.n_out), dtype=x.dtype)
    rows = x.numel() // k_in
    end, _kept = epilogue_struct(y, bias_N, low, up_NR, gelu_after, rows)
    if y.numel():
        call("lowbit_linear_wna16", weight, end, x.data_ptr(), FORMATS[x.dtype], rows)
    return y


def weight_struct(packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int, k_in: int) -> abi.Weight:
    """The struct, remembered on the packed tensor with what it was made from. Sizes that a kernel would read past are refused."""
    asked = (bits, group_size, k_in, packed_NP.data_ptr(), scale_NG.data_ptr(), packed_NP.shape, scale_NG.shape, scale_NG.dtype)
    asked = asked if zero_NG is None else (*asked, zero_NG.data_ptr(), zero_NG.shape, zero_NG.dtype)
    kept = getattr(packed_NP, "_lowbit_weight", None)
    if kept is not None and kept.asked == asked:
        return kept.made
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits}-bit weights are not supported; use one of {PACKED_BITS}")
    if group_size < 0 or group_size % 4:
        raise ValueError(f"the group size {group_size} is not a multiple of 4")
    if not k_in:
        raise ValueError("a layer without input features has no product")
    if ((1 << bits) - 1) * 127 * (group_size or k_in) >= 1 << 31:
        raise ValueError(f"a sum over {group_size or k_in} products of {bits} and 8 bits can exceed 32 bits; use groups")
    n_out, groups = len(packed_NP), -(-k_in // (group_size or k_in))
    expected = {"packed_NP": (packed_NP, torch.uint8, (n_out, packed_bytes(k_in, bits))),
                "scale_NG": (scale_NG, torch.float16, (n_out, groups))}
    if zero_NG is not None:
        expected["zero_NG"] = (zero_NG, torch.uint8, (n_out, groups))
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected a dense {dtype} {shape}")
    struct = abi.Weight(packed_NP.data_ptr(), scale_NG.data_ptr(), address(zero_NG), n_out, k_in, group_size or k_in, bits)
    packed_NP._lowbit_weight = TensorCache(asked, struct)
    return struct


def epilogue_struct(y: Tensor, bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool, rows: int):
    """(struct, the tensors its pointers lead into)."""
    n_out, rank, bias_format = y.shape[-1], 0, 0
    if bias_N is not None:
        if bias_N.shape != (n_out,) or bias_N.dtype not in FORMATS:
            raise ValueError(f"the bias is {bias_N.dtype} {tuple(bias_N.shape)}; the layer has {n_out} outputs")
        bias_N, bias_format = dense(bias_N), FORMATS[bias_N.dtype]
    if low is not None:
        rank = low.shape[-1]
        if up_NR is None or tuple(up_NR.shape) != (n_out, rank) or low.numel() != rows * rank:
            raise ValueError(f"a low-rank branch of rank {rank} needs low ({rows}, {rank}) and up ({n_out}, {rank})")
        low, up_NR = dense(low.float()), dense(up_NR.float())
    struct = abi.Epilogue(address(bias_N), address(low), address(up_NR) if rank else None, y.data_ptr(), bias_format, rank, gelu_after,
                       FORMATS[y.dtype])
    return struct, (bias_N, low, up_NR)


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """See modulate/naive.py."""
    samples, tokens, channels = x_BSD.shape
    for name, part in (("shift", shift_BD), ("scale", scale_BD)):
        if part.shape != (samples, channels) or part.dtype != x_BSD.dtype:
            raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}; expected {x_BSD.dtype} {(samples, channels)}")
    if shift_BD.stride() != scale_BD.stride() or shift_BD.stride(1) != 1:
        shift_BD, scale_BD = shift_BD.contiguous(), scale_BD.contiguous()
    x_BSD = dense(x_BSD)
    y = torch.empty_like(x_BSD)
    if y.numel():
        call("lowbit_modulate", x_BSD.data_ptr(), FORMATS[x_BSD.dtype], shift_BD.data_ptr(), scale_BD.data_ptr(), shift_BD.stride(0), eps,
              samples, tokens, channels, y.data_ptr())
    return y


def attention(query: Sequence[Tensor], key: Sequence[Tensor], value: Sequence[Tensor], query_norm: Sequence[Tensor],
              key_norm: Sequence[Tensor], cos_SC: Tensor, sin_SC: Tensor, eps: float) -> list[Tensor]:
    """See attention/naive.py."""
    if cos_SC.shape[0] > MOST_TOKENS:
        return torch_attention(query, key, value, query_norm, key_norm, cos_SC, sin_SC, eps)
    dtype, (samples, _, width), channels = value[0].dtype, value[0].shape, cos_SC.shape[-1]
    if not len(query) == len(key) == len(value) == len(query_norm) == len(key_norm) <= MOST_STREAMS:
        raise ValueError(f"one call takes at most {MOST_STREAMS} streams, each with queries, keys, values and two norms")
    if channels % 2 or not 0 < channels <= MOST_CHANNELS or width % channels:
        raise ValueError(f"{width} channels do not make heads of {channels}; a head has an even number, at most {MOST_CHANNELS}")
    ys, structs, kept, tokens = [], [], [], 0
    for q, k, v, q_norm, k_norm in zip(query, key, value, query_norm, key_norm):
        shape = v.shape
        if not (q.shape == k.shape == shape and q.dtype == k.dtype == v.dtype == dtype and shape[0] == samples and shape[2] == width):
            raise ValueError(f"query, key and value are {[(part.dtype, tuple(part.shape)) for part in (q, k, v)]}; expected {dtype}, "
                             f"{samples} samples of {width} channels")
        if not q_norm.shape == k_norm.shape == (channels,):
            raise ValueError(f"norm weights are {[tuple(norm.shape) for norm in (q_norm, k_norm)]}; a head has {channels} channels")
        stream = dense(q), dense(k), dense(v), _wide(q_norm), _wide(k_norm), torch.empty(*shape, dtype=dtype)
        ys.append(stream[-1])
        structs.append(abi.Stream(*[part.data_ptr() for part in stream], shape[1]))
        kept.append(stream)
        tokens += shape[1]
    cos_SC, sin_SC = _wide(cos_SC), _wide(sin_SC)
    if not cos_SC.shape == sin_SC.shape == (tokens, channels):
        raise ValueError(f"tables {tuple(cos_SC.shape)} do not fit {tokens} tokens of {channels} channels")
    if samples * tokens:
        call("lowbit_attention", (abi.Stream * len(structs))(*structs), len(structs), FORMATS[dtype], cos_SC.data_ptr(),
              sin_SC.data_ptr(), eps, samples, width // channels, channels)
    return ys
