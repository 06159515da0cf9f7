"""The stage that quantizes a model: solve every layer at every width once, then build a model for any plan.

Dimension letters as in `types.py`: T steps, L layers, C widths, S samples, M tokens, N out features, K in features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lowbit import ops
from torch import Tensor, nn

from workbench.families.base import Bundle
from workbench.options import BadInput, OnProgress, Progress, QuantConfig, ignore_progress
from workbench.plans import BitChoice, BitPlan
from workbench.quant import grids, transforms
from workbench.quant.grids import predicted_bytes
from workbench.quant.qlinear import FloatLinear, QuantLinear
from workbench.quant.solvers import HessianSum, solve_stack
from workbench.types import LayerInfo, QuantWeight, SensitivityMap, SolveReport, Trace

__all__ = ["QuantizedModel", "WeightBank", "build", "modulation_choice", "predicted_bytes", "quantize", "round_bank", "solve_bank"]

_MODULATION_GROUP = 64
_ROWS_PER_FORWARD = 4096  # tokens replayed at a time
_HESSIAN_BYTES = 4 << 30  # Hessians held at a time; a larger model is replayed once per part


@dataclass(frozen=True, kw_only=True)
class WeightBank:
    """Every layer's weight solved at every width, by (layer name, bits), and the modulation layers' weights by name.

    weight_error_LC float64: tr(dW H' dW^T) with H' the alpha-weighted sum over samples, steps and tokens; 0 at 16 bits.
    `scratch` shares dequantized weights between the models built from it."""

    quant: QuantConfig
    model_hash: str
    layers: tuple[LayerInfo, ...]
    weight_bits_C: tuple[int, ...]
    weights: Mapping[tuple[str, int], QuantWeight]
    reports: Mapping[tuple[str, int], SolveReport]
    modulation: Mapping[str, QuantWeight]
    weight_error_LC: Tensor
    linears: Mapping[str, nn.Linear] = field(repr=False)
    float_bytes: int
    scratch: dict = field(default_factory=dict, repr=False, compare=False)

    def transform(self, name: str) -> transforms.Transform:
        """The transform of a layer's input."""
        return transforms.make(self.quant.transform, self.linears[name].in_features, self.quant.seed)

    def effective_weight(self, name: str, bits: int) -> Tensor:
        """w_NK float32 that the quantized layer applies to its *untransformed* input."""
        if bits == 16:
            return self.linears[name].weight.detach().float()
        return self.transform(name).inverse(grids.dequantize(self.weights[name, bits]))

    def drop_caches(self) -> None:
        """Give the memory of all dequantized weights back."""
        for kept in self.scratch.values():
            kept.clear()


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """Modules for every quantizable and modulation layer. weight_bytes: resident bytes of the whole transformer."""

    plan: BitPlan
    modules: Mapping[str, nn.Module]
    weight_bytes: int

    def compute(self, bundle: Bundle) -> ops.Backend:
        """What runs its linear layers there, and why."""
        return ops.backend(bundle.device.type, bundle.dtype)

    @contextlib.contextmanager
    def attached(self, bundle: Bundle) -> Iterator[Bundle]:
        """The bundle with these modules in place and the cursor following the plan; as it was before, afterwards."""
        with bundle.lock:
            before = {name: bundle.linear(name) for name in self.modules}
            plan, row = bundle.cursor.plan, bundle.cursor.row
            try:
                for name, module in self.modules.items():
                    bundle.replace(name, module)
                bundle.cursor.plan = self.plan
                yield bundle
            finally:
                for name, module in before.items():
                    bundle.replace(name, module)
                bundle.cursor.plan, bundle.cursor.row = plan, row


def modulation_choice(quant: QuantConfig) -> BitChoice:
    """How the adaLN linears are stored; their activations stay float."""
    return BitChoice(weight_bits=quant.modulation_bits, group_size=_MODULATION_GROUP)


def input_groups(layers: Sequence[LayerInfo]) -> list[list[LayerInfo]]:
    """Layers that read the same tensor, together."""
    found: dict[int, list[LayerInfo]] = {}
    for layer in layers:
        found.setdefault(layer.shares_input_with, []).append(layer)
    return list(found.values())


def solve_bank(bundle: Bundle, trace: Trace, alpha_TL: Tensor | None, quant: QuantConfig, widths: Sequence[int], *,
               on_progress: OnProgress = ignore_progress) -> WeightBank:
    """Replay the float trace, accumulate H' = sum alpha_tl x x^T per input, solve every layer at every width.

    Layers that share an input share H', and with it one factorization: it is weighted by the mean of their alpha."""
    if bundle.model_hash != trace.model_hash:
        raise BadInput(f"the trace belongs to model {trace.model_hash}, not to {bundle.model_hash}")
    widths = tuple(sorted(set(widths)))
    choices = [BitChoice(weight_bits=bits, group_size=quant.group_size) for bits in widths if bits != 16]
    alpha_TL = _checked_alpha(alpha_TL if quant.hessian == "fisher" else None, trace, len(bundle.layers))
    weights: dict[tuple[str, int], QuantWeight] = {}
    reports: dict[tuple[str, int], SolveReport] = {}
    with bundle.lock:
        linears = {layer.name: bundle.linear(layer.name) for layer in (*bundle.layers, *bundle.modulation)}
        parts = _parts(input_groups(bundle.layers)) if choices else []
        count = _Count(on_progress, sum(trace.schedule.steps + len(part) for part in parts))
        for part in parts:
            sums = _accumulate(bundle, trace, alpha_TL, part, count)
            for group in part:
                transform = transforms.make(quant.transform, group[0].k_in, quant.seed)
                solved = solve_stack({layer.name: transform.weight(linears[layer.name].weight.float()) for layer in group},
                                     transform.hessian(sums.pop(group[0].index).result()), choices,
                                     solver=quant.solver, damping=quant.damping)
                for name, results in solved.items():
                    for choice, (weight, report) in zip(choices, results):
                        weights[name, choice.weight_bits], reports[name, choice.weight_bits] = weight, report
                count.step(f"solved {group[0].name}")
    error_LC = [[0.0 if bits == 16 else reports[layer.name, bits].loss_solved for bits in widths] for layer in bundle.layers]
    return WeightBank(
        quant=quant, model_hash=bundle.model_hash, layers=bundle.layers, weight_bits_C=widths, weights=weights,
        reports=reports, linears=linears, float_bytes=bundle.float_bytes,
        modulation=_round_modulation(bundle, linears, quant),
        weight_error_LC=torch.tensor(error_LC, dtype=torch.float64))


def round_bank(bundle: Bundle, quant: QuantConfig, widths: Sequence[int]) -> WeightBank:
    """Every layer rounded to nearest at every width: no trace is needed, so nothing is known about its error. For timing."""
    linears = {layer.name: bundle.linear(layer.name) for layer in (*bundle.layers, *bundle.modulation)}
    weights = {}
    for layer in bundle.layers:
        rotated_NK = transforms.make(quant.transform, layer.k_in, quant.seed).weight(linears[layer.name].weight.float())
        for bits in set(widths) - {16}:
            weights[layer.name, bits] = grids.quantize_nearest(rotated_NK, BitChoice(weight_bits=bits, group_size=quant.group_size))
    return WeightBank(quant=quant, model_hash=bundle.model_hash, layers=bundle.layers, weight_bits_C=tuple(sorted(set(widths))),
                      weights=weights, reports={}, linears=linears, float_bytes=bundle.float_bytes,
                      modulation=_round_modulation(bundle, linears, quant),
                      weight_error_LC=torch.full((len(bundle.layers), len(set(widths))), torch.nan, dtype=torch.float64))


def _round_modulation(bundle: Bundle, linears: Mapping[str, nn.Linear], quant: QuantConfig) -> dict[str, QuantWeight]:
    choice = modulation_choice(quant)
    return {} if choice.is_float else {layer.name: grids.quantize_nearest(linears[layer.name].weight, choice) for layer in bundle.modulation}


def build(bundle: Bundle, bank: WeightBank, plan: BitPlan) -> QuantizedModel:
    """The model a plan describes, from solved weights. Cheap: tensors and caches are shared with the bank."""
    if plan.model_hash != bank.model_hash or plan.layer_names != tuple(layer.name for layer in bank.layers):
        raise BadInput(f"the plan was made for another model ({plan.model_hash}); this one is {bank.model_hash}")
    modules: dict[str, nn.Module] = {}
    for layer, choice in zip(bank.layers, plan.weight_choice_L):
        linear, bits = bank.linears[layer.name], choice.weight_bits
        place = {"cursor": bundle.cursor, "layer_index": layer.index,
                 "scratch": bank.scratch.setdefault((layer.name, bits), {})}
        if choice.is_float:
            modules[layer.name] = FloatLinear(linear, bank.transform(layer.name), **place)
            continue
        weight = bank.weights.get((layer.name, bits))
        if weight is None or (weight.group_size, weight.zero_NG is None) != (choice.group_size, choice.symmetric):
            raise BadInput(f"{layer.name} was not solved at {bits} bits with group size {choice.group_size}; "
                           f"solved widths are {bank.weight_bits_C} with group size {bank.quant.group_size}")
        modules[layer.name] = QuantLinear(weight, linear.bias, bank.transform(layer.name), **place)
    for name, weight in bank.modulation.items():
        modules[name] = QuantLinear(weight, bank.linears[name].bias, transforms.make("none", weight.k_in, 0),
                                    scratch=bank.scratch.setdefault((name, weight.bits), {}))
    replaced_bytes = sum(2 * sum(p.numel() for p in bank.linears[name].parameters()) for name in modules)
    stored_bytes = sum(module.weight_bytes for module in modules.values())
    return QuantizedModel(plan=plan, modules=modules, weight_bytes=bank.float_bytes - replaced_bytes + stored_bytes)


def quantize(bundle: Bundle, trace: Trace, smap: SensitivityMap | None, plan: BitPlan, *,
             on_progress: OnProgress = ignore_progress) -> QuantizedModel:
    """Solve the widths a plan uses and build its model."""
    alpha_TL = None if smap is None else smap.alpha_TL
    return build(bundle, solve_bank(bundle, trace, alpha_TL, plan.quant, plan.weight_bits_L, on_progress=on_progress), plan)


class _Count:
    """Steps done of a known total, reported to the listener."""

    def __init__(self, on_progress: OnProgress, total: int):
        self._on_progress, self._total, self._done = on_progress, total, 0

    def step(self, message: str) -> None:
        self._done += 1
        self._on_progress(Progress(stage="weights", done=self._done, total=self._total, message=message))


def _checked_alpha(alpha_TL: Tensor | None, trace: Trace, layers: int) -> Tensor:
    shape = (trace.schedule.steps, layers)
    if alpha_TL is None:
        return torch.ones(shape)
    if tuple(alpha_TL.shape) != shape or not bool((torch.isfinite(alpha_TL) & (alpha_TL >= 0)).all()):
        raise BadInput(f"calibration weights are {tuple(alpha_TL.shape)}; expected finite ones of shape {shape}")
    return alpha_TL


def _parts(groups: list[list[LayerInfo]]) -> list[list[list[LayerInfo]]]:
    """Groups split into runs whose Hessians fit in memory together."""
    parts: list[list[list[LayerInfo]]] = []
    room_bytes = 0
    for group in groups:
        need_bytes = 4 * group[0].k_in ** 2
        if not parts or need_bytes > room_bytes:
            parts.append([])
            room_bytes = _HESSIAN_BYTES
        parts[-1].append(group)
        room_bytes -= need_bytes
    return parts


@torch.no_grad()
def _accumulate(bundle: Bundle, trace: Trace, alpha_TL: Tensor, part: list[list[LayerInfo]],
                count: _Count) -> dict[int, HessianSum]:
    """One replay of the float trace: H' of each group's input, by the index of its first layer."""
    sums = {group[0].index: HessianSum(group[0].k_in, bundle.device) for group in part}
    alpha_now: dict[int, float] = {}
    hooks = [bundle.linear(group[0].name).register_forward_pre_hook(
        lambda _, args, index=group[0].index: sums[index].update(args[0], alpha_now[index])) for group in part]
    chunk = max(1, _ROWS_PER_FORWARD // max(layer.tokens for layer in bundle.layers))
    try:
        for t in range(trace.schedule.steps):
            for group in part:
                alpha_now[group[0].index] = float(alpha_TL[t, [layer.index for layer in group]].mean())
            for first in range(0, trace.samples, chunk):
                rows = slice(first, first + chunk)
                bundle.velocity(trace.latent_STMD[rows, t].to(bundle.device), trace.schedule, t, trace.conditioning.rows(rows))
            count.step(f"replayed step {t + 1} of {trace.schedule.steps}")
    finally:
        for hook in hooks:
            hook.remove()
    return sums
