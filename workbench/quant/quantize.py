"""The stage that quantizes a model: solve every layer at every width once, then build a model for any plan.

Dimension letters as in `types.py`: T steps, L layers, C widths, S samples, M tokens, N out features, K in features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from lowbit import ops
from torch import Tensor, nn

from workbench.models.bundle import Bundle
from workbench.options import BadInput, OnProgress, QuantConfig, ignore_progress
from workbench.plans import BitChoice, BitPlan
from workbench.quant import activations, calibration, grids, lowrank, transforms
from workbench.quant.calibration import Count, input_groups
from workbench.quant.grids import predicted_bytes
from workbench.quant.lowrank import Branch
from workbench.quant.modulation import CachedModulation
from workbench.quant.qlinear import Extras, FloatLinear, QuantLinear
from workbench.quant.sizes import choice_of, modulation_bytes, modulation_choice, ranks, shared_bytes
from workbench.quant.solvers import solve_stack
from workbench.quant.transforms import Transform
from workbench.types import LayerInfo, QuantWeight, Schedule, SensitivityMap, SolveReport, Trace

__all__ = ["QuantizedModel", "WeightBank", "build", "input_groups", "modulation_choice", "predicted_bytes", "quantize", "round_bank",
           "solve_bank", "solve_banks", "with_groups"]


@dataclass(frozen=True, kw_only=True)
class WeightBank:
    """Every layer's weight solved at every width, by (layer name, bits), and the modulation layers' weights by name.

    weight_error_LC float64: tr(dW H' dW^T) with H' the alpha-weighted sum over samples, steps and tokens (without a Hessian:
    the identity); 0 at 16 bits.
    transforms, branches (where the options ask for one) and static ranges by layer name.
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
    transforms: Mapping[str, Transform] = field(default_factory=dict, repr=False)
    branches: Mapping[str, Branch] = field(default_factory=dict, repr=False)
    ranges: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    scratch: dict = field(default_factory=dict, repr=False, compare=False)

    def transform(self, name: str) -> Transform:
        """The transform of a layer's input."""
        return self.transforms[name]

    def effective_weight(self, name: str, bits: int) -> Tensor:
        """w_NK float32 that the quantized layer applies to its *untransformed* input."""
        if bits == 16:
            return self.linears[name].weight.detach().float()
        w_NK = grids.dequantize(self.weights[name, bits])
        return self.transform(name).weight_inverse(w_NK + self.branches[name].value() if name in self.branches else w_NK)

    def extras(self, layer: LayerInfo, group_size: int | None) -> Extras:
        """What the layer's arithmetic has beyond the plain case."""
        first = next(each.name for each in self.layers if each.index == layer.shares_input_with)
        return Extras(act=activations.format_of(self.quant, group_size), range_2=self.ranges.get(layer.name),
                      branch=self.branches.get(layer.name), input_group=first)


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """Modules for every quantizable and modulation layer. weight_bytes: resident bytes of the whole transformer."""

    plan: BitPlan
    modules: Mapping[str, nn.Module]
    weight_bytes: int

    def compute(self, bundle: Bundle) -> ops.Backend:
        """What runs its linear layers there, and why."""
        packed = [module.format for module in self.modules.values() if isinstance(module, QuantLinear)]
        beyond = dict.fromkeys(reason for form in packed for reason in form.beyond_kernel())
        backend = ops.backend(bundle.device.type, bundle.dtype)
        refused = dict.fromkeys(reason for form in packed if (reason := form.refused_on(bundle.device.type)))
        reasons = ([f"no kernel has {', '.join(beyond)}"] if beyond else []) + [f"the kernels leave layers out: {each}" for each in refused]
        return ops.Backend("emulated", "; ".join(reasons)) if reasons and backend.is_kernel else backend

    def shared_tensors(self) -> dict[str, Tensor]:
        """Smoothing vectors and branch factors that the layers of an input share, by the name they are stored under."""
        return {f"{module.input_group}.{key}": tensor for module in self.modules.values() if isinstance(module, QuantLinear | FloatLinear)
                for key, tensor in module.shared_tensors().items()}

    def cache_modulation(self, bundle: Bundle, schedule: Schedule, conditioning) -> None:
        """With cached modulation: every adaLN output of these prompts, computed with the float weights, which the steps then do
        without. While attached. Without: nothing."""
        cached = [module for module in self.modules.values() if isinstance(module, CachedModulation)]
        if cached:
            x_TSK = bundle.modulation_input(schedule, range(schedule.steps), conditioning)
            for module in cached:
                module.keep(schedule.sigma_T1[:-1].tolist(), x_TSK)

    @contextlib.contextmanager
    def attached(self, bundle: Bundle) -> Iterator[Bundle]:
        """The bundle with these modules in place and the cursor following the plan; as it was before, afterwards."""
        with bundle.lock:
            before = bundle.replace(self.modules)
            plan, row = bundle.cursor.plan, bundle.cursor.row
            try:
                bundle.cursor.plan = self.plan
                yield bundle
            finally:
                bundle.replace(before)
                bundle.cursor.plan, bundle.cursor.row = plan, row


def solve_bank(bundle: Bundle, trace: Trace, alpha_TL: Tensor | None, quant: QuantConfig, widths: Sequence[int], *,
               fitted: Mapping[str, Transform] | None = None, on_progress: OnProgress = ignore_progress) -> WeightBank:
    """Replay the float trace, accumulate H' = sum alpha_tl x x^T per input, solve every layer at every width.

    Layers that share an input share H', and with it one factorization: it is weighted by the mean of their alpha. `fitted`:
    the layers' transforms, where they are known already."""
    [bank] = solve_banks(bundle, trace, alpha_TL, [quant], widths, fitted=fitted, on_progress=on_progress)
    return bank


def solve_banks(bundle: Bundle, trace: Trace, alpha_TL: Tensor | None, quants: Sequence[QuantConfig], widths: Sequence[int], *,
                fitted: Mapping[str, Transform] | None = None, on_progress: OnProgress = ignore_progress) -> list[WeightBank]:
    """A bank for each of several options that differ in the group size alone, from one replay."""
    quant, widths = quants[0], tuple(sorted(set(widths)))
    if len({each.model_copy(update={"group_size": None}) for each in quants}) > 1:
        raise BadInput("banks solved together may differ in the group size alone")
    if bundle.model_hash != trace.model_hash:
        raise BadInput(f"the trace belongs to model {trace.model_hash}, not to {bundle.model_hash}")
    alpha_TL = _alpha(bundle, trace, alpha_TL, quant, on_progress)
    fitted = fitted or calibration.fit_transforms(bundle, trace, quant, widths, on_progress=on_progress)
    solved = [_Solved(each, widths, ranks(bundle.layers, each)) for each in quants]
    with bundle.lock:
        linears = {layer.name: bundle.linear(layer.name) for layer in (*bundle.layers, *bundle.modulation)}
        parts = calibration.parts(input_groups(bundle.layers)) if any(bits != 16 for bits in widths) else []
        replayed = 0 if quant.hessian == "none" else trace.schedule.steps
        count = Count(on_progress, "weights", sum(replayed + len(part) for part in parts))
        for part in parts:
            sums = calibration.hessians(bundle, trace, alpha_TL, part, count) if replayed else {}
            for group in part:
                transform = fitted[group[0].name]
                weights = {layer.name: transform.weight(linears[layer.name].weight.float()) for layer in group}
                hessian_KK = transform.hessian(sums.pop(group[0].index).result()) if replayed else None
                for each in solved:
                    each.add(weights, hessian_KK)
                count.step(f"solved {group[0].name}")
    ranges = calibration.static_ranges(bundle, trace, fitted, on_progress=on_progress) if quant.act_scale == "tensor" else {}
    modulation = _round_modulation(bundle, linears, quant)
    return [each.bank(bundle, linears=linears, modulation=modulation, transforms=fitted, ranges=ranges) for each in solved]


def round_bank(bundle: Bundle, quant: QuantConfig, widths: Sequence[int]) -> WeightBank:
    """Every layer rounded to nearest at every width: no trace is needed, so nothing is known about its error. For timing; smoothing
    divides by ones. Raises BadInput for options that need a calibration to have their size."""
    if quant.branch_bits or quant.act_scale == "tensor":
        raise BadInput("low-rank branches and static activations need a calibration; time a plan without them")
    solved = _Solved(quant.model_copy(update={"solver": "nearest", "hessian": "none"}), tuple(sorted(set(widths))),
                     ranks(bundle.layers, quant))
    linears = {layer.name: bundle.linear(layer.name) for layer in (*bundle.layers, *bundle.modulation)}
    fitted = {}
    for group in input_groups(bundle.layers):
        transform = transforms.make(quant.transform, group[0].k_in, quant.seed, torch.ones(group[0].k_in, dtype=torch.float16))
        fitted |= {layer.name: transform for layer in group}
        solved.add({layer.name: transform.weight(linears[layer.name].weight.float()) for layer in group}, None)
    return solved.bank(bundle, linears=linears, modulation=_round_modulation(bundle, linears, quant), transforms=fitted)


def _round_modulation(bundle: Bundle, linears: Mapping[str, nn.Linear], quant: QuantConfig) -> dict[str, QuantWeight]:
    choice = modulation_choice(quant)
    if quant.modulation != "stored" or choice.is_float:
        return {}
    return {layer.name: grids.quantize_nearest(linears[layer.name].weight, choice) for layer in bundle.modulation}


class _Solved:
    """Accumulator: the weights of one bank, group by group."""

    def __init__(self, quant: QuantConfig, widths: tuple[int, ...], rank_of_layer: Mapping[str, int]):
        self.quant, self.widths, self._rank_of_layer = quant, widths, rank_of_layer
        self._choices = [choice_of(bits, quant) for bits in widths if bits != 16]
        self._weights: dict[tuple[str, int], QuantWeight] = {}
        self._reports: dict[tuple[str, int], SolveReport] = {}
        self._branches: dict[str, Branch] = {}

    def add(self, weights: Mapping[str, Tensor], hessian_KK: Tensor | None) -> None:
        """Solve the layers of one input; w_NK transformed, by name."""
        rank = self._rank_of_layer[next(iter(weights))]
        if rank:
            branches = self._branch(weights, rank)
            self._branches |= branches
            weights = {name: w_NK - branches[name].value() for name, w_NK in weights.items()}
        solved = solve_stack(weights, hessian_KK, self._choices, solver=self.quant.solver, damping=self.quant.damping,
                             signed=self.quant.weight_grid == "signed")
        for name, results in solved.items():
            for choice, (weight, report) in zip(self._choices, results):
                self._weights[name, choice.weight_bits], self._reports[name, choice.weight_bits] = weight, report

    def _branch(self, weights: Mapping[str, Tensor], rank: int) -> dict[str, Branch]:
        """The branch that these layers share, found by alternation with rounding at one width."""
        choice = choice_of(calibration.reference_bits(self.widths), self.quant)
        shared, _ = lowrank.alternate(torch.cat(list(weights.values())), rank, lambda residual_NK: grids.rounded(residual_NK, choice))
        found, row = {}, 0
        for name, w_NK in weights.items():
            found[name] = shared.rows(slice(row, row := row + len(w_NK)))
        return found

    def bank(self, bundle: Bundle, **parts) -> WeightBank:
        error_LC = [[0.0 if bits == 16 else self._reports[layer.name, bits].loss_solved for bits in self.widths]
                    for layer in bundle.layers]
        return WeightBank(quant=self.quant, model_hash=bundle.model_hash, layers=bundle.layers, weight_bits_C=self.widths,
                          weights=self._weights, reports=self._reports, branches=self._branches, float_bytes=bundle.float_bytes,
                          weight_error_LC=torch.tensor(error_LC, dtype=torch.float64), **parts)


def with_groups(banks: Mapping[int | None, WeightBank], group_size_L: Sequence[int | None]) -> WeightBank:
    """One bank with a group size of its own for every layer, from banks of one group size each."""
    any_bank = next(iter(banks.values()))
    if any_bank.branches:
        raise BadInput("layers that share a low-rank branch need one group size")
    chosen = {layer.name: banks[size] for layer, size in zip(any_bank.layers, group_size_L)}
    return replace(any_bank, scratch={key: chosen[key[0]].scratch.setdefault(key, {}) for key in any_bank.weights},
                   weights={key: chosen[key[0]].weights[key] for key in any_bank.weights},
                   reports={key: chosen[key[0]].reports[key] for key in any_bank.reports},
                   weight_error_LC=torch.stack([chosen[layer.name].weight_error_LC[layer.index] for layer in any_bank.layers]))


def build(bundle: Bundle, bank: WeightBank, plan: BitPlan) -> QuantizedModel:
    """The model a plan describes, from solved weights. Cheap: tensors and caches are shared with the bank."""
    if plan.model_hash != bank.model_hash or plan.layer_names != tuple(layer.name for layer in bank.layers):
        raise BadInput(f"the plan was made for another model ({plan.model_hash}); this one is {bank.model_hash}")
    modules = {layer.name: _module(bundle, bank, layer, choice) for layer, choice in zip(bank.layers, plan.weight_choice_L)}
    for name, weight in bank.modulation.items():
        modules[name] = QuantLinear(weight, bank.linears[name].bias, transforms.make("none", weight.k_in, 0),
                                    scratch=bank.scratch.setdefault((name, weight.bits), {}))
    modules |= cached_modulation(bundle, bank.quant, bank.linears)
    return QuantizedModel(plan=plan, modules=modules, weight_bytes=resident_bytes(bundle, plan, modules, bank.linears))


def cached_modulation(bundle: Bundle, quant: QuantConfig, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of the adaLN linears where their outputs are cached."""
    names = [layer.name for layer in bundle.modulation] if quant.modulation == "cached" else []
    return {name: CachedModulation(linears[name], bundle.cursor) for name in names}


def resident_bytes(bundle: Bundle, plan: BitPlan, modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> int:
    """Bytes of the whole transformer with these modules in place of the float ones; cached modulation at the plan's steps."""
    in_float = sum(2 * sum(p.numel() for p in linears[name].parameters()) for name in modules)
    own_bytes = sum(module.weight_bytes for module in modules.values() if not isinstance(module, CachedModulation))
    cached = plan.quant.modulation == "cached"
    return (bundle.float_bytes - in_float + own_bytes + shared_bytes(bundle.layers, plan.quant)
            + (modulation_bytes(bundle.modulation, plan.quant, len(plan.sigma_T)) if cached else 0))


def _module(bundle: Bundle, bank: WeightBank, layer: LayerInfo, choice: BitChoice) -> nn.Module:
    linear, bits = bank.linears[layer.name], choice.weight_bits
    place = {"cursor": bundle.cursor, "layer_index": layer.index, "scratch": bank.scratch.setdefault((layer.name, bits), {}),
             "extras": bank.extras(layer, choice.group_size)}
    if choice.is_float:
        return FloatLinear(linear, bank.transform(layer.name), **place)
    weight = bank.weights.get((layer.name, bits))
    if weight is None or (weight.group_size, weight.zero_NG is None) != (choice.group_size, choice.symmetric):
        solved = f"group size {weight.group_size}" if weight is not None else f"group size {bank.quant.group_size}"
        raise BadInput(f"{layer.name} was not solved at {bits} bits with group size {choice.group_size}; "
                       f"solved widths are {bank.weight_bits_C} with {solved}")
    return QuantLinear(weight, linear.bias, bank.transform(layer.name), **place)


def quantize(bundle: Bundle, trace: Trace, smap: SensitivityMap | None, plan: BitPlan, *,
             on_progress: OnProgress = ignore_progress) -> QuantizedModel:
    """Solve the widths and group sizes a plan uses and build its model."""
    alpha_TL = None if smap is None else smap.alpha_TL
    sizes = [choice.group_size for choice in plan.weight_choice_L]
    quants = {size: plan.quant.model_copy(update={"group_size": size}) for size in dict.fromkeys([plan.quant.group_size, *sizes])}
    banks = solve_banks(bundle, trace, alpha_TL, list(quants.values()), plan.weight_bits_L, on_progress=on_progress)
    own = banks[0] if len(banks) == 1 else replace(with_groups(dict(zip(quants, banks)), sizes), quant=plan.quant)
    return build(bundle, own, plan)


def _alpha(bundle: Bundle, trace: Trace, alpha_TL: Tensor | None, quant: QuantConfig, on_progress: OnProgress) -> Tensor:
    """The calibration weights that the options ask for, checked."""
    shape = (trace.schedule.steps, len(bundle.layers))
    if quant.hessian == "ssc":
        return calibration.spearman_weights(bundle, trace, on_progress=on_progress)
    if alpha_TL is None or quant.hessian in ("uniform", "none"):
        return torch.ones(shape)
    if tuple(alpha_TL.shape) != shape or not bool((torch.isfinite(alpha_TL) & (alpha_TL >= 0)).all()):
        raise BadInput(f"calibration weights are {tuple(alpha_TL.shape)}; expected finite ones of shape {shape}")
    return alpha_TL
