"""Temporal features cached per step (the idea of TFMQ-DM, arXiv 2311.16503): adaLN outputs instead of adaLN weights.

Dimension letters: S samples, N out features, K in features.

An adaptive-norm linear sees one vector per image and step, which depends on the time (and, in Flux, on the pooled prompt and the
guidance), never on the latent. Its outputs can be computed before the denoising loop, in float, for one prompt and schedule; the
weights, a quarter of Flux, need not be resident while the loop runs. What is cached is counted instead: steps x N numbers of
two bytes per image. At 16 bits the model is exactly the uncached one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.families.base import StepCursor


class CachedModulation(nn.Module):
    """Stands in for an adaLN linear: looks its output up by noise level. A step that was not cached for these inputs is computed
    with the float weight, to the same numbers."""

    def __init__(self, linear: nn.Linear, cursor: StepCursor):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._float, self._cursor = [linear], cursor  # in a list: not a part of this module's state
        self._kept: dict[float, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def keep(self, sigma: float, x_SK: Tensor, *, first: bool) -> None:
        """Cache the output of a step; the first step of a schedule forgets the prompts before."""
        if first:
            self._kept.clear()
        self._kept[sigma] = (x_SK, self._float[0](x_SK))

    def forward(self, x_SK: Tensor) -> Tensor:
        if self._kept:
            kept_SK, y_SN = self._kept[min(self._kept, key=lambda sigma: abs(sigma - self._cursor.sigma))]
            if torch.equal(kept_SK, x_SK):
                return y_SN
        return self._float[0](x_SK)
