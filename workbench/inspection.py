"""One layer at one step, looked at closely: the range of every input channel and the shape of its weight.

Cheap enough for a click: the float model is run from the recorded latent of that step, and only up to the layer in question.
Dimension letters as in `types.py`: S samples, M tokens, N out features, K in features; B bins.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.options import BadInput, QuantConfig
from workbench.quant.calibration import transform_of
from workbench.replay.taps import watched
from workbench.replay.trace import Trace
from workbench.types import LayerInfo

SAMPLES = 4  # trajectories whose step is run again
BINS = 61


@dataclass(frozen=True, kw_only=True)
class LayerStep:
    """low_K, high_K: smallest and largest input of each channel, before and after the transform that precedes quantization.
    weight_edges_B (BINS + 1,) and the two counts (BINS,): histogram of the float weight and of the transformed one."""

    layer: int
    step: int
    samples: int
    transform: str
    low_K: Tensor
    high_K: Tensor
    transformed_low_K: Tensor
    transformed_high_K: Tensor
    weight_edges_B: Tensor
    weight_counts_B: Tensor
    transformed_counts_B: Tensor


class _Reached(Exception):
    """The layer has been reached; the rest of the forward is not needed."""


@torch.no_grad()
def inspect(bundle: Bundle, trace: Trace, layer: int, step: int, quant: QuantConfig) -> LayerStep:
    """Ranges and histograms of layer `layer` at step `step`, whatever else runs meanwhile. Raises BadInput where they do not exist."""
    if not (0 <= layer < len(bundle.layers) and 0 <= step < trace.steps):
        raise BadInput(f"layer {layer} at step {step} does not exist; there are {len(bundle.layers)} layers and {trace.steps} steps")
    info = bundle.layers[layer]
    x_RK = _inputs(bundle, trace, info, step).flatten(0, -2).float().cpu()
    weight_NK = bundle.weight(info).float().cpu()
    transform = transform_of(info, quant)
    z_RK, rotated_NK = transform.forward(x_RK), transform.weight(weight_NK)
    largest = max(float(weight_NK.abs().max()), float(rotated_NK.abs().max()), torch.finfo(torch.float32).tiny)
    counts = [torch.histc(w, BINS, -largest, largest) for w in (weight_NK, rotated_NK)]
    return LayerStep(
        layer=layer,
        step=step,
        samples=min(SAMPLES, trace.samples),
        transform=transform.name,
        low_K=x_RK.amin(0),
        high_K=x_RK.amax(0),
        transformed_low_K=z_RK.amin(0),
        transformed_high_K=z_RK.amax(0),
        weight_edges_B=torch.linspace(-largest, largest, BINS + 1),
        weight_counts_B=counts[0],
        transformed_counts_B=counts[1],
    )


def _inputs(bundle: Bundle, trace: Trace, layer: LayerInfo, step: int) -> Tensor:
    """What the layer reads at that step, over a few samples: (S, M, K)."""
    seen: list[Tensor] = []

    def see(_layer: LayerInfo, x: Tensor) -> None:
        seen.append(x)
        raise _Reached

    rows = slice(0, min(SAMPLES, trace.samples))
    predict = bundle.predictor(trace.integrator, trace.conditioning.rows(rows).to(bundle.device), modules=watched(bundle, [layer], see))
    with contextlib.suppress(_Reached):
        predict(trace.latent_ST[rows, step].to(bundle.device), step)
    if not seen:
        raise BadInput(f"{layer.name} does not run at step {step + 1}; choose another step")
    return seen[0]
