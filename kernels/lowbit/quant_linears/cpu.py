"""`quant_linears` in one call of the C kernel. What does not change from call to call is prepared once: around the layers of a small
model Python took longer than the product.

Dimension letters: M tokens, N out features, K in features, G groups along K, P packed bytes along K, B samples.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import abi, build, cpu
from lowbit.quant_linears.naive import quant_linears as one_after_another
from lowbit.tensor_cache import TensorCache, memory

MOST_WEIGHTS = 8  # of one call, as lowbit.h has it
LARGE_INPUT = 1 << 20  # numbers; above, quantized beforehand: 10 % faster at 1024 x 3072, where inputs drive packed weights from the cache


def quant_linears(x: Sequence[Tensor], factor_K: Tensor | None, block: int, act_bits: Sequence[int], act_group: int,
                  packed: Sequence[Tensor], scale: Sequence[Tensor], zero: Sequence[Tensor | None], weight_bits: Sequence[int],
                  group_size: int, bias: Sequence[Tensor | None], gelu_after: Sequence[bool], residual: Tensor | None,
                  gate_BN: Tensor | None, clip: float = 1.0, mid_rise: bool = False) -> list[Tensor]:
    """See quant_linears/naive.py."""
    stored = (packed, scale, zero, weight_bits, group_size, bias, gelu_after)
    prepared = _fused_linears(factor_K, block, act_group, *stored, sum(part.shape[-1] for part in x))
    ys = prepared(x, act_bits, residual, gate_BN, clip, mid_rise)
    return ys or one_after_another(x, factor_K, block, act_bits, act_group, *stored, residual, gate_BN, clip, mid_rise)


class FusedLinears:
    """`quant_linears` of certain weights, prepared: what does not change from call to call is checked here and kept as a kernel reads it.

    Arguments as there, with the number of input features. It keeps the tensors' memory, which therefore stays what it reads, and not the
    tensors: whoever has them sees whether one was replaced, and prepares anew. `copied`: some tensor was not dense float32 or the like,
    and what is read is a copy, which follows no change. It may be called from several threads at once. Raises ValueError for what
    one call cannot hold."""

    def __init__(self, factor_K: Tensor | None, block: int, act_group: int, packed: Sequence[Tensor], scale: Sequence[Tensor],
                 zero: Sequence[Tensor | None], weight_bits: Sequence[int], group_size: int, bias: Sequence[Tensor | None],
                 gelu_after: Sequence[bool], k_in: int):
        if not len(packed) == len(scale) == len(zero) == len(weight_bits) == len(bias) == len(gelu_after) <= MOST_WEIGHTS:
            raise ValueError(f"one call takes at most {MOST_WEIGHTS} weights, each with its scales, zero points, width, bias and GELU")
        cpu.check_block(block, k_in)
        if act_group and (act_group != group_size or k_in % act_group):
            raise ValueError(f"{k_in} features in groups of {act_group}; grouped activations need whole groups of the weight's size "
                             f"{group_size}")
        given = (factor_K, *packed, *scale, *zero, *bias)
        factor_K, packed, scale = cpu.checked_factor(factor_K, k_in), [*map(cpu.dense, packed)], [*map(cpu.dense, scale)]
        zero = [each if each is None else cpu.dense(each) for each in zero]
        structs = [cpu.weight_struct(*each, group_size, k_in) for each in zip(packed, scale, zero, weight_bits)]
        ends, kept = zip(*(cpu.epilogue_struct(y, b, None, None, gelu, 0) for y, b, gelu in zip(map(_no_rows, packed), bias, gelu_after)))
        weights, ends = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, structs)), (abi.Epilogue * len(packed))(*ends)
        self._widths, self._k_in, self._block = [len(each) for each in packed], k_in, block
        self._call = struct.Struct(f"@5P4q{len(packed)}P{8 * (MOST_WEIGHTS - len(packed))}x").pack  # lowbit.h's LayersCall
        layers = abi.Layers(ctypes.addressof(weights), ctypes.addressof(ends), cpu.address(factor_K), len(packed), block,
                            scale[0].shape[-1] if act_group else 1)
        read = (factor_K, *packed, *scale, *zero, *(bias for bias, *_ in kept))
        self.copied = [*map(cpu.address, given)] != [*map(cpu.address, read)]
        self._kept = layers, weights, ends, structs, memory(*read)
        self._layers = ctypes.addressof(layers)

    def __call__(self, x: Sequence[Tensor], act_bits: Sequence[int], residual: Tensor | None, gate_BN: Tensor | None, clip: float,
                 mid_rise: bool) -> list[Tensor] | None:
        """The outputs; None for inputs that are faster quantized beforehand, or that no kernel of the CPU takes."""
        first, second = x[0], None
        numbers, number_format, library = first.numel(), cpu.FORMATS.get(first.dtype), build.result().library
        if number_format is None or library is None or not first.is_cpu or type(first) is not Tensor:
            return None
        if len(x) > 1:
            numbers = sum(part.numel() for part in x)
            if len(x) > 2 or first.shape[-1] % self._block:
                first = torch.cat(tuple(x), -1)
                number_format = cpu.FORMATS[first.dtype]
            else:
                second = cpu.dense(x[1])
                if second.dtype != first.dtype or second.shape[:-1] != first.shape[:-1]:
                    raise ValueError(f"parts of an input are {[(part.dtype, tuple(part.shape)) for part in x]}; they must differ in width "
                                     "alone")
        if numbers > LARGE_INPUT:
            return None
        first, (grids, _kept) = cpu.dense(first), cpu.grid_structs(tuple(act_bits), clip, mid_rise)
        *rows, width = first.shape
        if len(act_bits) != len(self._widths) or width + (0 if second is None else second.shape[-1]) != self._k_in:
            raise ValueError(f"{len(act_bits)} activation widths for {len(self._widths)} weights of {self._k_in} input features")
        ys = [first.new_empty(*rows, n_out) for n_out in self._widths]  # with a tuple it takes half a microsecond longer
        gated, _alive = (0, None) if residual is None else _gated(residual, gate_BN, ys)
        if numbers and library.functions["lowbit_quant_linears"](self._call(
                self._layers, gated, grids, first.data_ptr(), 0 if second is None else second.data_ptr(), width, number_format,
                numbers // self._k_in, torch.get_num_threads(), *[y.data_ptr() for y in ys])):
            raise cpu.out_of_memory("lowbit_quant_linears")
        return ys


def _fused_linears(factor_K, block: int, act_group: int, packed, scale, zero, weight_bits, group_size: int, bias, gelu_after,
                   k_in: int) -> FusedLinears:
    """The same, remembered on the first packed tensor with what it was made from."""
    asked = (block, act_group, tuple(weight_bits), group_size, tuple(gelu_after), k_in, tuple(
        None if each is None else (each.data_ptr(), each.dtype, each.shape) for each in (factor_K, *packed, *scale, *zero, *bias)))
    kept = getattr(packed[0], "_lowbit_fused", None)
    if kept is not None and kept.asked == asked:
        return kept.made
    fused_linears = FusedLinears(factor_K, block, act_group, packed, scale, zero, weight_bits, group_size, bias, gelu_after, k_in)
    if not fused_linears.copied:
        packed[0]._lowbit_fused = TensorCache(asked, fused_linears)
    return fused_linears


def _gated(residual: Tensor, gate_BN: Tensor | None, ys: list[Tensor]):
    """(address of the struct, what must stay alive: it, and the tensors its pointers lead into)."""
    y = ys[0]
    if len(ys) > 1 or y.dim() != 3 or residual.shape != y.shape or residual.dtype != y.dtype:
        raise ValueError(f"a residual belongs to one output (B, S, N) of its own type; it is {residual.dtype} {tuple(residual.shape)}, the "
                         f"outputs are {[(each.dtype, tuple(each.shape)) for each in ys]}")
    if gate_BN is None or gate_BN.shape != (len(y), y.shape[2]) or gate_BN.dtype != y.dtype:
        raise ValueError(f"the gate of a residual must be {y.dtype} {(len(y), y.shape[2])}")
    residual, gate_BN = cpu.dense(residual), gate_BN if gate_BN.stride(1) == 1 else gate_BN.contiguous()
    end = abi.Epilogue(residual=residual.data_ptr(), gate=gate_BN.data_ptr(), gate_stride=gate_BN.stride(0), tokens=max(1, y.shape[1]))
    return ctypes.addressof(end), (end, residual, gate_BN)


def _no_rows(packed_NP: Tensor) -> Tensor:
    return torch.empty(0, len(packed_NP))
