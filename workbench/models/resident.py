"""Which loaded models stay in memory: whatever somebody uses, the newest, and of the others a bounded number of bytes.

A model is found again as long as anything refers to it, a session or a running job for instance, so no model is ever there twice. What
nobody refers to is kept for whoever comes next, least recently used first to go.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import nn

from workbench.memory import reclaim

Model = TypeVar("Model")
KEPT_BYTES = 4_000_000_000  # of models that are kept though nobody may use them; the newest is kept whatever it takes


def loaded_bytes(bundle) -> int:
    """Bytes of the tensors of all parts of a bundle's pipeline, on whatever device."""
    parts = [part for part in bundle.pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Resident(Generic[Model]):
    """Loaded models by key. Safe to use from several threads, which wait for each other's loading."""

    def __init__(self, size_bytes: Callable[[Model], int] = loaded_bytes, most_bytes: int = KEPT_BYTES):
        self._size_bytes, self._most_bytes = size_bytes, most_bytes
        self._kept: OrderedDict[Hashable, tuple[Model, int]] = OrderedDict()  # least recently used first
        self._alive: weakref.WeakValueDictionary[Hashable, Model] = weakref.WeakValueDictionary()
        self._renew_lock()
        if hasattr(os, "register_at_fork"):  # another thread may hold it then, and is not in the child
            here = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: here() and here()._renew_lock())

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._alive

    def get(self, key: Hashable, load: Callable[[], Model]) -> Model:
        """The model of a key, loaded only where there is none; whatever `load` raises, nothing is kept of it."""
        with self._lock:
            model = self._alive.get(key)
            if model is None:
                self._let_go(keep_newest=False)  # now: the new one needs the room
                model = self._alive[key] = load()
            self._kept[key] = self._kept.pop(key, None) or (model, self._size_bytes(model))
            self._let_go(keep_newest=True)
            return model

    def _let_go(self, *, keep_newest: bool) -> None:
        """Put down the least recently used until the rest is within bounds."""
        before, least = len(self._kept), int(keep_newest)
        while len(self._kept) > least and sum(size for _, size in self._kept.values()) > self._most_bytes:
            self._kept.popitem(last=False)
        if len(self._kept) < before:
            reclaim()
