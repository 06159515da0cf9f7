"""Reference: every stream's queries and keys get an RMS norm over the channels of a head and a rotary position embedding of interleaved
pairs; then all tokens of all streams attend to each other.

Dimension letters: B samples, S tokens (all streams), H heads, C channels of a head, D = H C.

    n = x / sqrt(mean(x^2) + eps) * weight,   r[2i] = n[2i] cos - n[2i+1] sin,   r[2i+1] = n[2i+1] cos + n[2i] sin
    y = softmax(q k^T / sqrt(C)) v
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def norm_rotary(x: Tensor, weight_C: Tensor, cos_SC: Tensor, sin_SC: Tensor, eps: float) -> Tensor:
    """(B, S, H, C) in at least float32 of x (B, S, D); the tables repeat each angle twice."""
    n = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, len(weight_C)))
    n = n * (n.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_C.to(n)
    swapped = n.unflatten(-1, (-1, 2)).flip(-1)
    swapped = (swapped * swapped.new_tensor([-1.0, 1.0])).flatten(-2)
    return n * cos_SC[:, None] + swapped * sin_SC[:, None]


def attention(query: Sequence[Tensor], key: Sequence[Tensor], value: Sequence[Tensor], query_norm: Sequence[Tensor],
              key_norm: Sequence[Tensor], cos_SC: Tensor, sin_SC: Tensor, eps: float) -> list[Tensor]:
    """One y (B, S_i, D) per stream i, in its value's type, from query, key and value (B, S_i, D) and norm weights (C). The tables
    (S, C) cover all streams in their order. Norms and rotations in at least float32, the product in the value's type."""
    dtype, channels = value[0].dtype, len(query_norm[0])
    lengths, first, rotated = [x.shape[1] for x in query], 0, ([], [])
    for stream, length in enumerate(lengths):
        here = slice(first, first + length)
        for made, parts, norms in zip(rotated, (query, key), (query_norm, key_norm)):
            made.append(norm_rotary(parts[stream], norms[stream], cos_SC[here], sin_SC[here], eps).to(dtype))
        first += length
    heads_first = (torch.cat(parts, 1).transpose(1, 2) for parts in (*rotated, [v.unflatten(-1, (-1, channels)) for v in value]))
    return [y.contiguous() for y in scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2).split(lengths, 1)]
