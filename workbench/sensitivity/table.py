"""What follows from Fisher information: calibration weights, and the predicted error of every choice.

Dimension letters as in `types.py`: T steps, L layers, C choices, M tokens, N out features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.options import SensitivityConfig
from workbench.types import DistortionTable, SensitivityMap


def calibration_weights(fisher_TL: Tensor, config: SensitivityConfig) -> Tensor:
    """alpha_TL from Fisher information normalised per layer by its mean over steps; mean 1 over steps, max/min capped.

    softmax(F / tau) is the paper's; tau -> infinity is uniform calibration."""
    mean_L = fisher_TL.mean(0)
    normal_TL = torch.where(mean_L > 0, fisher_TL / mean_L.clamp(min=torch.finfo(fisher_TL.dtype).tiny), torch.ones_like(fisher_TL))
    weight_TL = {"softmax": lambda: F.softmax(normal_TL / config.tau, 0), "linear": lambda: normal_TL, "sqrt": lambda: normal_TL.sqrt(),
                 "uniform": lambda: torch.ones_like(normal_TL)}[config.weighting]()
    weight_TL = weight_TL.clamp(min=weight_TL.amax(0) / config.cap)
    return weight_TL / weight_TL.mean(0)


def tabulate(smap: SensitivityMap, weight_bits_C: tuple[int, ...], weight_loss_LC: Tensor) -> DistortionTable:
    """The predicted increase of the final error for every choice.

    Activations, *white*: F x D x M / N with D the squared error per token. *Directional*: E[(g . delta)^2], denoised by
    fitting one factor per step and layer over the widths, directional = kappa x white.
    Weights: `weight_loss_LC` is the loss tr(dW H' dW^T) with H' the alpha-weighted sum over samples, steps and tokens;
    with alpha = F / mean F the white form is mean F / (N S) times that loss."""
    tokens_L = torch.tensor([layer.tokens for layer in smap.layers], dtype=torch.float32)
    out_L = torch.tensor([layer.n_out for layer in smap.layers], dtype=torch.float32)
    error_TLC = smap.fisher_TL[..., None] * smap.squared_error_TLC * (tokens_L / out_L)[:, None]
    if smap.config.distortion == "directional":
        ratio_TLC = smap.directional_TLC / error_TLC.clamp(min=torch.finfo(torch.float32).tiny)
        kappa_TL = ratio_TLC[..., [c for c, bits in enumerate(smap.act_bits_C) if bits != 16]].mean(-1)
        error_TLC = error_TLC * kappa_TL[..., None]
    error_TLC[:, [not layer.has_act_bits for layer in smap.layers]] = 0  # their activations stay float
    weight_error_LC = weight_loss_LC * (smap.fisher_TL.mean(0) / (out_L * smap.samples))[:, None]
    return DistortionTable(act_bits_C=smap.act_bits_C, error_TLC=error_TLC, weight_bits_C=weight_bits_C,
                           weight_error_LC=weight_error_LC.float())

