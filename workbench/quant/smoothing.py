"""Smoothing vectors: of a fixed alpha (SmoothQuant, arXiv 2211.10438), or searched (SVDQuant, arXiv 2411.05007).

Dimension letters: M rows, N out features, K in features.

    s_j = max|X_j|^a / max|W_j|^b,   fixed: b = 1 - a

max|X_j| is taken over all steps, samples and tokens, max|W_j| over all layers that read the input: they share s. The search
tries (a, 0) and (a, 1 - a) for ten a, twenty points, and no smoothing, and keeps what changes the layers' outputs least when
weights and activations are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.quant.transforms import Transform

GRID = tuple((a / 10, b) for a in range(1, 11) for b in (0.0, round(1 - a / 10, 1)))  # (a, b)
_WIDEST = 2.0**10  # largest ratio of s to its centre: what float16 holds with room to spare


def vector(x_absmax_K: Tensor, w_absmax_K: Tensor, a: float, b: float) -> Tensor:
    """smooth_K float16, centred on 1 (a common factor changes nothing). Dead channels and columns get 1."""
    live_K = (x_absmax_K > 0) & (w_absmax_K > 0)
    log_K = a * x_absmax_K.double().clamp(min=1e-30).log() - b * w_absmax_K.double().clamp(min=1e-30).log()
    log_K = torch.where(live_K, log_K, torch.zeros_like(log_K))
    if bool(live_K.any()):
        log_K = torch.where(live_K, log_K - log_K[live_K].mean(), log_K)
    return log_K.exp().clamp(1 / _WIDEST, _WIDEST).half()


def search(x_MK: Tensor, w_NK: Tensor, x_absmax_K: Tensor, *, transform_of: Callable[[Tensor], Transform],
           round_input: Callable[[Tensor], Tensor], round_weight: Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[float, ...]]:
    """(smooth_K, squared output error of no smoothing and of every point of `GRID`). x_MK: some of the calibration rows;
    w_NK: the stacked weights that read them. No smoothing wins ties, then the earlier point."""
    exact_MN = x_MK @ w_NK.T
    w_absmax_K = w_NK.abs().amax(0)
    candidates = [torch.ones_like(x_absmax_K).half(), *(vector(x_absmax_K, w_absmax_K, a, b) for a, b in GRID)]
    errors = []
    for smooth_K in candidates:
        transform = transform_of(smooth_K)
        output_MN = round_input(transform.forward(x_MK)) @ round_weight(transform.weight(w_NK)).T
        errors.append(float((output_MN - exact_MN).double().square().sum()))
    return candidates[min(range(len(errors)), key=errors.__getitem__)], tuple(errors)
