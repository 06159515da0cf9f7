"""What was computed from the last tensor, kept while that tensor lives.

q, k and v read one tensor one after another: rotating and quantizing it three times would cost as much as the
products themselves. A remembered result is used only for the very same tensor object at the same version (every
in-place change counts the version up, also through a view), so it is never stale, and it is dropped as soon as
the tensor is, so it holds no memory between calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

from torch import Tensor


class Kept:
    """What is remembered on a tensor, with what it was made from. It holds addresses, so a copy or pickle of the tensor comes without."""

    __slots__ = ("asked", "made")

    def __init__(self, asked: Hashable = None, made: object = None):
        self.asked, self.made = asked, made

    def __reduce__(self):
        return Kept, ()


class LastInput:
    """One slot. Replacing the slot is one assignment, so threads may share it: at worst they compute twice."""

    def __init__(self):
        self._slot: tuple[weakref.ref, int, dict[Hashable, Tensor]] | None = None

    def get(self, x: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()` remembered for this tensor and key."""
        if x.is_inference():  # such tensors count no versions: a change could not be seen
            return compute()
        slot = self._slot
        if slot is None or slot[0]() is not x or slot[1] != x._version:
            slot = self._slot = (weakref.ref(x, self._forget), x._version, {})
        found = slot[2].get(key)
        if found is None:
            found = slot[2][key] = compute()
        return found

    def _forget(self, reference: weakref.ref) -> None:
        if self._slot is not None and self._slot[0] is reference:
            self._slot = None
