"""The layers of a model, observed in one forward: their order, tokens, calls, and which of them read the same tensor.

A family says by rules what may be done to its linears; everything else is seen by hooks. The forward may run on the meta device, where
it costs neither memory nor time. A linear that no rule names is an error, and so is a quantized one that never runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from workbench.models.denoiser import Denoiser
from workbench.options import BadInput
from workbench.types import Conditioning, LayerInfo

KINDS = ("quantize", "modulation", "float")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a linear that has a width of its own: a half-open range of its output rows or of its input columns."""

    role: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rule:
    """What may be done to the linears whose whole dotted name matches `pattern`; of several rules the first counts. why: of what stays
    float. segments: the parts of a fused linear, from the linear."""

    pattern: str
    kind: str
    why: str = ""
    segments: Callable[[nn.Linear], Sequence[Segment]] | None = None


@dataclass(frozen=True, kw_only=True)
class Discovered:
    """layers: quantizable and modulation, in the order of execution. kept_float: the other linears' names, and why."""

    layers: tuple[LayerInfo, ...]
    kept_float: dict[str, str]


@dataclass
class _Seen:
    """One linear in one step."""

    tokens: int = 0
    calls: int = 0
    inputs: list[int] = field(default_factory=list)  # numbers of the tensors it read, call by call


def discover(modules: Mapping[str, nn.Module], denoiser: Denoiser, x: Tensor, conditioning: Conditioning, *, steps: Sequence[int],
             rules: Sequence[Rule], blocks: Mapping[str, str]) -> Discovered:
    """Run the calls of `steps` (enough that every tree runs) for one sample on `modules`, which are hooked and thrown away by the caller.

    blocks: label by the name of a list of blocks, such as {"transformer_blocks": "double"}. Raises BadInput for a linear that no rule
    names, and for a quantizable one that does not run."""
    seen = _observe(modules, denoiser, x, conditioning, steps)
    matched = {key: _rule_of(key, rules, several=len(modules) > 1) for key in _linears(modules)}
    idle = [name for (tree, name), rule in matched.items() if rule.kind != "float" and (tree, name) not in seen]
    if idle:
        raise BadInput(f"layer {idle[0]} is in the model and never runs; load the pipeline unfused and without adapters")
    layers: list[LayerInfo] = []
    for key, found in seen.items():
        if matched[key].kind != "float":
            layers += _described(key, found, matched[key], modules[key[0]].get_submodule(key[1]), blocks)
    kept_float = {_name(key, len(modules) > 1): rule.why for key, rule in matched.items() if rule.kind == "float"}
    return Discovered(layers=_related(layers, seen), kept_float=kept_float)


def _linears(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    return [(tree, name) for tree, module in modules.items() for name, each in module.named_modules() if isinstance(each, nn.Linear)]


def _name(key: tuple[str, str], several: bool) -> str:
    """A layer's name; that of its tree before it where there are several."""
    return f"{key[0]}.{key[1]}" if several else key[1]


def _rule_of(key: tuple[str, str], rules: Sequence[Rule], *, several: bool) -> Rule:
    for rule in rules:
        if re.fullmatch(rule.pattern, key[1]):
            return rule
    raise BadInput(f"layer {_name(key, several)} is not one this family knows; load the pipeline unfused and without adapters")


@torch.no_grad()
def _observe(modules, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, steps: Sequence[int]) -> dict[tuple[str, str], _Seen]:
    """Every linear that ran, in the order of its first call."""
    seen: dict[tuple[str, str], _Seen] = {}
    kept: list[Tensor] = []  # a tensor that were freed could lend its id to another
    numbers: dict[int, int] = {}
    rows = 1

    def hook(key):
        def look(module: nn.Linear, args) -> None:
            read = args[0]
            kept.append(read)
            found = seen.setdefault(key, _Seen())
            found.tokens = max(found.tokens, read.numel() // module.in_features // rows)
            found.calls += rows
            found.inputs.append(numbers.setdefault(id(read), len(numbers)))
        return look

    handles = [modules[tree].get_submodule(name).register_forward_pre_hook(hook((tree, name))) for tree, name in _linears(modules)]
    ran: set[str] = set()
    try:
        for step in steps:
            calls = [call for call in denoiser.calls(x, step, conditioning) if call.module not in ran]
            for call in calls:
                rows = call.rows
                modules[call.module](**call.inputs)
            ran |= {call.module for call in calls}
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _described(key: tuple[str, str], found: _Seen, rule: Rule, linear: nn.Linear, blocks: Mapping[str, str]) -> list[LayerInfo]:
    """The layer, or one for each of its segments; indices and relations follow when all are known."""
    tree, name = key
    block, role = _place(name, blocks)
    whole = LayerInfo(index=-1, name=name, block=block, role=role, n_out=linear.out_features, k_in=linear.in_features, tokens=found.tokens,
                      has_bias=linear.bias is not None, same_input=-1, fused_with=-1, kind=rule.kind, calls=found.calls, module=tree)
    if rule.segments is None:
        return [whole]
    parts = rule.segments(linear)
    _check_cover(name, linear, parts)
    return [replace(whole, name=f"{name}.{part.role}", role=f"{role}.{part.role}", linear=name, rows=part.rows, columns=part.columns,
                    n_out=whole.n_out if part.rows is None else part.rows[1] - part.rows[0],
                    k_in=whole.k_in if part.columns is None else part.columns[1] - part.columns[0],
                    # the parts' outputs are added up: one of them brings the bias
                    has_bias=whole.has_bias and (part.columns is None or part is parts[0])) for part in parts]


def _check_cover(name: str, linear: nn.Linear, parts: Sequence[Segment]) -> None:
    """Segments must follow each other and cover their axis."""
    for axis, size in (("rows", linear.out_features), ("columns", linear.in_features)):
        ranges = [getattr(part, axis) for part in parts]
        if all(each is None for each in ranges):
            continue
        ends = [0, *(each[1] for each in ranges)]
        if [each[0] for each in ranges] != ends[:-1] or ends[-1] != size:
            raise ValueError(f"the segments of {name} do not cover its {size} {axis}")


def _place(name: str, blocks: Mapping[str, str]) -> tuple[str, str]:
    """(block, role) of a layer; what stands in no list of blocks is a block of its own."""
    for prefix, label in blocks.items():
        match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if match:
            return f"{label}.{match[1]}", match[2]
    return name.split(".")[0], name


def _related(layers: list[LayerInfo], seen: Mapping[tuple[str, str], _Seen]) -> tuple[LayerInfo, ...]:
    """With indices, and who shares what: the same tensor (or the same columns of it) at every call, and among those one block."""
    first_reader: dict[tuple, int] = {}
    first_sibling: dict[tuple, int] = {}
    found = []
    for index, layer in enumerate(layers):
        read = (layer.module, tuple(seen[layer.module, layer.module_name].inputs), layer.columns)
        same_input = first_reader.setdefault(read, index)
        found.append(replace(layer, index=index, same_input=same_input, fused_with=first_sibling.setdefault((read, layer.block), index)))
    names = [layer.module for layer in found]
    if len(set(names)) > 1:
        found = [replace(layer, linear=layer.module_name, name=f"{layer.module}.{layer.name}") for layer in found]
    return tuple(found)
