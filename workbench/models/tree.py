"""Module trees of their own that share every tensor with the tree they were made from.

A quantized model, a model that is observed by hooks, a model on the meta device: each is a tree of its own, so that neither hooks nor
replaced children reach the float model, and float and quantized run side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_OWN = ("_parameters", "_buffers", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs")


def clone_tree(module: nn.Module) -> nn.Module:
    """A tree of its own: the same modules, parameters, buffers and hooks; what is replaced or hooked here stays here. Children that
    occur twice occur twice in the clone, too. Plain attributes are shared."""
    return _clone(module, {})


def _clone(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in made:
        own = made[id(module)] = copy.copy(module)
        for name in _OWN:
            own.__dict__[name] = copy.copy(module.__dict__[name])
        own.__dict__["_modules"] = {name: None if child is None else _clone(child, made) for name, child in module._modules.items()}
    return made[id(module)]


def with_modules(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A clone with other modules at some dotted names."""
    own = clone_tree(module)
    for name, child in children.items():
        parent, _, leaf = name.rpartition(".")
        own.get_submodule(parent)._modules[leaf] = child
    return own


def on_meta(module: nn.Module) -> nn.Module:
    """A clone whose parameters and buffers have shapes and no values: a forward costs neither memory nor time. What diffusers' models keep
    in plain objects, such as Z-Image's rotary table, which moves to the device of the latest call, is the clone's own too."""
    own = clone_tree(module)
    for each in own.modules():
        each.__dict__.update({name: copy.copy(value) for name, value in each.__dict__.items() if _is_plain_part(value)})
        each.__dict__["_parameters"] = {name: None if kept is None else nn.Parameter(kept.detach().to("meta"), requires_grad=False)
                                        for name, kept in each._parameters.items()}
        each.__dict__["_buffers"] = {name: None if kept is None else kept.to("meta") for name, kept in each._buffers.items()}
    return own


def _is_plain_part(value) -> bool:
    """Is it an object of diffusers' model code that is no module?"""
    return type(value).__module__.startswith("diffusers.models.") and not isinstance(value, nn.Module)


def as_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A clone with its floating-point tensors rounded to another type; the original keeps its own."""
    own, made = clone_tree(module), {}

    def converted(kept: Tensor) -> Tensor:
        if id(kept) not in made:  # tied tensors stay tied
            changed = kept.detach().to(dtype) if kept.is_floating_point() else kept.detach()
            made[id(kept)] = nn.Parameter(changed, requires_grad=False) if isinstance(kept, nn.Parameter) else changed
        return made[id(kept)]

    for each in own.modules():
        for kind in ("_parameters", "_buffers"):
            each.__dict__[kind] = {name: None if kept is None else converted(kept) for name, kept in each.__dict__[kind].items()}
    return own
