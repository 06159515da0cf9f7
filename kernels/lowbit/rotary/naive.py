"""Reference: RMS norm over the channels of a head, then rotary position embedding of interleaved pairs.

Dimension letters: B samples, S tokens, H heads, C channels of a head.

    n = x / sqrt(mean(x^2) + eps) * weight,   y[2i] = n[2i] cos - n[2i+1] sin,   y[2i+1] = n[2i+1] cos + n[2i] sin
"""

from __future__ import annotations

from torch import Tensor


def norm_rotary(x: Tensor, weight_C: Tensor, cos_SC: Tensor, sin_SC: Tensor, eps: float, out_BSHC: Tensor, first: int) -> None:
    """Write the tokens of x (B, S, H C) to `out_BSHC` from token `first` on, computed in float32; tables repeat each angle twice."""
    n = x.float().unflatten(-1, (-1, len(weight_C)))
    n = n * (n.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_C.float()
    swapped = n.unflatten(-1, (-1, 2)).flip(-1)
    swapped = (swapped * swapped.new_tensor([-1.0, 1.0])).flatten(-2)
    out_BSHC[:, first : first + x.shape[1]] = n * cos_SC[:, None] + swapped * sin_SC[:, None]
