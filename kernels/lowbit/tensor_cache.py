"""What was computed from tensors, kept as long as it is true of them.

q, k and v read one tensor one after another: rotating and quantizing it three times would cost as much as the
products themselves. A remembered result is used only for the very same tensor object at the same version (every
in-place change counts the version up, also through a view), so it is never stale, and it is dropped as soon as
the tensor is, so it holds no memory between calls.

What is made of a weight lives longer than the tensor object may: a state is loaded, or `.data` set. It is kept with the weight's
`identity`, and with its `memory`, without which the allocator could give the same address to other numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from threading import get_ident

from torch import Tensor, UntypedStorage


def identity(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """What tells these tensors with what they hold now from any others, for as long as their `memory` is kept. Tensors made in inference
    mode count no versions: of them a change in place is not seen."""
    return tuple(None if t is None else (t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.shape) for t in tensors)


def memory(*tensors: Tensor | None) -> tuple[UntypedStorage, ...]:
    """What the tensors' addresses lead into, to be kept beside them: a storage outlives the tensor object, and `tensor.data = other`."""
    return tuple(t.untyped_storage() for t in tensors if t is not None)


class TensorCache:
    """What is remembered on a tensor, with what it was made from. It holds addresses, so a copy or pickle of the tensor comes without."""

    __slots__ = ("asked", "made")

    def __init__(self, asked: Hashable = None, made: object = None):
        self.asked, self.made = asked, made

    def __reduce__(self):
        return TensorCache, ()


class LastInputCache:
    """One slot for each thread: two models that run side by side share their transforms, and would drive each other's result out."""

    def __init__(self):
        self._slots: dict[int, tuple[weakref.ref, int, dict[Hashable, Tensor]]] = {}

    def get(self, x: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()` remembered for this tensor and key."""
        if x.is_inference():  # such tensors count no versions: a change could not be seen
            return compute()
        thread = get_ident()
        slot = self._slots.get(thread)
        if slot is None or slot[0]() is not x or slot[1] != x._version:
            slot = self._slots[thread] = (weakref.ref(x, lambda gone: self._forget(thread, gone)), x._version, {})
        found = slot[2].get(key)
        if found is None:
            found = slot[2][key] = compute()
        return found

    def _forget(self, thread: int, gone: weakref.ref) -> None:
        slot = self._slots.get(thread)
        if slot is not None and slot[0] is gone:
            self._slots.pop(thread, None)
