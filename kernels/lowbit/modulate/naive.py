"""Reference: layer norm without weights, then a scale and a shift per sample (adaLN, Peebles and Xie, arXiv 2212.09748).

Dimension letters: B samples, S tokens, D channels.

    y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """y_BSD in x's type, computed in float32."""
    normed_BSD = layer_norm(x_BSD.float(), x_BSD.shape[-1:], eps=eps)
    return torch.addcmul(shift_BD[:, None].float(), normed_BSD, 1 + scale_BD[:, None].float()).to(x_BSD.dtype)
