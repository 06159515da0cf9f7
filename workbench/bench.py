"""How fast and how large the quantized model really is on this machine, next to float, to the prediction and to other libraries.

Everything is timed in one run, in turns, and reported as medians: machines drift, ratios taken side by side do not.
Dimension letters: L layers, T steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from lowbit import ops
from torch import nn

from workbench import latency
from workbench.models import Bundle
from workbench.models.denoiser import Model, denoise
from workbench.options import BenchConfig, OnProgress, Progress, QuantConfig, ignore_progress
from workbench.plans import BitPlan, LatencyTable
from workbench.quant.quantize import QuantizedModel
from workbench.types import SoloTiming

FLOAT_TYPES = (torch.float32, torch.bfloat16)
CALLS = 5  # of a layer in a row: its weight is then as warm as memory allows
SOLO_TURNS = 9
ALONE_SECONDS = 1.0  # an image that takes longer is not timed again by itself
CHOICES = ((8, 8), (4, 8), (4, 4), (3, 3), (4, 16))  # (weight bits, activation bits) timed per layer


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One shape at one choice; microseconds for one image's tokens, activation quantization included."""

    m: int
    n: int
    k: int
    choice: str
    backend: str
    us: float
    float_us: float

    @property
    def speedup(self) -> float:
        return self.float_us / self.us


@dataclass(frozen=True, kw_only=True)
class ModelTime:
    """Milliseconds of one image's transformer calls, all steps. float_ms is the fastest float setting, named in `float_type`;
    quantized_ms the fastest arithmetic for what stays float, named in `quantized_type`."""

    float_ms: float
    float_type: str
    float_ms_by_type: dict[str, float]
    quantized_ms: float
    quantized_type: str
    quantized_ms_by_type: dict[str, float]
    predicted_ms: float  # by the cost table, for quantized_ms_by_type[predicted_type]
    predicted_type: str
    float_bytes: int
    quantized_bytes: int
    layer_bytes_share: float  # of 16-bit storage, over the quantized layers
    peak_process_bytes: int | None  # None where the system does not say


def layers(bundle: Bundle, quant: QuantConfig, config: BenchConfig, *, on_progress: OnProgress = ignore_progress) -> list[LayerTime]:
    """Every distinct layer shape at the usual choices, against the faster float type."""
    shapes, found = list(dict.fromkeys(latency.shape_of(layer) for layer in bundle.layers if layer.has_act_bits)), []
    for number, (tokens, n_out, k_in, bias) in enumerate(shapes):
        on_progress(Progress(stage="bench layers", done=number, total=len(shapes), message=f"{tokens} x {n_out} x {k_in}"))
        linear = nn.Linear(k_in, n_out, bias=bias, device=bundle.device).requires_grad_(False)
        x = torch.randn(1, tokens, k_in, device=bundle.device)
        runs: dict[str, Callable] = {}
        for dtype in FLOAT_TYPES:
            as_float = nn.Linear(k_in, n_out, bias=bias, device=bundle.device).to(dtype).requires_grad_(False)
            runs[str(dtype)] = latency.as_in_a_model([as_float], x.to(dtype))
        for weight_bits, act_bits in CHOICES:
            module = latency.module_of(linear, quant, weight_bits, act_bits)
            runs[_label(weight_bits, act_bits, quant)] = latency.as_in_a_model([module], x.to(bundle.dtype))
        us = latency.interleaved_timing(runs, config.rounds, bundle.device, calls=CALLS)
        float_us = min(us[str(dtype)] for dtype in FLOAT_TYPES)
        backend = ops.backend(bundle.device.type, bundle.dtype)
        found += [LayerTime(m=tokens, n=n_out, k=k_in, choice=label, backend=backend.reason if backend.is_kernel else backend.name,
                            us=us[label], float_us=float_us) for label in (_label(*choice, quant) for choice in CHOICES)]
    return found


def _label(weight_bits: int, act_bits: int, quant: QuantConfig) -> str:
    grouped = f" g{quant.group_size}" if quant.group_size else ""
    return f"W{weight_bits}A{act_bits}{grouped}"


def whole_runs(bundle: Bundle, quantized: QuantizedModel, steps: int) -> dict[tuple[str, str], Callable[[], None]]:
    """One image through all steps, by ("float" or "quantized", float type): the model in each float type, and the plan with its
    float parts in each."""
    keeps_float = any(choice.is_float for choice in quantized.plan.weight_choice_L)  # such layers compute in the bundle's own type
    runs = {}
    for dtype in FLOAT_TYPES if bundle.device.type == "cpu" else (bundle.dtype,):
        model = bundle.in_dtype(dtype)
        runs["float", _name(dtype)] = generation(bundle, steps, model)
        if dtype == bundle.dtype or not keeps_float:
            runs["quantized", _name(dtype)] = generation(bundle, steps, replace(quantized, bundle=model))
    return runs


def whole_model(bundle: Bundle, quantized: QuantizedModel, table: LatencyTable, us: Mapping[tuple[str, str], float],
                steps: int) -> ModelTime:
    """What the times of `whole_runs`, in microseconds, say; `table` was measured in the same turns, in the bundle's own type."""
    plan = quantized.plan
    float_ms, quantized_ms = ({name: value / 1000 for (found, name), value in us.items() if found == kind}
                              for kind in ("float", "quantized"))
    best_float, best_quantized = min(float_ms, key=float_ms.get), min(quantized_ms, key=quantized_ms.get)
    layers = [layer for layer in bundle.layers if layer.has_act_bits]
    sixteen = sum(2 * (layer.n_out * layer.k_in + layer.n_out * layer.has_bias) for layer in layers)
    stored = sum(quantized.layers[layer.name].weight_bytes for layer in layers)
    return ModelTime(float_ms=float_ms[best_float], float_type=best_float, float_ms_by_type=float_ms,
                     quantized_ms=quantized_ms[best_quantized], quantized_type=best_quantized, quantized_ms_by_type=quantized_ms,
                     predicted_ms=table.plan_ms(plan.weight_bits_L, _rows(plan, bundle, steps)), predicted_type=_name(bundle.dtype),
                     float_bytes=bundle.float_bytes, quantized_bytes=quantized.weight_bytes, layer_bytes_share=stored / sixteen,
                     peak_process_bytes=peak_process_bytes())


def peak_process_bytes() -> int | None:
    """The most memory that this process has held; None on Windows, where the standard library cannot ask."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def solo_timing(bundle: Bundle, quantized: QuantizedModel, steps: int, float_seconds: float, *,
                on_progress: OnProgress = ignore_progress) -> SoloTiming | None:
    """One image through float and quantized, in turns, beside the plan's prediction and the image that its cost table rests on, which
    says how fast the machine is at the moment. None where the plan predicts nothing for this machine or these steps, or where
    `float_seconds` an image would make it a wait."""
    plan = quantized.plan
    here = plan.latency_ms is not None and (plan.latency_target or "").startswith(latency.THIS_MACHINE)
    if not here or steps != len(plan.sigma_T) or float_seconds > ALONE_SECONDS:
        return None
    now, then_us = latency.reference(bundle, plan.quant) or (None, 0.0)
    runs = {"float": generation(bundle, steps, bundle), "quantized": generation(bundle, steps, quantized)}
    runs = runs if now is None else {**runs, "now": now}
    us = latency.interleaved_timing(runs, SOLO_TURNS, bundle.device, quantile=latency.IDLE_QUANTILE,
                                    report=lambda turn: on_progress(Progress(stage="time one image", done=turn, total=SOLO_TURNS)))
    return SoloTiming(float_ms=us["float"] / 1000, quantized_ms=us["quantized"] / 1000, predicted_ms=plan.latency_ms,
                      slower=1.0 if now is None else us["now"] / then_us)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(plan: BitPlan, bundle: Bundle, steps: int) -> list:
    """The plan's activation bits at the steps that are timed."""
    return [plan.act_bits_at(float(sigma)) for sigma in bundle.integrator(steps).sigma_T1[:-1]]


def generation(bundle: Bundle, steps: int, model: Model) -> Callable[[], object]:
    """One image's transformer calls, from noise, by a model; prompt and sampler are the bundle's."""
    integrator, conditioning, noise = bundle.integrator(steps), bundle.encode(bundle.prompts("showcase")[:1]), bundle.noise([0])
    return lambda: denoise(model, integrator, noise, conditioning)
