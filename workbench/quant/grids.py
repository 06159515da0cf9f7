"""Integer grids of a weight: scale, zero point, rounding, and the way to and from packed storage.

Dimension letters: N out features, K in features, G groups along K, J features of one group, P packed bytes.

Symmetric: w = s q with q in [-2^(b-1), 2^(b-1) - 1], stored as q + 2^(b-1). s = c max|w| / (2^(b-1) - 1), so plain
rounding (c = 1) reaches the 2^b - 1 codes around zero and the lowest code serves a clipped scale, c < 1. That
matters at 2 bits, where plain rounding has the three levels -1, 0, 1 and a searched scale uses all four.
Signed: the same with a scale of either sign, negative where the largest weight is positive, so that the lowest code serves the
side that reaches farthest (the idea of llama.cpp's Q4_0). It costs nothing to store or to run.
Asymmetric: w = s (q - z) with q in [0, 2^b - 1].
Scales are float16; every computation uses them exactly as stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from lowbit import linear_wnan
from lowbit.formats import pack
from torch import Tensor

from workbench.plans import BitChoice
from workbench.types import QuantWeight

CLIP_RATIOS = tuple(round(1.0 - 0.04 * i, 2) for i in range(16))  # 1.00 ... 0.40
CLIP_BITS = 4  # widest grid worth a search: at 6 bits the best ratio is 1 for nearly every group
_SMALLEST = 2.0**-24  # smallest positive float16
_LARGEST = 65504.0  # largest float16


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bits of every row: rows of different widths are solved together. bits_N1 float32."""

    bits_N1: Tensor
    symmetric: bool
    signed: bool = False

    @property
    def low_N1(self) -> Tensor:
        return -(2 ** (self.bits_N1 - 1)) if self.symmetric else torch.zeros_like(self.bits_N1)

    @property
    def high_N1(self) -> Tensor:
        return 2 ** (self.bits_N1 - 1) - 1 if self.symmetric else 2**self.bits_N1 - 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One scale and zero point (None: 0) per row; scale_N1 float32 that float16 holds exactly, never 0; low/high the code range."""

    scale_N1: Tensor
    zero_N1: Tensor | None
    low_N1: Tensor
    high_N1: Tensor

    def round(self, w_NJ: Tensor) -> Tensor:
        """Nearest integer codes q, float32."""
        q_NJ = w_NJ / self.scale_N1
        if self.zero_N1 is not None:
            q_NJ += self.zero_N1
        return q_NJ.round_().clamp_(self.low_N1, self.high_N1)

    def value(self, q_NJ: Tensor) -> Tensor:
        """What codes stand for."""
        return (q_NJ if self.zero_N1 is None else q_NJ - self.zero_N1) * self.scale_N1

    def error(self, w_NJ: Tensor, importance_J: Tensor) -> Tensor:
        """Importance-weighted squared error of each row, error_N."""
        return self.value(self.round(w_NJ)).sub_(w_NJ).square_() @ importance_J

    def transposed(self) -> Grid:
        """The same grid for columns as rows of a (J, N) matrix."""
        return Grid(**{name: value if value is None else value.T.contiguous() for name, value in vars(self).items()})


def _as_stored(scale_N1: Tensor) -> Tensor:
    """Rounded to float16, kept positive and finite; an all-zero group gets 1."""
    stored = scale_N1.clamp(_SMALLEST, _LARGEST).half().float()
    return torch.where(scale_N1 > 0, stored, torch.ones_like(stored))


def fit(w_NJ: Tensor, widths: Widths, ratio: float | Tensor = 1.0) -> Grid:
    """The grid of one group from its largest magnitude (or its range), shrunk by `ratio`."""
    low_N1, high_N1 = widths.low_N1, widths.high_N1
    if widths.symmetric:
        scale_N1 = _as_stored(w_NJ.abs().amax(1, keepdim=True) * ratio / high_N1)
        if widths.signed:
            scale_N1 = torch.where(w_NJ.amax(1, keepdim=True) > -w_NJ.amin(1, keepdim=True), -scale_N1, scale_N1)
        return Grid(scale_N1=scale_N1, zero_N1=None, low_N1=low_N1, high_N1=high_N1)
    bottom_N1 = w_NJ.amin(1, keepdim=True).clamp(max=0) * ratio
    top_N1 = w_NJ.amax(1, keepdim=True).clamp(min=0) * ratio
    scale_N1 = _as_stored((top_N1 - bottom_N1) / high_N1)
    zero_N1 = (-bottom_N1 / scale_N1).round().clamp(low_N1, high_N1)
    return Grid(scale_N1=scale_N1, zero_N1=zero_N1, low_N1=low_N1, high_N1=high_N1)


def search(w_NJ: Tensor, widths: Widths, importance_J: Tensor) -> Grid:
    """The grid of least importance-weighted squared error over CLIP_RATIOS, each row its own; ratio 1 wins ties."""
    whole = fit(w_NJ, widths)
    rows = (widths.bits_N1[:, 0] <= CLIP_BITS).nonzero()[:, 0]
    narrow_NJ, narrow = w_NJ[rows], replace(widths, bits_N1=widths.bits_N1[rows])
    ratio_N1 = torch.ones_like(narrow.bits_N1)
    best_N = fit(narrow_NJ, narrow).error(narrow_NJ, importance_J)
    for ratio in CLIP_RATIOS[1:]:
        error_N = fit(narrow_NJ, narrow, ratio).error(narrow_NJ, importance_J)
        ratio_N1[error_N < best_N] = ratio
        best_N = torch.minimum(best_N, error_N)
    found = fit(narrow_NJ, narrow, ratio_N1)
    return Grid(scale_N1=whole.scale_N1.index_copy(0, rows, found.scale_N1), low_N1=whole.low_N1, high_N1=whole.high_N1,
                zero_N1=None if found.zero_N1 is None else whole.zero_N1.index_copy(0, rows, found.zero_N1))


def groups(k_in: int, group_size: int | None) -> list[slice]:
    """The columns of each group; the last may be shorter."""
    width = group_size or k_in
    return [slice(start, min(start + width, k_in)) for start in range(0, k_in, width)]


def join(fitted: list[Grid]) -> tuple[Tensor, Tensor | None]:
    """(scale_NG, zero_NG) of a row's groups."""
    zeros = None if fitted[0].zero_N1 is None else torch.cat([grid.zero_N1 for grid in fitted], 1)
    return torch.cat([grid.scale_N1 for grid in fitted], 1), zeros


def store(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, choice: BitChoice) -> QuantWeight:
    """Pack integer codes (float32 or integer tensor) and their grid."""
    offset = 1 << choice.weight_bits - 1 if choice.symmetric else 0
    return QuantWeight(packed_NP=pack((q_NK + offset).to(torch.uint8), choice.weight_bits), scale_NG=scale_NG.half(),
                       zero_NG=None if zero_NG is None else zero_NG.to(torch.uint8),
                       bits=choice.weight_bits, group_size=choice.group_size, k_in=q_NK.shape[1])


def quantize_nearest(w_NK: Tensor, choice: BitChoice) -> QuantWeight:
    """Round to nearest on the grid of each group's largest magnitude."""
    fitted, parts = _fitted(w_NK.float(), choice)
    q_NK = torch.cat([grid.round(w_NK[:, part].float()) for grid, part in zip(fitted, parts)], 1)
    return store(q_NK, *join(fitted), choice)


def rounded(w_NK: Tensor, choice: BitChoice) -> Tensor:
    """What `quantize_nearest` stands for, without packing it: w_NK float32, bit for bit."""
    fitted, parts = _fitted(w_NK.float(), choice)
    return torch.cat([grid.value(grid.round(w_NK[:, part].float())) for grid, part in zip(fitted, parts)], 1)


def _fitted(w_NK: Tensor, choice: BitChoice) -> tuple[list[Grid], list[slice]]:
    widths = Widths(bits_N1=torch.full((len(w_NK), 1), float(choice.weight_bits), device=w_NK.device), symmetric=choice.symmetric)
    parts = groups(w_NK.shape[1], choice.group_size)
    return [fit(w_NK[:, part], widths) for part in parts], parts


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
