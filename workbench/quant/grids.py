"""Integer grids of a weight: scale, zero point, rounding, and the way to and from packed storage.

Dimension letters: N out features, K in features, G groups along K, J features of one group, P packed bytes.

Symmetric: w = s q with q in [-2^(b-1), 2^(b-1) - 1], stored as q + 2^(b-1). s = c max|w| / (2^(b-1) - 1), so plain
rounding (c = 1) reaches the 2^b - 1 codes around zero and the lowest code serves a clipped scale, c < 1. That
matters at 2 bits, where plain rounding has the three levels -1, 0, 1 and a searched scale uses all four.
Asymmetric: w = s (q - z) with q in [0, 2^b - 1].
Scales are float16; every computation uses them exactly as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lowbit import linear_wnan
from lowbit.formats import pack
from torch import Tensor

from workbench.plans import BitChoice
from workbench.types import QuantWeight

CLIP_RATIOS = tuple(round(1.0 - 0.04 * i, 2) for i in range(16))  # 1.00 ... 0.40
_SMALLEST = 2.0**-24  # smallest positive float16
_LARGEST = 65504.0  # largest float16


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bits of every row: rows of different widths are solved together. bits_N1 float32."""

    bits_N1: Tensor
    symmetric: bool

    @property
    def low_N1(self) -> Tensor:
        return -(2 ** (self.bits_N1 - 1)) if self.symmetric else torch.zeros_like(self.bits_N1)

    @property
    def high_N1(self) -> Tensor:
        return 2 ** (self.bits_N1 - 1) - 1 if self.symmetric else 2**self.bits_N1 - 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One scale and zero point per row; scale_N1 float32 that float16 holds exactly, low/high the code range."""

    scale_N1: Tensor
    zero_N1: Tensor
    low_N1: Tensor
    high_N1: Tensor

    def round(self, w_NJ: Tensor) -> Tensor:
        """Nearest integer codes q, float32."""
        return (w_NJ / self.scale_N1).add_(self.zero_N1).round_().clamp_(self.low_N1, self.high_N1)

    def value(self, q_NJ: Tensor) -> Tensor:
        """What codes stand for."""
        return (q_NJ - self.zero_N1) * self.scale_N1

    def nearest(self, w_NJ: Tensor) -> Tensor:
        """value(round(w))."""
        return self.round(w_NJ).sub_(self.zero_N1).mul_(self.scale_N1)


def _as_stored(scale_N1: Tensor) -> Tensor:
    """Rounded to float16, kept positive and finite; an all-zero group gets 1."""
    stored = scale_N1.clamp(_SMALLEST, _LARGEST).half().float()
    return torch.where(scale_N1 > 0, stored, torch.ones_like(stored))


def fit(w_NJ: Tensor, widths: Widths, ratio: float = 1.0) -> Grid:
    """The grid of one group from its largest magnitude (or its range), shrunk by `ratio`."""
    low_N1, high_N1 = widths.low_N1, widths.high_N1
    if widths.symmetric:
        scale_N1 = _as_stored(w_NJ.abs().amax(1, keepdim=True) * ratio / high_N1)
        return Grid(scale_N1=scale_N1, zero_N1=torch.zeros_like(scale_N1), low_N1=low_N1, high_N1=high_N1)
    bottom_N1 = w_NJ.amin(1, keepdim=True).clamp(max=0) * ratio
    top_N1 = w_NJ.amax(1, keepdim=True).clamp(min=0) * ratio
    scale_N1 = _as_stored((top_N1 - bottom_N1) / high_N1)
    zero_N1 = (-bottom_N1 / scale_N1).round().clamp(low_N1, high_N1)
    return Grid(scale_N1=scale_N1, zero_N1=zero_N1, low_N1=low_N1, high_N1=high_N1)


def search(w_NJ: Tensor, widths: Widths, importance_J: Tensor) -> Grid:
    """The grid of least importance-weighted squared error over CLIP_RATIOS, each row its own; ratio 1 wins ties."""
    best = fit(w_NJ, widths)
    best_error_N = (best.nearest(w_NJ).sub_(w_NJ)).square_() @ importance_J
    scale_N1, zero_N1 = best.scale_N1.clone(), best.zero_N1.clone()
    for ratio in CLIP_RATIOS[1:]:
        grid = fit(w_NJ, widths, ratio)
        error_N = (grid.nearest(w_NJ).sub_(w_NJ)).square_() @ importance_J
        better_N1 = (error_N < best_error_N)[:, None]
        scale_N1 = torch.where(better_N1, grid.scale_N1, scale_N1)
        zero_N1 = torch.where(better_N1, grid.zero_N1, zero_N1)
        best_error_N = torch.minimum(best_error_N, error_N)
    return Grid(scale_N1=scale_N1, zero_N1=zero_N1, low_N1=best.low_N1, high_N1=best.high_N1)


def groups(k_in: int, group_size: int | None) -> list[slice]:
    """The columns of each group; the last may be shorter."""
    width = group_size or k_in
    return [slice(start, min(start + width, k_in)) for start in range(0, k_in, width)]


def store(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, choice: BitChoice) -> QuantWeight:
    """Pack integer codes (float32 or integer tensor) and their grid."""
    offset = 1 << choice.weight_bits - 1 if choice.symmetric else 0
    return QuantWeight(packed_NP=pack((q_NK + offset).to(torch.uint8), choice.weight_bits), scale_NG=scale_NG.half(),
                       zero_NG=None if choice.symmetric else zero_NG.to(torch.uint8),
                       bits=choice.weight_bits, group_size=choice.group_size, k_in=q_NK.shape[1])


def quantize_nearest(w_NK: Tensor, choice: BitChoice) -> QuantWeight:
    """Round to nearest on the grid of each group's largest magnitude."""
    w_NK = w_NK.float()
    widths = Widths(bits_N1=torch.full((len(w_NK), 1), float(choice.weight_bits), device=w_NK.device),
                    symmetric=choice.symmetric)
    parts = groups(w_NK.shape[1], choice.group_size)
    fitted = [fit(w_NK[:, part], widths) for part in parts]
    q_NK = torch.cat([grid.round(w_NK[:, part]) for grid, part in zip(fitted, parts)], 1)
    return store(q_NK, torch.cat([g.scale_N1 for g in fitted], 1), torch.cat([g.zero_N1 for g in fitted], 1), choice)


def dequantize(weight: QuantWeight) -> Tensor:
    """w_NK float32, as the transformed input sees it."""
    return linear_wnan.dequantize(weight.packed_NP, weight.scale_NG, weight.zero_NG, weight.bits, weight.group_size,
                                  weight.k_in)


def predicted_bytes(n_out: int, k_in: int, choice: BitChoice, has_bias: bool) -> int:
    """Resident bytes of a layer stored under `choice`: codes, float16 scales, zero points, 16-bit bias."""
    bias_bytes = 2 * n_out if has_bias else 0
    if choice.is_float:
        return 2 * n_out * k_in + bias_bytes
    per_group_bytes = 2 if choice.symmetric else 3
    row_bytes = -(-k_in * choice.weight_bits // 8)
    return n_out * (row_bytes + per_group_bytes * len(groups(k_in, choice.group_size))) + bias_bytes
