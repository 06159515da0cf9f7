"""What quantization errors add up to at the final latent, on prompts that solving has not seen.

The distortion table adds up squared errors as if those of different steps were independent. They are not: activations of neighbouring
steps differ by less than a coarse grid's spacing, so they are rounded alike, and a rounded weight errs alike at every step. One more
backward replay keeps the signed projections g . delta of every step and layer on a few random directions of the final latent:

    sum_t (g . delta)^2    what the table adds up
    (sum_t g . delta)^2    what arrives when errors of one layer add up with their signs

Weights are projected on prompts of their own, because error-compensated rounding fits the prompts it was solved on.
Letters as in `types.py`: T steps, L layers, C choices, S samples, R probes, M tokens, N out, K in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.models.integrator import Adjoint
from workbench.options import ACT_BITS, OnProgress, Progress, ignore_progress
from workbench.quant.quantize import WeightBank
from workbench.replay.backward import Costates, Seen, backward
from workbench.replay.trace import Trace
from workbench.sensitivity.fisher import RotatedWeights, input_errors
from workbench.types import DistortionTable, LayerInfo

KEEP_BYTES = 1 << 30  # weight errors are kept between steps up to this size, and made anew beyond it
PROJECTED_BITS = (3, 4, 6)  # one factor per layer is fitted over these widths of its weight
LEAST_FACTOR, MOST_FACTOR = 0.25, 1000.0  # of a correction: projections of a few samples are no better than that


@dataclass(frozen=True, kw_only=True)
class SignedErrors:
    """costates_T: after each step, the gradient of <r, x_0> with respect to every part (R, S, *shape) of the sampler's state.
    act_TRSLC: g . delta of activations at every width below 16 bits. weight_RSLC: g . delta of weights summed over the steps, at
    `weight_bits_C`."""

    costates_T: tuple[tuple[Tensor, ...], ...]
    act_TRSLC: Tensor
    weight_RSLC: Tensor
    weight_bits_C: tuple[int, ...]
    model_hash: str


def project(bundle: Bundle, trace: Trace, bank: WeightBank, *, probes: int = 2, seed: int = 1,
            on_progress: OnProgress = ignore_progress) -> SignedErrors:
    """One backward replay of `trace`, latest step first (the adjoint of `fisher.profile`, errors kept with their signs)."""
    shape = trace.output_ST[:, 0].shape
    probe = torch.randn((probes, *shape), generator=torch.Generator().manual_seed(seed), dtype=trace.output_ST.dtype)
    widths = tuple(bits for bits in bank.weight_bits_C if bits in PROJECTED_BITS) or bank.weight_bits_C[:1]
    signed, costates = Signed(bundle, trace, bank, widths, probes), Costates(trace.steps)
    backward(bundle, trace, probe, [signed, costates], on_step=lambda done, total, step: on_progress(
        Progress(stage="projection", done=done, total=total, message=f"signed errors, step {step + 1} of {trace.steps}")))
    return SignedErrors(costates_T=costates.result(), act_TRSLC=signed.act_TRSLC, weight_RSLC=signed.weight_RSLC, weight_bits_C=widths,
                        model_hash=bundle.model_hash)


class Signed:
    """Visitor: products of the gradients with the rounding errors of inputs and weights, added up over the calls of a step."""

    def __init__(self, bundle: Bundle, trace: Trace, bank: WeightBank, widths: tuple[int, ...], probes: int):
        layers, samples = len(bundle.layers), trace.samples
        self._bank, self._rotated, self._widths = bank, RotatedWeights(bundle, bank.quant, bank.transforms), widths
        self._kept: dict[int, Tensor] | None = {} if 4 * bundle.parameters * len(widths) <= KEEP_BYTES else None
        self.act_TRSLC = torch.zeros(trace.steps, probes, samples, layers, len(ACT_BITS) - 1)
        self.weight_RSLC = torch.zeros(probes, samples, layers, len(widths))

    def begin(self, step: int, rows: slice, adjoint: Adjoint) -> None:
        """What follows a step does not matter here."""

    def visit(self, step: int, rows: slice, group: Sequence[Seen]) -> None:
        rounded = group[0].layer.has_act_bits
        deltas = [input_errors(self._rotated, group[0].layer, x_SMK) if rounded else None for x_SMK in group[0].x]
        for seen in group:
            weight_NK, i = self._rotated.weight(seen.layer), seen.layer.index
            for x_SMK, g_RSMN, delta_CSMK in zip(seen.x, seen.g, deltas):
                g_RSMN = g_RSMN.to(weight_NK.dtype)
                self.weight_RSLC[:, rows, i] += self._of_weights(seen.layer, x_SMK, g_RSMN)
                if delta_CSMK is not None:
                    pulled_SRZ = (g_RSMN @ weight_NK).transpose(0, 1).flatten(2)
                    act_SRC = pulled_SRZ @ delta_CSMK.transpose(0, 1).flatten(2).transpose(1, 2).to(pulled_SRZ.dtype)
                    self.act_TRSLC[step, :, rows, i] += act_SRC.float().transpose(0, 1).cpu()

    def _of_weights(self, layer: LayerInfo, x_SMK: Tensor, g_RSMN: Tensor) -> Tensor:
        """g . (x dW^T) for the errors dW of every width, (R, S, C) float32 on the CPU."""
        outer_RSNK = g_RSMN.transpose(2, 3) @ x_SMK.to(g_RSMN.dtype)
        delta_CNK = self._weight_errors(layer)
        with torch.autocast(delta_CNK.device.type, enabled=False):  # nothing of the weight's size is converted
            return (outer_RSNK.to(delta_CNK.dtype).flatten(2) @ delta_CNK.flatten(1).T).float().cpu()

    def _weight_errors(self, layer: LayerInfo) -> Tensor:
        """(C, N, K) of the untransformed weight."""
        if self._kept is not None and layer.index in self._kept:
            return self._kept[layer.index]
        float_NK = self._bank.effective_weight(layer.name, 16)
        delta_CNK = torch.stack([self._bank.effective_weight(layer.name, bits) - float_NK for bits in self._widths])
        if self._kept is not None:
            self._kept[layer.index] = delta_CNK
        return delta_CNK


def with_signs(table: DistortionTable, signed: SignedErrors, layers: tuple[LayerInfo, ...]) -> DistortionTable:
    """The table with every error multiplied by how much the errors of its kind add up over the steps.

    Activations: one factor per role and width, (sum_t p)^2 over sum_t p^2. Weights: one per layer over all its widths, projected
    over predicted error. Means of logarithms: a squared projection has heavy tails."""
    p_TRSLC = signed.act_TRSLC.double()
    ratio_LC = p_TRSLC.sum(0).square().mean((0, 1)) / p_TRSLC.square().sum(0).mean((0, 1)).clamp(min=torch.finfo(torch.float64).tiny)
    roles = [layer.role for layer in layers]
    log_LC = ratio_LC.clamp(LEAST_FACTOR, MOST_FACTOR).log()
    pooled_LC = torch.stack([log_LC[[i for i, other in enumerate(roles) if other == role]].mean(0) for role in roles]).exp()
    act_LC = torch.ones(len(layers), len(table.act_bits_C), dtype=torch.float64)
    act_LC[:, [c for c, bits in enumerate(table.act_bits_C) if bits != 16]] = pooled_LC
    columns = [table.weight_bits_C.index(bits) for bits in signed.weight_bits_C]
    predicted_LC = table.weight_error_LC.double()[:, columns].clamp(min=torch.finfo(torch.float64).tiny)
    weight_LC = signed.weight_RSLC.double().square().mean((0, 1)) / predicted_LC
    weight_L1 = weight_LC.clamp(LEAST_FACTOR, MOST_FACTOR).log().mean(1, keepdim=True).exp()
    return replace(table, error_TLC=(table.error_TLC.double() * act_LC).float(),
                   weight_error_LC=(table.weight_error_LC.double() * weight_L1).float())
