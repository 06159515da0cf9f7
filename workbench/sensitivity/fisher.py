"""Temporal Fisher information of every step and layer, and what quantizing a layer's input would do, in one backward replay.

Dimension letters as in `types.py`: T steps, L layers, C choices, S samples, R probes, M tokens, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.models.integrator import Adjoint
from workbench.options import ACT_BITS, OnProgress, Progress, QuantConfig, SensitivityConfig, ignore_progress
from workbench.quant.activations import fake_quantize, format_of
from workbench.quant.calibration import transform_of
from workbench.quant.transforms import Transform
from workbench.replay.backward import Seen, backward
from workbench.replay.trace import Trace
from workbench.sensitivity.table import calibration_weights
from workbench.types import LayerInfo, SensitivityMap

TOKENS_FOR_ERROR = 128  # rows that estimate the squared output error of a layer


def profile(bundle: Bundle, trace: Trace, config: SensitivityConfig, quant: QuantConfig, *,
            fitted: Mapping[str, Transform] | None = None, on_progress: OnProgress = ignore_progress) -> SensitivityMap:
    """One backward replay of `trace`, latest step first; `on_progress` gets each column of Fisher information as it stands.

    `quant` says which transform a layer's input goes through before it is quantized, and how it is quantized; smoothing needs
    the layers' `fitted` transforms. A low-rank branch is not subtracted from the weight that passes the error on."""
    shape = trace.output_ST[:, 0].shape
    probe = torch.randn((config.probes, *shape), generator=torch.Generator().manual_seed(config.seed), dtype=trace.output_ST.dtype)
    fisher = Fisher(bundle, trace, quant, fitted or {})

    def report(done: int, total: int, step: int) -> None:
        last = step + 1 if done % trace.steps else 0  # the step that has just been finished
        detail = {"step": last, "fisher_L": fisher.column(last)} if done else None
        on_progress(Progress(stage="sensitivity", done=done, total=total, detail=detail,
                             message=f"backward replay, step {step + 1} of {trace.steps}"))

    backward(bundle, trace, probe, [fisher], estimator=config.estimator, on_step=report)
    found = fisher.result()
    return SensitivityMap(
        layers=bundle.layers, sigma_T1=trace.integrator.sigma_T1, fisher_TL=found["fisher"], stderr_TL=found["stderr"],
        alpha_TL=calibration_weights(found["fisher"], config), act_absmax_TL=found["absmax"], act_bits_C=ACT_BITS,
        directional_TLC=found["directional"], squared_error_TLC=found["squared"], config=config, samples=trace.samples,
        model_hash=bundle.model_hash)


class Fisher:
    """Visitor: squared gradients per token at every layer's output, summed over calls; the squared effect of quantizing a layer's input,
    whose parts of several calls add up before they are squared."""

    def __init__(self, bundle: Bundle, trace: Trace, quant: QuantConfig, fitted: Mapping[str, Transform]):
        steps, layers, widths = trace.steps, len(bundle.layers), len(ACT_BITS)
        self._rotated = RotatedWeights(bundle, quant, fitted)
        self._fisher: dict[tuple[int, int], list[Tensor]] = {}
        self._directional_TLC = torch.zeros(steps, layers, widths, dtype=torch.float64)
        self._squared_TLC = torch.zeros(steps, layers, widths, dtype=torch.float64)
        self._absmax_TL = torch.zeros(steps, layers)
        self._samples, self._steps, self._layers = trace.samples, steps, layers

    def begin(self, step: int, rows: slice, adjoint: Adjoint) -> None:
        """What follows a step does not matter here."""

    def visit(self, step: int, rows: slice, group: Sequence[Seen]) -> None:
        absmax = max(float(x_SMK.abs().max()) for x_SMK in group[0].x)
        deltas = [input_errors(self._rotated, group[0].layer, x_SMK) for x_SMK in group[0].x] if group[0].layer.has_act_bits else []
        for seen in group:
            weight_NK, i = self._rotated.weight(seen.layer), seen.layer.index
            g = [g_RSMN.to(weight_NK.dtype) for g_RSMN in seen.g]
            self._absmax_TL[step, i] = max(float(self._absmax_TL[step, i]), absmax)
            self._fisher.setdefault((step, i), []).append(sum(g_RSMN.square().sum(-1).mean(-1) for g_RSMN in g).cpu())
            if deltas:
                self._add_effects(step, i, weight_NK, g, deltas)

    def _add_effects(self, step: int, i: int, weight_NK: Tensor, g: list[Tensor], deltas: list[Tensor]) -> None:
        """What quantizing the layer's input does, for one batch; g and deltas call by call."""
        directional_SRC, widths = 0.0, len(deltas[0])
        for g_RSMN, delta_CSMK in zip(g, deltas):
            # g . (delta W^T) = (g W) . delta: one product of g serves every width
            pulled_RSMK = g_RSMN @ weight_NK
            flat_delta = delta_CSMK.transpose(0, 1).flatten(2)
            flat_pulled = pulled_RSMK.transpose(0, 1).flatten(2)
            directional_SRC = directional_SRC + (flat_pulled @ flat_delta.transpose(1, 2)).double()
            self._squared_TLC[step, i, :widths] += self._squared(delta_CSMK, weight_NK, step) * len(flat_delta)
        self._directional_TLC[step, i, :widths] += directional_SRC.square().sum((0, 1)).cpu()

    def _squared(self, delta_CSMK: Tensor, weight_NK: Tensor, step: int) -> Tensor:
        """Mean |delta W^T|^2 per token, from tokens drawn at random, float64 (C) on the CPU. A stride may see one column of an image."""
        rows_CMK = delta_CSMK.flatten(1, 2)
        drawn = torch.randperm(rows_CMK.shape[1], generator=torch.Generator().manual_seed(step))[:TOKENS_FOR_ERROR]
        few_CMK = rows_CMK[:, drawn.to(rows_CMK.device)]
        return (few_CMK @ weight_NK.T).square().sum(-1).mean(-1).double().cpu()

    def column(self, step: int) -> list[float]:
        """Fisher information of a step as far as it is known; 0 where no layer has been seen."""
        return [float(torch.cat(self._fisher[step, i], 1).mean()) if (step, i) in self._fisher else 0.0 for i in range(self._layers)]

    def result(self) -> dict[str, Tensor | None]:
        """float32 (T, L) or (T, L, C), over all samples and probes."""
        fisher_TL, stderr_TL = torch.zeros(2, self._steps, self._layers)
        probes = 1
        for (step, i), parts in self._fisher.items():
            probes = len(parts[0])
            fisher_TL[step, i] = torch.cat([part.flatten() for part in parts]).mean()
            # probes of one sample see the same picture: the sample is what varies
            stderr_TL[step, i] = torch.cat(parts, 1).mean(0).std() / self._samples ** 0.5 if self._samples > 1 else 0.0
        return {"fisher": fisher_TL, "stderr": stderr_TL if self._samples > 1 else None, "absmax": self._absmax_TL,
                "directional": (self._directional_TLC / (self._samples * probes)).float(),
                "squared": (self._squared_TLC / self._samples).float()}


def input_errors(rotated: RotatedWeights, layer: LayerInfo, x_SMK: Tensor) -> Tensor:
    """The quantization error (C, S, M, K) of the transformed input at every width but the last, float."""
    dtype = torch.float64 if x_SMK.dtype == torch.float64 else torch.float32
    rotated_SMK = rotated.transform(layer).forward(x_SMK.to(dtype))
    # a static range is that of the whole trace; these samples' own is close to it
    range_2 = torch.stack([rotated_SMK.min(), rotated_SMK.max()]) if rotated.act.scale == "tensor" else None
    delta_CSMK = torch.stack([fake_quantize(rotated_SMK, bits, rotated.act, range_2) for bits in ACT_BITS[:-1]])
    return delta_CSMK.sub_(rotated_SMK)


class RotatedWeights:
    """Each layer's transform and its float weight in the transformed basis, made once; `act`: how inputs are quantized."""

    def __init__(self, bundle: Bundle, quant: QuantConfig, fitted: Mapping[str, Transform]):
        dtype = torch.float64 if bundle.dtype == torch.float64 else torch.float32
        self.act = format_of(quant, quant.group_size)
        self._transforms, self._weights = {}, {}
        for layer in bundle.layers:
            transform = fitted.get(layer.name) or transform_of(layer, quant)
            self._transforms[layer.index] = transform
            self._weights[layer.index] = transform.weight(bundle.weight(layer).to(dtype))

    def transform(self, layer: LayerInfo):
        return self._transforms[layer.index]

    def weight(self, layer: LayerInfo) -> Tensor:
        return self._weights[layer.index]
