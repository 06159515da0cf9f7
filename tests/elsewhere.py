"""A device that is not there: its tensors are ordinary ones with a mark, and what mixes them with others is refused as a GPU refuses it.

Letters: none. Only Python's view of torch is watched: what a kernel does inside is not.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("xpu")
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.index_select}


def mark(tensor):
    """The same tensor, said to be elsewhere."""
    tensor._elsewhere = True
    return tensor


def is_marked(tensor) -> bool:
    return getattr(tensor, "_elsewhere", False)


class Elsewhere(TorchFunctionMode):
    """While open, `DEVICE` exists."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args, **kwargs)
            if isinstance(found, torch.device) and is_marked(args[0]):
                return DEVICE
            return mark(found) if isinstance(found, torch.Tensor) and is_marked(args[0]) else found
        if func is torch.Tensor.cpu:
            return args[0].detach().clone() if is_marked(args[0]) else func(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        there = [each for each in tensors if is_marked(each)]
        mixed = [each for each in tensors if not is_marked(each) and each.dim() > 0]
        if there and mixed and func not in _INDEXING:
            raise RuntimeError(f"Expected all tensors to be on the same device: {getattr(func, '__name__', func)} got {DEVICE} and cpu")
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted) == DEVICE:
            kwargs["device"], there = "cpu", [None]
        result = func(*args, **kwargs)
        if not there:
            return result
        return tree_map(lambda each: mark(each) if isinstance(each, torch.Tensor) else each, result)

    def _to(self, args, kwargs):
        tensor, *rest = args
        devices = [each for each in (*rest, *kwargs.values()) if isinstance(each, str | torch.device)]
        others = [each for each in rest if isinstance(each, torch.Tensor)]
        goes = is_marked(tensor)
        if devices:
            goes = torch.device(devices[0]) == DEVICE
        elif others:
            goes = is_marked(others[0])
        rest = [each.dtype if isinstance(each, torch.Tensor) else each for each in rest if not isinstance(each, str | torch.device)]
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        moved = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if goes == is_marked(moved):
            return moved
        moved = moved.detach().clone() if not moved.requires_grad else moved.clone()
        return mark(moved) if goes else moved


@contextlib.contextmanager
def elsewhere(monkeypatch, bundle):
    """The bundle's weights and computations on `DEVICE`."""
    for module in bundle.modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            mark(tensor)
            for whole in getattr(tensor, "joined_rows", ((),))[0]:  # what it is a part of
                mark(whole)
    grad = torch.autograd.grad

    def marked_grad(outputs, inputs, *args, **kwargs):
        found = grad(outputs, inputs, *args, **kwargs)
        return tuple(mark(g) if g is not None and is_marked(x) else g for g, x in zip(found, inputs))

    monkeypatch.setattr(torch.autograd, "grad", marked_grad)
    monkeypatch.setattr(bundle, "device", DEVICE)
    with Elsewhere():
        yield bundle
