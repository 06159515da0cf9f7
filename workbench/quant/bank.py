"""The bank of solved weights: every layer at the widths that are asked for, from one replay of the float trace.

Dimension letters as in `types.py`: T steps, L layers, C widths, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from workbench.models import Bundle
from workbench.options import BadInput, OnProgress, QuantConfig, ignore_progress
from workbench.plans import BitChoice
from workbench.quant import activations, calibration, grids, lowrank
from workbench.quant.calibration import Count, fused_groups, input_groups
from workbench.quant.lowrank import Branch, Down
from workbench.quant.qlinear import Extras
from workbench.quant.sizes import ranks
from workbench.quant.solvers import solve_stack
from workbench.quant.store import SolvedWeight, WeightStore
from workbench.quant.transforms import Transform
from workbench.replay.trace import Trace
from workbench.runs import Run
from workbench.types import LayerInfo, QuantWeight, SolveReport

Widths = Sequence[int] | Mapping[str, Sequence[int]]  # of all layers, or of each by name


@dataclass(frozen=True, kw_only=True)
class WeightBank:
    """Layers' weights solved at some widths, by (layer name, bits).

    weight_error_LC float64: tr(dW H' dW^T) with H' the alpha-weighted sum over samples, steps and tokens (without a Hessian:
    the identity); 0 at 16 bits, NaN where a layer was not solved at a width.
    transforms, branches (where the options ask for one) and static ranges by layer name.
    `scratch` shares dequantized weights between the models built from it."""

    quant: QuantConfig
    model_hash: str
    layers: tuple[LayerInfo, ...]
    weight_bits_C: tuple[int, ...]
    weights: Mapping[tuple[str, int], QuantWeight]
    reports: Mapping[tuple[str, int], SolveReport]
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
        if not layer.has_act_bits:
            return Extras()
        return Extras(act=activations.format_of(self.quant, group_size), range_2=self.ranges.get(layer.name),
                      branch=self.branches.get(layer.name), input_group=self.layers[layer.fused_with].name)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What weights are solved on: the float trace, its calibration weights alpha_TL (None: all 1), the layers' transforms where they are
    known already, and the run folder that keeps what is solved. reference_bits: the width that shared parts (smoothing, branch) are
    searched for; by default the only width, or a typical one."""

    trace: Trace
    alpha_TL: Tensor | None = None
    fitted: Mapping[str, Transform] | None = None
    run: Run | None = None
    reference_bits: int | None = None


def solve_bank(bundle: Bundle, calibrated: Calibration, quant: QuantConfig, widths: Widths, *,
               on_progress: OnProgress = ignore_progress) -> WeightBank:
    """Replay the float trace, accumulate H' = sum alpha_tl x x^T per input, solve every layer at every width that the run folder does not
    hold yet. Layers that share an input share H', and siblings one factorization: H' is weighted by the mean of their alpha."""
    [bank] = solve_banks(bundle, calibrated, [quant], widths, on_progress=on_progress)
    return bank


def solve_banks(bundle: Bundle, calibrated: Calibration, quants: Sequence[QuantConfig], widths: Widths, *,
                on_progress: OnProgress = ignore_progress) -> list[WeightBank]:
    """A bank for each of several options that differ in the group size alone, from one replay."""
    quant, trace = quants[0], calibrated.trace
    if len({each.model_copy(update={"group_size": None}) for each in quants}) > 1:
        raise BadInput("banks solved together may differ in the group size alone")
    trace.check_is_of(bundle)
    wanted = _wanted(bundle, quant, widths)
    every = sorted({bits for asked in wanted.values() for bits in asked})
    reference = calibrated.reference_bits or calibration.reference_bits(every)
    alpha_TL = _alpha(bundle, calibrated, quant, on_progress)
    fitted = calibrated.fitted or calibration.fit_transforms(bundle, trace, quant, reference, on_progress=on_progress)
    made_from = (bundle.model_hash, trace, fitted_key(fitted), reference)
    solved = [_Solved(bundle, each, wanted, alpha_TL, reference, WeightStore(calibrated.run, *made_from, solving_key(each)))
              for each in quants]
    open_groups = [group for group in input_groups(bundle.layers) if any([not each.recall(group) for each in solved])]
    _solve(bundle, calibrated, quant, alpha_TL, fitted, open_groups, solved, on_progress)
    ranges = calibration.static_ranges(bundle, trace, fitted, on_progress=on_progress) if quant.act_scale == "tensor" else {}
    return [each.bank(transforms=fitted, ranges=ranges) for each in solved]


def _wanted(bundle: Bundle, quant: QuantConfig, widths: Widths) -> dict[str, Sequence[int]]:
    """The widths of every layer, by name; none of modulation whose outputs are cached."""
    return {layer.name: () if quant.modulation == "cached" and not layer.has_act_bits
            else widths[layer.name] if isinstance(widths, Mapping) else widths for layer in bundle.layers}


def _solve(bundle: Bundle, calibrated: Calibration, quant: QuantConfig, alpha_TL: Tensor, fitted: Mapping[str, Transform],
           open_groups: list[list[LayerInfo]], solved: Sequence[_Solved], on_progress: OnProgress) -> None:
    """Solve what is still open, as many inputs at a time as their Hessians fit in memory."""
    trace, parts = calibrated.trace, calibration.parts(open_groups)
    replayed = 0 if quant.hessian == "none" else calibration.replayed_steps(trace)
    count = Count(on_progress, "weights", sum(replayed + len(part) for part in parts))
    for part in parts:
        sums = calibration.hessians(bundle, trace, alpha_TL, part, count) if replayed else {}
        for group in part:
            summed = sums.pop(group[0].index).result() if replayed else None
            for siblings in fused_groups(group):
                transform = fitted[siblings[0].name]
                weights = {layer.name: transform.weight(bundle.weight(layer).float()) for layer in siblings}
                hessian_KK = None if summed is None else transform.hessian(summed)
                for each in solved:
                    each.add(siblings, weights, hessian_KK)
            count.step(f"solved {group[0].name}")


def fitted_key(fitted: Mapping[str, Transform]) -> dict[str, object]:
    """What distinguishes fitted transforms: their names, seeds and smoothing vectors."""
    return {name: (each.name, each.seed, getattr(each, "smooth_K", None)) for name, each in fitted.items()}


def solving_key(quant: QuantConfig) -> dict:
    """The settings that decide a solved weight; what activations do is not among them."""
    names = ("solver", "hessian", "weight_grid", "group_size", "branch_bits", "damping")
    return quant.model_dump(mode="json", include=set(names))


def round_bank(bundle: Bundle, quant: QuantConfig, widths: Widths) -> WeightBank:
    """Every layer rounded to nearest at every width: no trace is needed, so nothing is known about its error. For timing; smoothing
    divides by ones. Raises BadInput for options that need a calibration to have their size."""
    if quant.branch_bits or quant.act_scale == "tensor":
        raise BadInput("low-rank branches and static activations need a calibration; time a plan without them")
    wanted = _wanted(bundle, quant, widths)
    rounding = quant.model_copy(update={"solver": "nearest", "hessian": "none"})
    solved = _Solved(bundle, rounding, wanted, torch.ones(1, len(bundle.layers)), calibration.REFERENCE_BITS, WeightStore(None))
    fitted = {}
    for siblings in fused_groups(bundle.layers):
        ones_K = torch.ones(siblings[0].k_in, dtype=torch.float16)
        transform = calibration.transform_of(siblings[0], quant, ones_K)
        fitted |= {layer.name: transform for layer in siblings}
        solved.add(siblings, {layer.name: transform.weight(bundle.weight(layer).float()) for layer in siblings}, None)
    return replace(solved.bank(transforms=fitted), quant=quant)


class _Solved:
    """Accumulator: the weights of one bank, siblings by siblings."""

    def __init__(self, bundle: Bundle, quant: QuantConfig, wanted: Mapping[str, Sequence[int]], alpha_TL: Tensor, reference_bits: int,
                 store: WeightStore):
        self._bundle, self.quant, self._alpha_TL, self._reference_bits, self._store = bundle, quant, alpha_TL, reference_bits, store
        self._wanted = {name: tuple(sorted(set(bits) - {16})) for name, bits in wanted.items()}
        self.widths = tuple(sorted({bits for asked in wanted.values() for bits in asked}))
        self._rank_of_layer = ranks(bundle.layers, quant)
        self._weights: dict[tuple[str, int], QuantWeight] = {}
        self._reports: dict[tuple[str, int], SolveReport] = {}
        self._branches: dict[str, Branch] = {}

    def recall(self, group: Sequence[LayerInfo]) -> bool:
        """Take what the store has of these layers; whether that is all that is wanted."""
        for siblings in fused_groups(group):
            names = [layer.name for layer in siblings]
            for layer in siblings:
                for bits in self._wanted[layer.name]:
                    found = self._store.load(names, layer.name, BitChoice.of(bits, self.quant, layer), self._alpha_T(siblings))
                    if found is not None:
                        self._take(layer, bits, found, siblings)
        return not any(self._open(layer) for layer in group)

    def _open(self, layer: LayerInfo) -> tuple[int, ...]:
        return tuple(bits for bits in self._wanted[layer.name] if (layer.name, bits) not in self._weights)

    def _alpha_T(self, siblings: Sequence[LayerInfo]) -> Tensor:
        """The weights of the steps in the Hessian that these layers are solved under."""
        first = siblings[0].same_input
        return self._alpha_TL[:, [layer.index for layer in self._bundle.layers if layer.same_input == first]].mean(1)

    def _take(self, layer: LayerInfo, bits: int, found: SolvedWeight, siblings: Sequence[LayerInfo]) -> None:
        self._weights[layer.name, bits], self._reports[layer.name, bits] = found.weight, found.report
        if found.up_NR is not None and layer.name not in self._branches:
            shared = next((self._branches[each.name].down for each in siblings if each.name in self._branches), Down(found.down_RK))
            self._branches[layer.name] = Branch(up_NR=found.up_NR, down=shared)

    def add(self, siblings: Sequence[LayerInfo], weights: Mapping[str, Tensor], hessian_KK: Tensor | None) -> None:
        """Solve the layers of one input in one block, at the widths that are open; w_NK transformed, by name."""
        widths = sorted({bits for layer in siblings for bits in self._open(layer)})
        if not widths:
            return
        first, names = siblings[0], [layer.name for layer in siblings]
        if self._rank_of_layer[first.name] and any(name not in self._branches for name in names):
            self._branches |= self._branch(weights, self._rank_of_layer[first.name])
        residual = {name: w_NK - self._branches[name].value() if name in self._branches else w_NK for name, w_NK in weights.items()}
        choices = [BitChoice.of(bits, self.quant, first) for bits in widths]
        # few, nearly equal inputs reach the modulation: error compensation would fit them alone
        solver, signed = (self.quant.solver, self.quant.weight_grid == "signed") if first.has_act_bits else ("nearest", False)
        results = solve_stack(residual, hessian_KK, choices, solver=solver, damping=self.quant.damping, signed=signed)
        for layer in siblings:
            branch = self._branches.get(layer.name)
            for choice, (weight, report) in zip(choices, results[layer.name]):
                if choice.weight_bits not in self._open(layer):
                    continue
                found = SolvedWeight(weight=weight, report=report, up_NR=branch and branch.up_NR, down_RK=branch and branch.down.down_RK)
                self._take(layer, choice.weight_bits, found, siblings)
                self._store.save(names, layer.name, choice, self._alpha_T(siblings), found)

    def _branch(self, weights: Mapping[str, Tensor], rank: int) -> dict[str, Branch]:
        """The branch that these layers share, found by alternation with rounding at one width."""
        choice = BitChoice.of(self._reference_bits, self.quant)
        shared, _ = lowrank.alternate(torch.cat(list(weights.values())), rank, lambda residual_NK: grids.rounded(residual_NK, choice))
        found, row = {}, 0
        for name, w_NK in weights.items():
            found[name] = shared.rows(slice(row, row := row + len(w_NK)))
        return found

    def bank(self, **parts) -> WeightBank:
        """What has been solved."""
        layers = self._bundle.layers

        def loss(layer: LayerInfo, bits: int) -> float:
            if bits == 16 or (self.quant.modulation == "cached" and not layer.has_act_bits):
                return 0.0
            report = self._reports.get((layer.name, bits))
            return float("nan") if report is None else report.loss_solved

        error_LC = [[loss(layer, bits) for bits in self.widths] for layer in layers]
        return WeightBank(quant=self.quant, model_hash=self._bundle.model_hash, layers=layers, weight_bits_C=self.widths,
                          weights=self._weights, reports=self._reports, branches=self._branches, float_bytes=self._bundle.float_bytes,
                          linears=float_layers(self._bundle), weight_error_LC=torch.tensor(error_LC, dtype=torch.float64), **parts)


def float_layers(bundle: Bundle) -> dict[str, nn.Linear]:
    """Every layer's float linear, by name."""
    return {layer.name: bundle.float_layer(layer) for layer in bundle.layers}


def with_groups(banks: Mapping[int | None, WeightBank], group_size_L: Sequence[int | None]) -> WeightBank:
    """One bank with a group size of its own for every layer, from banks of one group size each."""
    any_bank = next(iter(banks.values()))
    if any_bank.branches:
        raise BadInput("layers that share a low-rank branch need one group size")
    chosen = {layer.name: banks[size] if layer.has_act_bits else any_bank for layer, size in zip(any_bank.layers, group_size_L)}
    return replace(any_bank, scratch={key: chosen[key[0]].scratch.setdefault(key, {}) for key in any_bank.weights},
                   weights={key: chosen[key[0]].weights[key] for key in any_bank.weights},
                   reports={key: chosen[key[0]].reports[key] for key in any_bank.reports},
                   weight_error_LC=torch.stack([chosen[layer.name].weight_error_LC[layer.index] for layer in any_bank.layers]))


def _alpha(bundle: Bundle, calibrated: Calibration, quant: QuantConfig, on_progress: OnProgress) -> Tensor:
    """The calibration weights that the options ask for, checked."""
    shape, alpha_TL = (calibrated.trace.steps, len(bundle.layers)), calibrated.alpha_TL
    if quant.hessian == "ssc":
        return calibration.spearman_weights(bundle, calibrated.trace, on_progress=on_progress)
    if alpha_TL is None or quant.hessian in ("uniform", "none"):
        return torch.ones(shape)
    if tuple(alpha_TL.shape) != shape or not bool((torch.isfinite(alpha_TL) & (alpha_TL >= 0)).all()):
        raise BadInput(f"calibration weights are {tuple(alpha_TL.shape)}; expected finite ones of shape {shape}")
    return alpha_TL
