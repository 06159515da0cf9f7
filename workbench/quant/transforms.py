"""What is done to a layer's input before it is quantized, and undone in its weight.

Dimension letters: M tokens, N out features, K in features.

x W^T = T(x) T_w(W)^T. The Hadamard transform mixes blocks of features with random signs, which spreads an outlier over
its block (QuaRot, arXiv 2404.00456). It is orthonormal, T_w = T, and its signs are a function of the seed alone, so they
are recomputed, never stored. Smoothing divides each feature by s_j and multiplies the weight's column by it (SmoothQuant,
arXiv 2211.10438): the vector is stored in float16 and used as stored, before the Hadamard transform if both are wanted
(ViDiT-Q, arXiv 2406.02540).
"""

from __future__ import annotations

import functools
import hashlib

import torch
from lowbit import hadamard, ops
from lowbit.gpu import chooses_fp8
from lowbit.tensor_cache import LastInputCache
from torch import Tensor

from workbench.options import BadInput


class Identity:
    """No transform."""

    name = "none"
    seed = 0

    def __init__(self, k_in: int):
        self.k_in = k_in
        self._last = LastInputCache()

    def factor(self, device: torch.device) -> tuple[Tensor | None, int]:
        """(factor_K float32 or None, block): what kernels multiply by, and rotate in blocks of, before they round."""
        return None, 1

    @torch.no_grad()
    def quantized(self, x: Tensor, bits: int, group_size: int = 0, clip: float = 1.0, mid_rise: bool = False) -> tuple[Tensor, Tensor]:
        """(q int8 or FP8, scale float32) of x, one scale per token or group. Layers that read one tensor share the result."""
        return _quantized(self, x, bits, group_size, clip, mid_rise)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, x: Tensor) -> Tensor:
        return x

    def weight(self, w_NK: Tensor) -> Tensor:
        return w_NK

    def weight_inverse(self, w_NK: Tensor) -> Tensor:
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
        self._last = LastInputCache()
        self._placed: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """T(x). Layers that read one tensor share the result: never change it in place."""
        return self._last.get(x, x.dtype, lambda: self._rotated(x, ops.block_hadamard))

    @torch.no_grad()
    def quantized(self, x: Tensor, bits: int, group_size: int = 0, clip: float = 1.0, mid_rise: bool = False) -> tuple[Tensor, Tensor]:
        """(q int8 or FP8, scale float32) of T(x), rotated and rounded in one pass. Layers that read one tensor share the result."""
        return _quantized(self, x, bits, group_size, clip, mid_rise)

    def factor(self, device: torch.device) -> tuple[Tensor, int]:
        """See Identity."""
        return self._placed_signs(torch.float32, device), self.block

    def weight(self, w_NK: Tensor) -> Tensor:
        """T(W): each row transformed like an input."""
        return self._rotated(w_NK, hadamard.block_hadamard)

    def inverse(self, x: Tensor) -> Tensor:
        """T^-1(x)."""
        return hadamard.inverse(x, self.block, self._placed_signs(x.dtype, x.device))

    def weight_inverse(self, w_NK: Tensor) -> Tensor:
        """The weight that `weight` made this of."""
        return self.inverse(w_NK)

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


class Smooth:
    """x / s, then another transform. smooth_K float16, positive."""

    def __init__(self, smooth_K: Tensor, then: Identity | Hadamard):
        if smooth_K.dtype != torch.float16 or not bool((torch.isfinite(smooth_K) & (smooth_K > 0)).all()):
            raise BadInput("a smoothing vector must be float16, finite and positive")
        self.smooth_K, self.then, self.k_in, self.seed = smooth_K, then, then.k_in, then.seed
        self.name = "smooth" if then.name == "none" else f"smooth_{then.name}"
        self._last = LastInputCache()
        self._factors: dict[torch.device, Tensor] = {}
        self._placed: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """T(x). Layers that read one tensor share the result: never change it in place."""
        return self._last.get(x, x.dtype, lambda: self.then.forward(x / self._like(x)))

    @torch.no_grad()
    def quantized(self, x: Tensor, bits: int, group_size: int = 0, clip: float = 1.0, mid_rise: bool = False) -> tuple[Tensor, Tensor]:
        """(q int8 or FP8, scale float32) of T(x): smoothing, signs and rotation in one pass."""
        return _quantized(self, x, bits, group_size, clip, mid_rise)

    def factor(self, device: torch.device) -> tuple[Tensor, int]:
        """See Identity."""
        if device not in self._factors:
            signs_K = self.then.signs_K if isinstance(self.then, Hadamard) else 1.0
            self._factors[device] = (signs_K / self.smooth_K.float()).to(device)
        return self._factors[device], self.then.block if isinstance(self.then, Hadamard) else 1

    def weight(self, w_NK: Tensor) -> Tensor:
        return self.then.weight(w_NK * self._like(w_NK))

    def weight_inverse(self, w_NK: Tensor) -> Tensor:
        return self.then.weight_inverse(w_NK) / self._like(w_NK)

    def inverse(self, x: Tensor) -> Tensor:
        return self.then.inverse(x) * self._like(x)

    def hessian(self, h_KK: Tensor) -> Tensor:
        s_K = self._like(h_KK)
        return self.then.hessian(h_KK / s_K / s_K[:, None])

    def _like(self, x: Tensor) -> Tensor:
        place = (x.dtype, x.device)
        if place not in self._placed:
            self._placed[place] = self.smooth_K.to(x)
        return self._placed[place]


Transform = Identity | Hadamard | Smooth


def _quantized(transform: Transform, x: Tensor, *grid) -> tuple[Tensor, Tensor]:
    return transform._last.get(x, grid, lambda: ops.act_quant(x, *transform.factor(x.device), *grid, chooses_fp8(x, grid[0])))


def _signs(block: int, seed: int) -> Tensor:
    """Random signs from a hash of the seed: the same on every platform and in every version of torch."""
    digest = hashlib.shake_256(f"lowbit hadamard signs {seed}".encode()).digest(-(-block // 8))
    bits = [digest[i // 8] >> (i % 8) & 1 for i in range(block)]
    return 1.0 - 2.0 * torch.tensor(bits, dtype=torch.float32)


def make(name: str, k_in: int, seed: int, smooth_K: Tensor | None = None) -> Transform:
    """The transform of that name. Without smoothing, layers with the same input size and seed get the same object, and share
    its work; a smoothed one is made once for each input by whoever has its vector."""
    smoothed, _, rest = name.partition("_") if name.startswith("smooth") else ("", "", name)
    then = _orthonormal(rest or "none", k_in, seed)
    if not smoothed:
        return then
    if smooth_K is None:
        raise BadInput(f"the transform {name} needs a smoothing vector; calibrate it first")
    return Smooth(smooth_K, then)


@functools.lru_cache(maxsize=256)
def _orthonormal(name: str, k_in: int, seed: int) -> Identity | Hadamard:
    if name == "none":
        return Identity(k_in)
    if name == "hadamard":
        return Hadamard(k_in, seed)
    raise BadInput(f"unknown transform {name!r}; use none or hadamard, smooth or smooth_hadamard")
