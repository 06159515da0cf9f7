"""What is done to a layer's input before it is quantized, and undone in its weight.

Dimension letters: M tokens, N out features, K in features.

x W^T = T(x) T(W)^T for an orthonormal T. The Hadamard transform mixes blocks of features with random signs, which
spreads an outlier over its block (QuaRot, arXiv 2404.00456). Its signs are a function of the seed alone, so they
are recomputed, never stored.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from lowbit import hadamard, ops
from lowbit.memo import LastInput
from torch import Tensor

from workbench.options import BadInput


class Identity:
    """No transform."""

    name = "none"
    seed = 0

    def __init__(self, k_in: int):
        self.k_in = k_in
        self._last = LastInput()

    @torch.no_grad()
    def quantized(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """(q int8, scale float32) of x. Layers that read one tensor share the result."""
        return self._last.get(x, bits, lambda: ops.act_quant(x, None, 1, bits, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, x: Tensor) -> Tensor:
        return x

    def weight(self, w_NK: Tensor) -> Tensor:
        return w_NK

    def hessian(self, h_KK: Tensor) -> Tensor:
        return h_KK


class Hadamard:
    """Block Hadamard with random signs along the last axis; the block is the largest power of two up to 256 that divides K."""

    name = "hadamard"

    def __init__(self, k_in: int, seed: int):
        self.k_in = k_in
        self.seed = seed
        self.block = hadamard.block_size(k_in)
        self.signs_K = _signs(self.block, seed).repeat(k_in // self.block)
        self._last = LastInput()
        self._placed: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """T(x). Layers that read one tensor share the result: never change it in place."""
        return self._last.get(x, x.dtype, lambda: self._rotated(x, ops.block_hadamard))

    @torch.no_grad()
    def quantized(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """(q int8, scale float32) of T(x), rotated and rounded in one pass. Layers that read one tensor share the result."""
        return self._last.get(x, bits, lambda: ops.act_quant(x, self._placed_signs(torch.float32, x.device), self.block, bits, 0))

    def weight(self, w_NK: Tensor) -> Tensor:
        """T(W): each row transformed like an input."""
        return self._rotated(w_NK, hadamard.block_hadamard)

    def inverse(self, x: Tensor) -> Tensor:
        """T^-1(x), also of a transformed weight's rows."""
        return hadamard.inverse(x, self.block, self._placed_signs(x.dtype, x.device))

    def hessian(self, h_KK: Tensor) -> Tensor:
        """The Hessian of T(x) from that of x: T applied to its rows and columns."""
        return self.weight(self.weight(h_KK).T.contiguous())

    def _rotated(self, x: Tensor, rotate) -> Tensor:
        """In at least float32: 16-bit floats are rounded once, at the end."""
        wide = x.float() if x.element_size() < 4 else x
        return rotate(wide, self.block, self._placed_signs(wide.dtype, wide.device)).to(x.dtype)

    def _placed_signs(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        place = (dtype, device)
        if place not in self._placed:
            self._placed[place] = self.signs_K.to(device, dtype)
        return self._placed[place]


Transform = Identity | Hadamard


def _signs(block: int, seed: int) -> Tensor:
    """Random signs from a hash of the seed: the same on every platform and in every version of torch."""
    digest = hashlib.shake_256(f"lowbit hadamard signs {seed}".encode()).digest(-(-block // 8))
    bits = [digest[i // 8] >> (i % 8) & 1 for i in range(block)]
    return 1.0 - 2.0 * torch.tensor(bits, dtype=torch.float32)


@functools.lru_cache(maxsize=256)
def make(name: str, k_in: int, seed: int) -> Transform:
    """The transform of that name; layers with the same input size and seed get the same object, and share its work."""
    if name == "none":
        return Identity(k_in)
    if name == "hadamard":
        return Hadamard(k_in, seed)
    raise BadInput(f"unknown transform {name!r}; use none or hadamard")
