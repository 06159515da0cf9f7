"""Temporal Fisher information by one backward replay of the float trajectories, and what follows from it.

    adjoint (default)  the scalar is <r, x_0>: start with lambda = r, walk the trajectory backwards; at step t, with
                       h = sigma_{t+1} - sigma_t, backpropagate <h lambda, f(x_t)> and update
                       lambda <- lambda + d/dx_t.  Its g is the effect of a layer's output on the *final* latent.
    local              the scalar is <r, f(x_t)>, the reading of AdaTSQ (arXiv 2602.09883, section 3).

With r ~ N(0, I), the mean of (g . delta)^2 is the squared change that delta causes, to first order.
Dimension letters as in `types.py`: T steps, L layers, C choices, S samples, R probes, M tokens, N out, K in, D latent channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.models import Bundle
from workbench.options import ACT_BITS, BadInput, OnProgress, Progress, QuantConfig, SensitivityConfig, ignore_progress
from workbench.quant.activations import fake_quantize, format_of
from workbench.quant.transforms import Transform, make
from workbench.types import DistortionTable, LayerInfo, SensitivityMap, Trace

CHUNK = 8  # samples per backward pass: bounds the memory of one step
TOKENS_FOR_ERROR = 128  # rows that estimate the squared output error of a layer


class LayerTap:
    """While open, keeps every layer's input and makes its output part of the graph. One forward at a time: the model is locked, or
    somebody else's forward would leave its inputs here."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self._handles = []

    def __enter__(self):
        self.bundle.lock.acquire()
        for layer in self.bundle.layers:
            self._handles.append(self.bundle.linear(layer.name).register_forward_hook(self._keep(layer)))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self.inputs.clear()
        self.outputs.clear()
        self.bundle.lock.release()

    def _keep(self, layer: LayerInfo):
        def hook(_module, args, output):
            self.inputs[layer.index] = args[0].detach()
            if not output.requires_grad:  # a text stream that no latent has touched yet
                output = output.detach().requires_grad_()
            self.outputs[layer.index] = output
            return output
        return hook


@dataclass
class _Totals:
    """Accumulator over chunks and probes of one step; `columns` turns it into means."""

    layers: int
    fisher: list[list[Tensor]] = field(init=False)
    directional_LC: Tensor = field(init=False)
    squared_LC: Tensor = field(init=False)
    absmax_L: Tensor = field(init=False)
    samples: int = 0

    def __post_init__(self):
        self.fisher = [[] for _ in range(self.layers)]
        self.directional_LC = torch.zeros(self.layers, len(ACT_BITS), dtype=torch.float64)
        self.squared_LC = torch.zeros(self.layers, len(ACT_BITS), dtype=torch.float64)
        self.absmax_L = torch.zeros(self.layers)

    def columns(self, probes: int) -> dict[str, Tensor]:
        values_LV = torch.stack([torch.cat(parts) for parts in self.fisher])
        spread_L = values_LV.std(1) if values_LV.shape[1] > 1 else torch.zeros(self.layers)
        means = {"fisher": values_LV.mean(1), "stderr": spread_L / values_LV.shape[1] ** 0.5, "absmax": self.absmax_L,
                 "directional": self.directional_LC / (self.samples * probes), "squared": self.squared_LC / self.samples}
        return {name: value.to(torch.float32) for name, value in means.items()}


def profile(bundle: Bundle, trace: Trace, config: SensitivityConfig, quant: QuantConfig, *,
            fitted: Mapping[str, Transform] | None = None, on_progress: OnProgress = ignore_progress) -> SensitivityMap:
    """One backward replay of `trace`, latest step first; `on_progress` gets each finished column of Fisher information.

    `quant` says which transform a layer's input goes through before it is quantized, and how it is quantized; smoothing needs
    the layers' `fitted` transforms. A low-rank branch is not subtracted from the weight that passes the error on."""
    if trace.model_hash != bundle.model_hash:
        raise BadInput(f"the trace belongs to model {trace.model_hash}, not to {bundle.model_hash}; record it again")
    schedule, steps = trace.schedule, trace.schedule.steps
    samples = trace.samples
    generator = torch.Generator().manual_seed(config.seed)
    probe_RSMD = torch.randn((config.probes, *trace.target_STMD[:, 0].shape), generator=generator, dtype=trace.target_STMD.dtype)
    lambda_RSMD, adjoint, columns = probe_RSMD, [None] * steps, [None] * steps
    rotated = RotatedWeights(bundle, quant, fitted or {})
    for done, step in enumerate(reversed(range(steps))):
        on_progress(Progress(stage="sensitivity", done=done, total=steps, message=f"backward replay, step {step + 1} of {steps}"))
        adjoint[step] = lambda_RSMD
        totals, updates = _Totals(len(bundle.layers)), []
        seed_RSMD = probe_RSMD if config.estimator == "local" else (schedule.sigma_T1[step + 1] - schedule.sigma_T1[step]) * lambda_RSMD
        for start in range(0, samples, CHUNK):
            rows = slice(start, min(start + CHUNK, samples))
            updates.append(_replay_step(bundle, trace, step, rows, seed_RSMD[:, rows], rotated, totals))
        lambda_RSMD = lambda_RSMD + torch.cat(updates, 1)
        columns[step] = totals.columns(config.probes)
        on_progress(Progress(stage="sensitivity", done=done + 1, total=steps, message=f"step {step + 1} of {steps}",
                             detail={"step": step, "fisher_L": columns[step]["fisher"].tolist()}))
    stacked = {key: torch.stack([column[key] for column in columns]) for key in columns[0]}
    return SensitivityMap(
        layers=bundle.layers, schedule=schedule, fisher_TL=stacked["fisher"], stderr_TL=stacked["stderr"],
        alpha_TL=calibration_weights(stacked["fisher"], config), act_absmax_TL=stacked["absmax"], act_bits_C=ACT_BITS,
        directional_TLC=stacked["directional"], squared_error_TLC=stacked["squared"], config=config, samples=samples,
        model_hash=bundle.model_hash, adjoint_RSTMD=None if config.estimator == "local" else torch.stack(adjoint, 2))


def _replay_step(bundle, trace, step, rows, seed_RSMD, rotated, totals) -> Tensor:
    """Backpropagate every probe through one step for a chunk of samples; returns the gradient with respect to x_t."""
    latent = trace.latent_STMD[rows, step].to(bundle.device).requires_grad_()
    with LayerTap(bundle) as tap:
        with torch.enable_grad(), fast_arithmetic(bundle):
            output = bundle.velocity(latent, trace.schedule, step, trace.conditioning.rows(rows))
        wanted = [tap.outputs[layer.index] for layer in bundle.layers]
        gradients = []
        for number, seed_SMD in enumerate(seed_RSMD):
            last = number + 1 == len(seed_RSMD)
            g = torch.autograd.grad(output, [latent, *wanted], seed_SMD.to(output), retain_graph=not last, allow_unused=True)
            gradients.append([torch.zeros_like(w) if one is None else one for one, w in zip(g, [latent, *wanted])])
        with torch.no_grad(), fast_arithmetic(bundle):
            _add_layers(bundle, tap, [g[1:] for g in gradients], rotated, totals)
    totals.samples += len(latent)
    return torch.stack([g[0] for g in gradients]).to(trace.latent_STMD)


def _add_layers(bundle, tap, gradients_RL, rotated, totals) -> None:
    """Fisher, directional and squared error of every layer for one chunk."""
    absmax, delta_CSMK = 0.0, None
    for layer in bundle.layers:
        if layer.shares_input_with == layer.index:
            absmax, delta_CSMK = input_errors(rotated, layer, tap.inputs[layer.index])
        weight_NK, i = rotated.weight(layer), layer.index
        totals.absmax_L[i] = max(float(totals.absmax_L[i]), absmax)
        g_RSMN = torch.stack([g_L[i] for g_L in gradients_RL])
        totals.fisher[i].append(g_RSMN.to(weight_NK.dtype).square().sum(-1).mean(-1).flatten().cpu())
        # g . (delta W^T) = (g W) . delta: one product of g serves every width
        pulled_RSMK = g_RSMN @ weight_NK
        samples, widths = len(g_RSMN[0]), len(delta_CSMK)
        flat_delta = delta_CSMK.transpose(0, 1).reshape(samples, widths, -1)
        flat_pulled = pulled_RSMK.transpose(0, 1).reshape(samples, len(g_RSMN), -1)
        directional_SRC = flat_pulled @ flat_delta.transpose(1, 2)
        totals.directional_LC[i, :widths] += directional_SRC.double().square().sum((0, 1)).cpu()
        rows_CMK = delta_CSMK.flatten(1, 2)
        few_CMK = rows_CMK[:, :: max(1, rows_CMK.shape[1] // TOKENS_FOR_ERROR)]
        totals.squared_LC[i, :widths] += (few_CMK @ weight_NK.T).square().sum(-1).mean(-1).double().cpu() * samples


def input_errors(rotated: RotatedWeights, layer: LayerInfo, x_SMK: Tensor) -> tuple[float, Tensor]:
    """Largest |input|, and the quantization error (C, S, M, K) of the transformed input at every width but the last, float."""
    dtype = torch.float64 if x_SMK.dtype == torch.float64 else torch.float32
    rotated_SMK = rotated.transform(layer).forward(x_SMK.to(dtype))
    # a static range is that of the whole trace; these samples' own is close to it
    range_2 = torch.stack([rotated_SMK.min(), rotated_SMK.max()]) if rotated.act.scale == "tensor" else None
    delta_CSMK = torch.stack([fake_quantize(rotated_SMK, bits, rotated.act, range_2) for bits in ACT_BITS[:-1]])
    return float(x_SMK.abs().max()), delta_CSMK.sub_(rotated_SMK)


class RotatedWeights:
    """Each layer's transform and its float weight in the transformed basis, made once; `act`: how inputs are quantized."""

    def __init__(self, bundle: Bundle, quant: QuantConfig, fitted: Mapping[str, Transform]):
        dtype = torch.float64 if bundle.dtype == torch.float64 else torch.float32
        self.act = format_of(quant, quant.group_size)
        self._transforms, self._weights = {}, {}
        for layer in bundle.layers:
            transform = fitted.get(layer.name) or make(quant.transform, layer.k_in, quant.seed)
            self._transforms[layer.index] = transform
            self._weights[layer.index] = transform.weight(bundle.linear(layer.name).weight.to(dtype))

    def transform(self, layer: LayerInfo):
        return self._transforms[layer.index]

    def weight(self, layer: LayerInfo) -> Tensor:
        return self._weights[layer.index]


def fast_arithmetic(bundle: Bundle):
    """bfloat16 products on a CPU that has them: a gradient estimate with sampling noise of percents loses nothing."""
    fast = bundle.device.type == "cpu" and bundle.dtype == torch.float32 and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16) if fast else contextlib.nullcontext()


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
    weight_error_LC = weight_loss_LC * (smap.fisher_TL.mean(0) / (out_L * smap.samples))[:, None]
    return DistortionTable(act_bits_C=smap.act_bits_C, error_TLC=error_TLC, weight_bits_C=weight_bits_C,
                           weight_error_LC=weight_error_LC.float())
