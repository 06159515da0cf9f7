"""The two modules that stand in for an nn.Linear: a packed weight, or the float weight with quantized activations.

Dimension letters: N out features, K in features, G groups along K, P packed bytes along K, R rank of a branch.

    y = Q_a(T(x)) W^T + T(x) down^T up^T + b

`LayerFormat` declares a layer's arithmetic and `Extras` holds the tensors that go beyond the plain case (one packed weight,
per-token activations, a Hadamard transform or none). `LayerFormat.beyond_kernel` says in words what kernels do not
have; such a layer is emulated. Both modules read the activation bits of their layer from their model's step state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lowbit import hadamard, ops
from lowbit.formats import PACKED_BITS, packed_bytes
from lowbit.tensor_cache import identity, memory
from pydantic import Field, field_validator
from torch import Tensor, nn

from workbench.models.denoiser import StepState
from workbench.options import GROUP_SIZES, BadInput, Frozen
from workbench.quant import activations, grids, transforms
from workbench.quant.activations import PLAIN, ActFormat
from workbench.quant.lowrank import Branch, Down
from workbench.quant.transforms import Smooth, Transform
from workbench.types import QuantWeight


class LayerFormat(Frozen):
    """Everything about a stored layer that is not a tensor. `layer_index` None: activations stay float."""

    n_out: int = Field(ge=1, le=1 << 20)
    k_in: int = Field(ge=1, le=1 << 20)
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    has_bias: bool = False
    transform: str = Field(default="none", pattern="^(none|hadamard|smooth|smooth_hadamard)$")
    seed: int = Field(default=0, ge=0)
    layer_index: int | None = Field(default=None, ge=0)
    act: ActFormat = PLAIN
    rank: int = Field(default=0, ge=0, le=1 << 14)
    input_group: str | None = Field(default=None, max_length=256, description="whose `smooth_K` and `down_RK` it shares")

    @field_validator("bits")
    @classmethod
    def _packable(cls, bits):
        if bits not in PACKED_BITS:
            raise ValueError(f"{bits} bits cannot be packed; use one of {PACKED_BITS}")
        return bits

    @field_validator("group_size")
    @classmethod
    def _known_group(cls, group_size):
        if group_size is not None and group_size not in GROUP_SIZES:
            raise ValueError(f"group size {group_size} is not supported; use one of {GROUP_SIZES} or none")
        return group_size

    def shapes(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """(type, shape) of every tensor the layer is stored as; type None: any 16-bit float."""
        groups = len(grids.groups(self.k_in, self.group_size))
        shapes = {"packed_NP": (torch.uint8, (self.n_out, packed_bytes(self.k_in, self.bits))),
                  "scale_NG": (torch.float16, (self.n_out, groups))}
        if not self.symmetric:
            shapes["zero_NG"] = (torch.uint8, (self.n_out, groups))
        if self.has_bias:
            shapes["bias"] = (None, (self.n_out,))
        if self.rank:
            shapes["up_NR"] = (torch.float16, (self.n_out, self.rank))
        if self.act.scale == "tensor":
            shapes["act_range_2"] = (torch.float16, (2,))
        return shapes

    def shared_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The same for the tensors that layers of one input share, stored once under the name of `input_group`."""
        shapes = {"smooth_K": (torch.float16, (self.k_in,))} if self.transform.startswith("smooth") else {}
        return {**shapes, "down_RK": (torch.float16, (self.rank, self.k_in))} if self.rank else shapes

    def beyond_kernel(self) -> tuple[str, ...]:
        """What this layer's arithmetic asks for that no kernel has, in words; empty: kernels run it."""
        if self.layer_index is None or runs_on_kernels(self.act, self.k_in, self.group_size):
            return ()
        return (self.act.describe(),)

    def refused_on(self, device_type: str) -> str:
        """"" if such a device's kernels take a layer of these sizes, else the reason."""
        block = hadamard.block_size(self.k_in) if self.transform.endswith("hadamard") else 1
        return ops.why_not_layer(device_type, self.k_in, block, 0 if self.layer_index is None else self.act.group_size or 0)


def runs_on_kernels(act: ActFormat, k_in: int, group_size: int | None) -> bool:
    """Whether kernels have this activation quantizer: no zero point, one scale per token or per group of the weight's own size."""
    own_groups = act.scale == "group" and act.group_size == group_size and k_in % group_size == 0
    return act.grid != "asymmetric" and (act.scale == "token" or own_groups)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a layer's arithmetic has beyond the plain case. range_2 float16: of static activations. input_group: the first
    layer that reads the same tensor, under whose name shared tensors are stored."""

    act: ActFormat = PLAIN
    range_2: Tensor | None = None
    branch: Branch | None = None
    input_group: str | None = None


def current_bits(step_state: StepState | None, layer_index: int | None) -> int:
    """Activation bits of a layer in the running forward; 16 where nothing sets them."""
    return 16 if layer_index is None or step_state is None or step_state.row is None else step_state.row[layer_index] or 16


class _FusedLinears(NamedTuple):
    """What `QuantLinear.run_fused` found out about layers that read one tensor. weights: arguments of `ops.quant_linears`, None where
    one pass does not hold them; call: the same prepared for a CPU; buffers: every layer's, None among them; read, addresses: of `call`,
    the tensors and where they were. `call` keeps that memory, so nothing else can come to lie there, and an address tells `.data` apart."""

    others: tuple[nn.Module, ...]
    gelu_last: bool
    weights: tuple | None
    call: Callable | None
    buffers: list[Tensor | None]
    read: list[Tensor]
    addresses: list[int]
    grid: tuple

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these layers' buffers are still the ones that were found, and where they were."""
        buffers = _buffers(layers)
        return (len(buffers) == len(self.buffers) and all(map(operator.is_, buffers, self.buffers))
                and [*map(Tensor.data_ptr, self.read)] == self.addresses)


def _buffers(layers: Sequence[nn.Module]) -> list[Tensor | None]:
    found = []
    for layer in layers:
        found += layer._buffers.values()
    return found


class QuantLinear(nn.Module):
    """y = Q_a(T(x)) W^T + T(x) down^T up^T + b with W packed. No gradient flows through it: rounding has none.

    `scratch` keeps the dequantized weight of the emulated product between calls; a kernel needs none. It may be shared by every module
    made of the same weight, is not part of the state, and does not count as resident: `drop_cache` empties it."""

    def __init__(self, weight: QuantWeight, bias: Tensor | None, transform: Transform, *, step_state: StepState | None = None,
                 layer_index: int | None = None, scratch: dict | None = None, extras: Extras = Extras()):
        super().__init__()
        self.register_buffer("packed_NP", weight.packed_NP)
        self.register_buffer("scale_NG", weight.scale_NG)
        self.register_buffer("zero_NG", weight.zero_NG)
        self.register_buffer("bias", None if bias is None else _as_16_bits(bias))
        self.bits, self.group_size, self.k_in = weight.bits, weight.group_size, weight.k_in
        self.in_features, self.out_features = weight.k_in, len(weight.packed_NP)
        self.transform, self.step_state, self.layer_index = transform, step_state, layer_index
        self.act, self.input_group = extras.act, extras.input_group
        self.down = None if extras.branch is None else extras.branch.down
        if extras.branch is not None:
            self.register_buffer("up_NR", extras.branch.up_NR)
        if extras.range_2 is not None:
            self.register_buffer("act_range_2", extras.range_2)
        self._scratch = {} if scratch is None else scratch
        self._fused: _FusedLinears | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, gelu_after=False)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh form) of the layer's output, applied before it is written."""
        return self._product(x, gelu_after=True)

    @torch.no_grad()
    def _product(self, x: Tensor, gelu_after: bool) -> Tensor:
        act_bits, backend = current_bits(self.step_state, self.layer_index), ops.backend(x.device.type, x.dtype)
        if not backend.is_kernel or (act_bits != 16 and not runs_on_kernels(self.act, self.k_in, self.group_size)):
            y = self._emulated(x, act_bits)
            return nn.functional.gelu(y, approximate="tanh") if gelu_after else y
        weight = (self.packed_NP, self.scale_NG, self.zero_NG, self.bits, self.group_size or 0)
        low, up_NR = (None, None) if self.down is None else (self.down.forward(self.transform.forward(x)), self.up_NR)
        if act_bits == 16:
            return ops.linear_wna16(self.transform.forward(x), *weight, self.bias, low, up_NR, gelu_after)
        q, scale = self.transform.quantized(x, act_bits, self.act.group_size or 0, *self.act.kernel_grid)
        return ops.linear_wnan(q, scale, *weight, self.bias, low, up_NR, gelu_after, x.dtype)

    def run_fused(self, others: Sequence[nn.Module], x: Sequence[Tensor], *, gelu_last: bool = False, residual: Tensor | None = None,
                  gate_BN: Tensor | None = None) -> list[Tensor] | None:
        """Outputs of this layer and of `others`, which read the same tensor (`x`, or its parts side by side), in one pass that quantizes it
        once per width; the last one's after GELU if asked, a single one's as `residual` + gate y. None where that pass does not hold
        them: another kind of layer, transform or group size, or 16 bits."""
        fused, first, layers = self._fused, x[0], (self, *others)
        if fused is None or fused.others != others or fused.gelu_last != gelu_last or not fused.holds(layers):
            fused = self._fused = self._fuse(layers, gelu_last, first)
        if fused.weights is None:
            return None
        act_bits = [current_bits(layer.step_state, layer.layer_index) for layer in layers]
        if 16 in act_bits:
            return None
        made = None
        if fused.call is not None and not torch.compiler.is_compiling():
            made = fused.call(x, act_bits, residual, gate_BN, *fused.grid)
        if made is None:
            if not ops.backend(first.device.type, first.dtype).is_kernel:
                return None
            factor_K, block, act_group, *stored = fused.weights
            with torch.no_grad():
                made = ops.quant_linears(x, factor_K, block, act_bits, act_group, *stored, residual, gate_BN, *fused.grid)
        return made

    def _fuse(self, layers: tuple[nn.Module, ...], gelu_last: bool, x: Tensor) -> _FusedLinears:
        alike = all(type(layer) is QuantLinear and layer.transform is self.transform and layer.down is None
                    and layer.group_size == self.group_size and layer.act == self.act for layer in layers)
        buffers = _buffers(layers)
        if not alike or not runs_on_kernels(self.act, self.k_in, self.group_size):
            return _FusedLinears(layers[1:], gelu_last, None, None, buffers, [], [], ())
        packed, scale, zero, bias = zip(*(map(layer._buffers.get, ("packed_NP", "scale_NG", "zero_NG", "bias")) for layer in layers))
        weights = (*self.transform.factor(x.device), self.act.group_size or 0, packed, scale, zero, tuple(layer.bits for layer in layers),
                   self.group_size or 0, bias, (False,) * (len(layers) - 1) + (gelu_last,))
        call = ops.fused_linears(x, *weights, self.k_in)
        read = [] if call is None else [buffer for buffer in buffers if buffer is not None]
        addresses = [buffer.data_ptr() for buffer in read]
        return _FusedLinears(layers[1:], gelu_last, weights, call, buffers, read, addresses, self.act.kernel_grid)

    def _emulated(self, x: Tensor, bits: int) -> Tensor:
        mixed = self.transform.forward(x)
        rounded = mixed
        if self.act != PLAIN:  # rounded here, so that the product takes the result as it is
            rounded, bits = activations.fake_quantize(mixed, bits, self.act, self._buffers.get("act_range_2")), 16
        y = ops.emulated_linear(rounded, self.packed_NP, self.scale_NG, self.zero_NG, self.bits, self.group_size, bits, self.bias,
                                self._scratch)
        return y if self.down is None else y + nn.functional.linear(self.down.forward(mixed), self.up_NR.to(x.dtype))

    def _apply(self, fn, recurse=True):
        # a cached weight would stay behind on the old device; float16 scales and codes never change type with the model
        self.drop_cache()
        self._fused = None
        moved = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in moved.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fused": None}  # addresses mean nothing to a copy

    def drop_cache(self) -> None:
        """Give the memory of the dequantized weight back."""
        self._scratch.clear()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors it is stored as, without those it shares with other layers of its input."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def format(self) -> LayerFormat:
        return LayerFormat(n_out=self.out_features, k_in=self.k_in, bits=self.bits, group_size=self.group_size,
                           symmetric=self.zero_NG is None, has_bias=self.bias is not None, transform=self.transform.name,
                           seed=self.transform.seed, layer_index=self.layer_index, act=self.act,
                           rank=0 if self.down is None else len(self.down.down_RK), input_group=self.input_group)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by the names of `LayerFormat.shapes`."""
        return {name: buffer.contiguous() for name, buffer in self.named_buffers()}

    def shared_tensors(self) -> dict[str, Tensor]:
        """The tensors of `LayerFormat.shared_shapes`."""
        shared = {"smooth_K": self.transform.smooth_K} if isinstance(self.transform, Smooth) else {}
        return shared if self.down is None else shared | {"down_RK": self.down.down_RK}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layer_format: LayerFormat, *, step_state: StepState | None = None,
                     shared: Mapping[str, Tensor] | None = None) -> QuantLinear:
        """The inverse of `tensors`, `shared_tensors` and `format`. Anything that does not fit the format is refused."""
        shared = {} if shared is None else shared
        _check_tensors(tensors, layer_format.shapes())
        _check_tensors(shared, layer_format.shared_shapes())
        zero_NG = tensors.get("zero_NG")
        if zero_NG is not None and int(zero_NG.max()) >= 1 << layer_format.bits:
            raise BadInput(f"zero point {int(zero_NG.max())} does not fit in {layer_format.bits} bits")
        for name, tensor in (*tensors.items(), *shared.items()):
            if tensor.is_floating_point() and name != "scale_NG" and not bool(torch.isfinite(tensor).all()):
                raise BadInput(f"a stored {name} holds NaN or infinity")
        weight = QuantWeight(packed_NP=tensors["packed_NP"], scale_NG=tensors["scale_NG"], zero_NG=zero_NG,
                             bits=layer_format.bits, group_size=layer_format.group_size, k_in=layer_format.k_in)
        branch = Branch(up_NR=tensors["up_NR"], down=Down(shared["down_RK"])) if layer_format.rank else None
        transform = transforms.make(layer_format.transform, layer_format.k_in, layer_format.seed, shared.get("smooth_K"))
        extras = Extras(act=layer_format.act, range_2=tensors.get("act_range_2"), branch=branch, input_group=layer_format.input_group)
        return cls(weight, tensors.get("bias"), transform, step_state=step_state, layer_index=layer_format.layer_index, extras=extras)


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping) -> None:
    if set(tensors) != set(expected):
        raise BadInput(f"a stored layer has the tensors {sorted(tensors)}; expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype not in ((dtype,) if dtype else (torch.float16, torch.bfloat16)):
            raise BadInput(f"{name} is {found.dtype} {tuple(found.shape)}; expected {dtype or '16-bit float'} {shape}")


class FloatLinear(nn.Linear):
    """A layer whose plan keeps the weight in float. At 16 activation bits it is the original layer, bit for bit."""

    def __init__(self, linear: nn.Linear, transform: Transform, *, step_state: StepState | None, layer_index: int,
                 scratch: dict | None = None, extras: Extras = Extras()):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.transform, self.step_state, self.layer_index = transform, step_state, layer_index
        self.act, self.range_2, self.input_group = extras.act, extras.range_2, extras.input_group
        self._scratch = {} if scratch is None else scratch

    def forward(self, x: Tensor) -> Tensor:
        bits = current_bits(self.step_state, self.layer_index)
        if bits == 16:
            return nn.functional.linear(x, self.weight, self.bias)
        with torch.no_grad():
            kept, asked = self._scratch.get(x.dtype), identity(self.weight)
            if kept is None or kept[1] != asked:
                kept = self._scratch[x.dtype] = self.transform.weight(self.weight.to(x.dtype)), asked, memory(self.weight)
            rounded = activations.fake_quantize(self.transform.forward(x), bits, self.act, self.range_2)
            return nn.functional.linear(rounded, kept[0], self.bias)

    def shared_tensors(self) -> dict[str, Tensor]:
        """The smoothing vector, if there is one."""
        return {"smooth_K": self.transform.smooth_K} if isinstance(self.transform, Smooth) else {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layer stored in a 16-bit float type, and of its static range."""
        return 2 * sum(parameter.numel() for parameter in self.parameters()) + (0 if self.range_2 is None else 4)


def _as_16_bits(bias: Tensor) -> Tensor:
    """The bias in the 16-bit type that keeps it: bfloat16 where exact, else float16."""
    bias = bias.detach()
    if bias.dtype in (torch.float16, torch.bfloat16):
        return bias
    return bias.bfloat16() if bool((bias.bfloat16() == bias).all()) else bias.half()
