"""The quantized model of a plan: a module tree of its own, made from solved weights.

Dimension letters as in `types.py`: T steps, L layers, S samples, N out features, K in features.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lowbit import ops
from torch import Tensor, nn

from workbench.models import Bundle
from workbench.models.denoiser import Predictor, StepState
from workbench.models.integrator import Integrator
from workbench.models.tree import with_modules
from workbench.options import BadInput, OnProgress, QuantConfig, ignore_progress
from workbench.plans import BitChoice, BitPlan
from workbench.quant.bank import Calibration, WeightBank, solve_banks, with_groups
from workbench.quant.modulation import CachedModulation
from workbench.quant.qlinear import FloatLinear, QuantLinear
from workbench.quant.segments import in_place
from workbench.quant.sizes import cached_bytes, shared_bytes
from workbench.quant.transforms import make
from workbench.types import Conditioning, LayerInfo, SolveReport


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A model of its own beside the float one, with which it shares every tensor that is not quantized.

    layers: the modules of every layer, by name. state: where its denoising loop is; one loop at a time.
    weight_bytes: resident bytes of the whole transformer. reports: what solving achieved, by layer, where it was solved here."""

    plan: BitPlan
    bundle: Bundle = field(repr=False)
    layers: Mapping[str, nn.Module] = field(repr=False)
    state: StepState = field(repr=False)
    weight_bytes: int
    reports: Mapping[str, SolveReport] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The quantized transformers, module trees of their own. Run by a plain pipeline, they read the step from the time they are
        told."""
        placed = in_place(self.bundle.layers, self.layers)
        trees = {name: with_modules(module, placed.get(name, {})) for name, module in self.bundle.modules.items()}
        for module in trees.values():
            module.register_forward_pre_hook(self._read_step, with_kwargs=True)
        return trees

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "modules"}  # made anew from what it is made of

    def predictor(self, integrator: Integrator, conditioning: Conditioning) -> Predictor:
        """The quantized output at (latent, step) for one batch. With cached modulation every adaLN output of these prompts is computed
        here, with the float weights, which the steps then do without."""
        cached = [module for module in self.layers.values() if isinstance(module, CachedModulation)]
        if cached:
            x_TSK = self.bundle.modulation_input(integrator, range(integrator.steps), conditioning)
            for module in cached:
                module.keep(integrator.sigma_T1[:-1].tolist(), x_TSK)
        return self.bundle.predictor(integrator, conditioning, modules=self.modules, state=self.state)

    def compute(self, bundle: Bundle) -> ops.Backend:
        """What runs its linear layers there, and why."""
        packed = [module.format for module in self.layers.values() if isinstance(module, QuantLinear)]
        beyond = dict.fromkeys(reason for layer_format in packed for reason in layer_format.beyond_kernel())
        backend = ops.backend(bundle.device.type, bundle.dtype)
        refused = dict.fromkeys(reason for layer_format in packed if (reason := layer_format.refused_on(bundle.device.type)))
        reasons = ([f"no kernel has {', '.join(beyond)}"] if beyond else []) + [f"the kernels leave layers out: {each}" for each in refused]
        return ops.Backend("emulated", "; ".join(reasons)) if reasons and backend.is_kernel else backend

    def shared_tensors(self) -> dict[str, Tensor]:
        """Smoothing vectors and branch factors that siblings share, by the name they are stored under."""
        return {f"{module.input_group}.{key}": tensor for module in self.layers.values() if isinstance(module, QuantLinear | FloatLinear)
                for key, tensor in module.shared_tensors().items()}

    def _read_step(self, module, args, kwargs) -> None:
        if not self.state.driven:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            self.state.follow(self.bundle.sigma_of(given))


def build(bundle: Bundle, bank: WeightBank, plan: BitPlan) -> QuantizedModel:
    """The model a plan describes, from solved weights. Cheap: tensors and caches are shared with the bank."""
    if plan.model_hash != bank.model_hash or plan.layer_names != tuple(layer.name for layer in bank.layers):
        raise BadInput(f"the plan was made for another model ({plan.model_hash}); this one is {bank.model_hash}")
    state = StepState(plan)
    layers = {layer.name: _module(bank, layer, choice, state) for layer, choice in zip(bank.layers, plan.weight_choice_L)}
    solved = zip(plan.layer_names, plan.weight_bits_L)
    return QuantizedModel(plan=plan, bundle=bundle, layers=layers, state=state,
                          reports={key[0]: bank.reports[key] for key in solved if key in bank.reports},
                          weight_bytes=resident_bytes(bundle, plan, layers, bank.linears))


def resident_bytes(bundle: Bundle, plan: BitPlan, modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> int:
    """Bytes of the whole transformer with these modules in place of the float ones; cached modulation at the plan's steps."""
    in_float = sum(2 * sum(p.numel() for p in linears[name].parameters()) for name in modules)
    own_bytes = sum(module.weight_bytes for module in modules.values() if not isinstance(module, CachedModulation))
    return (bundle.float_bytes - in_float + own_bytes + shared_bytes(bundle.layers, plan.quant)
            + cached_bytes(bundle.layers, plan.quant, len(plan.sigma_T)))


def modulation_module(linear: nn.Linear, quant: QuantConfig, state: StepState) -> nn.Module:
    """What stands in for a modulation layer that is kept in float, or whose outputs are cached."""
    if quant.modulation == "cached":
        return CachedModulation(linear, state)
    return FloatLinear(linear, make("none", linear.in_features, 0), step_state=None, layer_index=None)


def _module(bank: WeightBank, layer: LayerInfo, choice: BitChoice, state: StepState) -> nn.Module:
    linear, bits = bank.linears[layer.name], choice.weight_bits
    if not layer.has_act_bits and (choice.is_float or bank.quant.modulation == "cached"):
        return modulation_module(linear, bank.quant, state)
    kwargs = {"step_state": state, "layer_index": layer.index if layer.has_act_bits else None,
              "scratch": bank.scratch.setdefault((layer.name, bits), {}), "extras": bank.extras(layer, choice.group_size)}
    if choice.is_float:
        return FloatLinear(linear, bank.transform(layer.name), **kwargs)
    weight = bank.weights.get((layer.name, bits))
    if weight is None or (weight.group_size, weight.zero_NG is None) != (choice.group_size, choice.symmetric):
        solved = f"group size {weight.group_size}" if weight is not None else f"group size {bank.quant.group_size}"
        raise BadInput(f"{layer.name} was not solved at {bits} bits with group size {choice.group_size}; "
                       f"solved widths are {bank.weight_bits_C} with {solved}")
    return QuantLinear(weight, linear.bias, bank.transform(layer.name), **kwargs)


def quantize(bundle: Bundle, calibrated: Calibration, plan: BitPlan, *, on_progress: OnProgress = ignore_progress) -> QuantizedModel:
    """Solve the widths and group sizes a plan uses, no others, and build its model."""
    sizes = [choice.group_size for choice in plan.weight_choice_L]
    with_bits = [size for layer, size in zip(bundle.layers, sizes) if layer.has_act_bits]
    quants = {size: plan.quant.model_copy(update={"group_size": size}) for size in dict.fromkeys([plan.quant.group_size, *with_bits])}
    widths = {name: (bits,) for name, bits in zip(plan.layer_names, plan.weight_bits_L)}
    banks = solve_banks(bundle, calibrated, list(quants.values()), widths, on_progress=on_progress)
    own = banks[0] if len(banks) == 1 else replace(with_groups(dict(zip(quants, banks)), sizes), quant=plan.quant)
    return build(bundle, own, plan)
