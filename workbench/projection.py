"""What quantization errors add up to at the final latent, on prompts that solving has not seen.

The distortion table adds up squared errors as if those of different steps were independent. They are not: activations of neighbouring
steps differ by less than a coarse grid's spacing, so they are rounded alike, and a rounded weight errs alike at every step. One more
backward replay keeps the signed projections g . delta of every step and layer on a few random directions of the final latent:

    sum_t (g . delta)^2    what the table adds up
    (sum_t g . delta)^2    what arrives when errors of one layer add up with their signs

Weights are projected on prompts of their own, because error-compensated rounding fits the prompts it was solved on.
Letters as in `types.py`: T steps, L layers, C choices, S samples, R probes, M tokens, D latent channels, N out, K in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.options import OnProgress, Progress, ignore_progress
from workbench.quant.quantize import WeightBank
from workbench.sensitivity import CHUNK, LayerTap, RotatedWeights, fast_arithmetic, input_errors
from workbench.types import DistortionTable, LayerInfo, Trace

KEEP_BYTES = 1 << 30  # weight errors are kept between steps up to this size, and made anew beyond it
PROJECTED_BITS = (3, 4, 6)  # one factor per layer is fitted over these widths of its weight
LEAST_FACTOR, MOST_FACTOR = 0.25, 1000.0  # of a correction: projections of a few samples are no better than that


@dataclass(frozen=True, kw_only=True)
class Projection:
    """adjoint_RSTMD: gradient of <r, x_0> with respect to the latent after each step. act_TRSLC: g . delta of activations at every width
    below 16 bits. weight_RSLC: g . delta of weights summed over the steps, at `weight_bits_C`."""

    adjoint_RSTMD: Tensor
    act_TRSLC: Tensor
    weight_RSLC: Tensor
    weight_bits_C: tuple[int, ...]
    model_hash: str


def project(bundle: Bundle, trace: Trace, bank: WeightBank, *, probes: int = 2, seed: int = 1,
            on_progress: OnProgress = ignore_progress) -> Projection:
    """One backward replay of `trace`, latest step first (the adjoint of `sensitivity.profile`, errors kept with their signs)."""
    steps, schedule = trace.schedule.steps, trace.schedule
    generator = torch.Generator().manual_seed(seed)
    lambda_RSMD = torch.randn((probes, *trace.target_STMD[:, 0].shape), generator=generator, dtype=trace.target_STMD.dtype)
    widths = tuple(bits for bits in bank.weight_bits_C if bits in PROJECTED_BITS) or bank.weight_bits_C[:1]
    errors, adjoint, act = _Errors(bundle, bank, widths), [None] * steps, [None] * steps
    weight_RSLC = 0.0
    for done, step in enumerate(reversed(range(steps))):
        on_progress(Progress(stage="projection", done=done, total=steps, message=f"signed errors, step {step + 1} of {steps}"))
        adjoint[step] = lambda_RSMD
        seed_RSMD = (schedule.sigma_T1[step + 1] - schedule.sigma_T1[step]) * lambda_RSMD
        parts = [_replay_step(bundle, trace, step, slice(first, min(first + CHUNK, trace.samples)), seed_RSMD, errors)
                 for first in range(0, trace.samples, CHUNK)]
        updates, act_parts, weight_parts = zip(*parts)
        lambda_RSMD = lambda_RSMD + torch.cat(updates, 1)
        act[step], weight_RSLC = torch.cat(act_parts, 1), weight_RSLC + torch.cat(weight_parts, 1)
    on_progress(Progress(stage="projection", done=steps, total=steps, message="signed errors of all steps"))
    return Projection(adjoint_RSTMD=torch.stack(adjoint, 2), act_TRSLC=torch.stack(act), weight_RSLC=weight_RSLC,
                      weight_bits_C=widths, model_hash=bundle.model_hash)


def _replay_step(bundle: Bundle, trace: Trace, step: int, rows: slice, seed_RSMD: Tensor, errors: _Errors):
    """(gradient with respect to x_t, g . delta of activations (R, S, L, C), of weights) of one chunk of samples."""
    latent = trace.latent_STMD[rows, step].to(bundle.device).requires_grad_()
    with LayerTap(bundle) as tap:
        with torch.enable_grad(), fast_arithmetic(bundle):
            output = bundle.velocity(latent, trace.schedule, step, trace.conditioning.rows(rows))
        wanted = [tap.outputs[layer.index] for layer in bundle.layers]
        gradients = []
        for number, seed_SMD in enumerate(seed_RSMD[:, rows]):
            last = number + 1 == len(seed_RSMD)
            g = torch.autograd.grad(output, [latent, *wanted], seed_SMD.to(output), retain_graph=not last, allow_unused=True)
            gradients.append([torch.zeros_like(w) if one is None else one for one, w in zip(g, [latent, *wanted])])
        with torch.no_grad(), fast_arithmetic(bundle):
            pairs = [errors.project(layer, tap.inputs[layer.index], torch.stack([g[1 + layer.index] for g in gradients]))
                     for layer in bundle.layers]
    act_RSLC, weight_RSLC = (torch.stack(parts, 2) for parts in zip(*pairs))
    return torch.stack([g[0] for g in gradients]).to(trace.latent_STMD), act_RSLC, weight_RSLC


class _Errors:
    """Quantization errors of inputs and weights, and their products with a gradient."""

    def __init__(self, bundle: Bundle, bank: WeightBank, widths: tuple[int, ...]):
        self._bank, self._rotated, self._widths = bank, RotatedWeights(bundle, bank.quant, bank.transforms), widths
        self._kept: dict[int, Tensor] | None = {} if 4 * bundle.parameters * len(widths) <= KEEP_BYTES else None
        self._delta: tuple[object, Tensor] = (None, torch.empty(0))

    def project(self, layer: LayerInfo, x_SMK: Tensor, g_RSMN: Tensor) -> tuple[Tensor, Tensor]:
        """g . delta of the activations, and of the weights, both (R, S, C) float32 on the CPU."""
        weight_NK = self._rotated.weight(layer)
        g_RSMN = g_RSMN.to(weight_NK.dtype)
        if self._delta[0] is not x_SMK:  # layers that share an input follow each other
            self._delta = (x_SMK, input_errors(self._rotated, layer, x_SMK)[1])
        pulled_SRZ = (g_RSMN @ weight_NK).transpose(0, 1).flatten(2)
        act_SRC = pulled_SRZ @ self._delta[1].transpose(0, 1).flatten(2).transpose(1, 2).to(pulled_SRZ.dtype)
        outer_RSNK = g_RSMN.transpose(2, 3) @ x_SMK.to(g_RSMN.dtype)
        delta_CNK = self._weight_errors(layer)
        with torch.autocast(delta_CNK.device.type, enabled=False):  # nothing of the weight's size is converted
            weight_RSC = outer_RSNK.to(delta_CNK.dtype).flatten(2) @ delta_CNK.flatten(1).T
        return act_SRC.float().transpose(0, 1).cpu(), weight_RSC.float().cpu()

    def _weight_errors(self, layer: LayerInfo) -> Tensor:
        """(C, N, K) of the untransformed weight."""
        if self._kept is not None and layer.index in self._kept:
            return self._kept[layer.index]
        float_NK = self._bank.effective_weight(layer.name, 16)
        delta_CNK = torch.stack([self._bank.effective_weight(layer.name, bits) - float_NK for bits in self._widths])
        if self._kept is not None:
            self._kept[layer.index] = delta_CNK
        return delta_CNK


def with_signs(table: DistortionTable, projection: Projection, layers: tuple[LayerInfo, ...]) -> DistortionTable:
    """The table with every error multiplied by how much the errors of its kind add up over the steps.

    Activations: one factor per role and width, (sum_t p)^2 over sum_t p^2. Weights: one per layer over all its widths, projected
    over predicted error. Means of logarithms: a squared projection has heavy tails."""
    p_TRSLC = projection.act_TRSLC.double()
    ratio_LC = p_TRSLC.sum(0).square().mean((0, 1)) / p_TRSLC.square().sum(0).mean((0, 1)).clamp(min=torch.finfo(torch.float64).tiny)
    roles = [layer.role for layer in layers]
    log_LC = ratio_LC.clamp(LEAST_FACTOR, MOST_FACTOR).log()
    pooled_LC = torch.stack([log_LC[[i for i, other in enumerate(roles) if other == role]].mean(0) for role in roles]).exp()
    act_LC = torch.ones(len(layers), len(table.act_bits_C), dtype=torch.float64)
    act_LC[:, [c for c, bits in enumerate(table.act_bits_C) if bits != 16]] = pooled_LC
    columns = [table.weight_bits_C.index(bits) for bits in projection.weight_bits_C]
    predicted_LC = table.weight_error_LC.double()[:, columns].clamp(min=torch.finfo(torch.float64).tiny)
    weight_LC = projection.weight_RSLC.double().square().mean((0, 1)) / predicted_LC
    weight_L1 = weight_LC.clamp(LEAST_FACTOR, MOST_FACTOR).log().mean(1, keepdim=True).exp()
    return replace(table, error_TLC=(table.error_TLC.double() * act_LC).float(),
                   weight_error_LC=(table.weight_error_LC.double() * weight_L1).float())
