"""Temporal features cached per step (the idea of TFMQ-DM, arXiv 2311.16503): adaLN outputs instead of adaLN weights.

Dimension letters: T steps, S samples, N out features, K in features.

An adaptive-norm linear sees one vector per image and step, which depends on the time (and, in Flux, on the pooled prompt and the
guidance), never on the latent. Its outputs can be computed before the denoising loop, in float, for one prompt and schedule; the
weights, a quarter of Flux, need not be resident while the loop runs. What is cached is counted instead: steps x N numbers of
two bytes per image. At 16 bits the model is exactly the uncached one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.models.denoiser import StepState

SAME_INPUT = 1e-4  # relative difference below which two inputs are one, rounded in batches of different sizes


class CachedModulation(nn.Module):
    """Stands in for an adaLN linear: looks its output up, for all steps at once or by noise level for one. What was not cached for
    these inputs is computed with the float weight, to the same numbers."""

    def __init__(self, linear: nn.Linear, state: StepState):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._float, self._state = [linear], state  # in a list: not a part of this module's state
        self._kept: tuple[Sequence[float], Tensor, Tensor] | None = None

    @torch.no_grad()
    def keep(self, sigma_T: Sequence[float], x_TSK: Tensor) -> None:
        """Cache the outputs of a schedule's steps for some prompts; forgets the ones before."""
        self._kept = sigma_T, x_TSK, self._float[0](x_TSK.flatten(0, 1)).unflatten(0, x_TSK.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        """x (S, K) of the running step, or (T S, K) of all steps, step by step."""
        if self._kept is not None:
            sigma_T, x_TSK, y_TSN = self._kept
            now = min(range(len(sigma_T)), key=lambda t: abs(sigma_T[t] - self._state.sigma)) if len(x) == x_TSK.shape[1] else slice(None)
            kept, y = x_TSK[now].reshape(-1, x.shape[-1]), y_TSN[now].reshape(-1, self.out_features)
            if kept.shape == x.shape and bool((x - kept).norm() <= SAME_INPUT * kept.norm()):
                return y
        return self._float[0](x)
