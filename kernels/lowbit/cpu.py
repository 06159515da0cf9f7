"""The C kernels as functions of tensors, with the references' signatures. Everything a kernel will read is checked here:
a size that does not fit is refused before a pointer is taken.

Dimension letters: M tokens, N out features, K in features, G groups along K, P packed bytes along K, R rank.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowbit import build
from lowbit.act_quant.naive import largest_code
from lowbit.formats import PACKED_BITS, packed_bytes

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class _Weight(ctypes.Structure):
    _fields_ = (("packed", _POINTER), ("scale", _POINTER), ("zero", _POINTER), ("n_out", _INT), ("k_in", _INT), ("group", _INT),
                ("bits", _INT))


class _Epilogue(ctypes.Structure):
    _fields_ = (("bias", _POINTER), ("low", _POINTER), ("up", _POINTER), ("y", _POINTER), ("bias_format", _INT), ("rank", _INT),
                ("gelu", _INT), ("y_format", _INT))


def why_not(*tensors: Tensor | None) -> str:
    """Empty where the kernels can run on such tensors, else the reason."""
    built = build.result()
    if built.library is None:
        return built.reason
    strange = [str(t.dtype) for t in tensors if t is not None and t.is_floating_point() and t.dtype not in FORMATS]
    return f"{strange[0]} is not a format of the kernels" if strange else ""


def label() -> str:
    """What runs, for the screen: the instruction set."""
    return build.result().reason


def _call(name: str, *arguments) -> None:
    if getattr(build.result().library, name)(*arguments, _INT(torch.get_num_threads())):
        raise MemoryError(f"{name}: out of memory for its scratch space")


def _rows(x: Tensor) -> Tensor:
    """(M, K), dense in memory."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _factor(factor_K: Tensor | None, k_in: int) -> Tensor | None:
    if factor_K is None:
        return None
    if factor_K.shape != (k_in,):
        raise ValueError(f"the factor has shape {tuple(factor_K.shape)}; the input has {k_in} features")
    return factor_K.to(torch.float32).contiguous()


def _check_block(block: int, k_in: int) -> None:
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two, not {block}")
    if k_in % block:
        raise ValueError(f"{k_in} features are not a multiple of the block {block}")


def block_hadamard(x: Tensor, block: int, factor_K: Tensor | None) -> Tensor:
    """See hadamard/naive.py."""
    _check_block(block, x.shape[-1])
    rows, factor_K = _rows(x), _factor(factor_K, x.shape[-1])
    y = torch.empty_like(rows)
    if rows.numel():
        _call("lowbit_hadamard", _POINTER(rows.data_ptr()), _INT(FORMATS[x.dtype]), _address(factor_K), _INT(block),
              _INT(len(rows)), _INT(x.shape[-1]), _POINTER(y.data_ptr()))
    return y.view(x.shape)


def act_quant(x: Tensor, factor_K: Tensor | None, block: int, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """See act_quant/naive.py."""
    k_in = x.shape[-1]
    width = group_size or k_in
    largest_code(bits)  # refuses widths that do not exist
    _check_block(block, k_in)
    if width and k_in % width:
        raise ValueError(f"{k_in} features are not a multiple of the group size {width}")
    rows, factor_K = _rows(x), _factor(factor_K, k_in)
    groups = k_in // width if width else 1
    q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.zeros(*x.shape[:-1], groups) if not rows.numel() else torch.empty(*x.shape[:-1], groups)
    if rows.numel():
        _call("lowbit_act_quant", _POINTER(rows.data_ptr()), _INT(FORMATS[x.dtype]), _address(factor_K), _INT(block), _INT(bits),
              _INT(width), _INT(len(rows)), _INT(k_in), _POINTER(q.data_ptr()), _POINTER(scale.data_ptr()))
    return q, scale


def linear_wnan(q: Tensor, act_scale: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
                bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool, dtype: torch.dtype) -> Tensor:
    """See linear_wnan/naive.py."""
    k_in = q.shape[-1]
    if q.dtype != torch.int8:
        raise ValueError(f"activations are held as int8, not {q.dtype}")
    weight, kept = _weight(packed_NP, scale_NG, zero_NG, bits, group_size, k_in)
    groups = scale_NG.shape[1]
    if act_scale.shape[:-1] != q.shape[:-1] or act_scale.shape[-1] not in (1, groups) or act_scale.dtype != torch.float32:
        raise ValueError(f"activation scales are {act_scale.dtype} {tuple(act_scale.shape)}; activations of shape {tuple(q.shape)} "
                         f"need float32 and 1 or {groups} a token")
    if act_scale.shape[-1] > 1 and k_in % (group_size or k_in):
        raise ValueError(f"grouped activations need whole groups; {k_in} is not a multiple of {group_size}")
    rows, act_scale = _rows(q), _rows(act_scale)
    y = torch.empty(*q.shape[:-1], len(packed_NP), dtype=dtype)
    end, kept_too = _epilogue(y, bias_N, low, up_NR, gelu_after, len(rows))
    if y.numel():
        _call("lowbit_linear_wnan", ctypes.byref(weight), ctypes.byref(end), _POINTER(rows.data_ptr()), _POINTER(act_scale.data_ptr()),
              _INT(act_scale.shape[-1]), _INT(len(rows)))
    del kept, kept_too
    return y


def linear_wna16(x: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
                 bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool) -> Tensor:
    """See linear_wna16/naive.py."""
    weight, kept = _weight(packed_NP, scale_NG, zero_NG, bits, group_size, x.shape[-1])
    rows = _rows(x)
    y = torch.empty(*x.shape[:-1], len(packed_NP), dtype=x.dtype)
    end, kept_too = _epilogue(y, bias_N, low, up_NR, gelu_after, len(rows))
    if y.numel():
        _call("lowbit_linear_wna16", ctypes.byref(weight), ctypes.byref(end), _POINTER(rows.data_ptr()), _INT(FORMATS[x.dtype]),
              _INT(len(rows)))
    del kept, kept_too
    return y


def _address(tensor: Tensor | None) -> _POINTER:
    return _POINTER(None if tensor is None else tensor.data_ptr())


def _weight(packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int, k_in: int):
    """(struct, the tensors its pointers lead into). Sizes that a kernel would read past are refused."""
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits}-bit weights are not supported; use one of {PACKED_BITS}")
    if group_size and group_size % 4:
        raise ValueError(f"the group size {group_size} is not a multiple of 4")
    if not k_in:
        raise ValueError("a layer without input features has no product")
    n_out, groups = len(packed_NP), -(-k_in // (group_size or k_in))
    expected = {"packed_NP": (packed_NP, torch.uint8, (n_out, packed_bytes(k_in, bits))),
                "scale_NG": (scale_NG, torch.float16, (n_out, groups))}
    if zero_NG is not None:
        expected["zero_NG"] = (zero_NG, torch.uint8, (n_out, groups))
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}")
    kept = [None if t is None else t.contiguous() for t in (packed_NP, scale_NG, zero_NG)]
    return _Weight(*(None if t is None else t.data_ptr() for t in kept), n_out, k_in, group_size or k_in, bits), kept


def _epilogue(y: Tensor, bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool, rows: int):
    """(struct, the tensors its pointers lead into)."""
    n_out = y.shape[-1]
    if bias_N is not None and tuple(bias_N.shape) != (n_out,):
        raise ValueError(f"the bias has shape {tuple(bias_N.shape)}; the layer has {n_out} outputs")
    rank = 0
    if low is not None:
        rank = low.shape[-1]
        if up_NR is None or tuple(up_NR.shape) != (n_out, rank) or low.numel() != rows * rank:
            raise ValueError(f"a low-rank branch of rank {rank} needs low ({rows}, {rank}) and up ({n_out}, {rank})")
        low, up_NR = low.float().contiguous(), up_NR.float().contiguous()
    bias_N = None if bias_N is None else bias_N.contiguous()
    kept = (bias_N, low, up_NR)
    pointers = [None if t is None else t.data_ptr() for t in kept]
    return _Epilogue(*pointers[:2], pointers[2] if rank else None, y.data_ptr(), FORMATS[bias_N.dtype] if bias_N is not None else 0,
                     rank, int(gelu_after), FORMATS[y.dtype]), kept
