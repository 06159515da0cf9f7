"""From a method to its quantized model, under the settings of a comparison.

Dimension letters as in `types.py`: T steps, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from workbench import costs, pipeline
from workbench.methods import Method
from workbench.models import Bundle
from workbench.options import (
    ACT_BITS,
    BadInput,
    Budget,
    ContestConfig,
    EvolutionConfig,
    Frozen,
    OnProgress,
    QuantConfig,
    SearchConfig,
    TraceConfig,
)
from workbench.plans import BitChoice, BitPlan, make_plan
from workbench.quant import evolution
from workbench.quant.bank import Calibration, WeightBank, solve_bank, solve_banks, with_groups
from workbench.quant.quantize import QuantizedModel, build
from workbench.replay import trace
from workbench.rollout import Rollout
from workbench.runs import Run


@dataclass(frozen=True, kw_only=True)
class BuiltMethod:
    """A method's model. quantize_seconds: calibration, sensitivity and solving, without recording the trace that all methods
    share; search_seconds and evaluations: of the search of bits or of group sizes, 0 where there is none."""

    quantized: QuantizedModel
    quantize_seconds: float
    search_seconds: float = 0.0
    evaluations: int = 0


class Settings(Frozen):
    """What decides a method's model beside the method itself."""

    contest_config: ContestConfig = ContestConfig()
    trace: TraceConfig = TraceConfig()
    search: SearchConfig = SearchConfig()
    evolution: EvolutionConfig = EvolutionConfig()


def quant_of(method: Method, contest_config: ContestConfig) -> QuantConfig:
    """The method's options under the settings: cached modulation is a toggle for every method."""
    return method.quant.model_copy(update={"modulation": contest_config.modulation})


def check(method: Method, contest_config: ContestConfig) -> None:
    """Raises BadInput where the settings ask for what the method does not have."""
    if method.allocation == "uniform" and contest_config.act_bits not in ACT_BITS:
        raise BadInput(f"{method.name} uses one activation width everywhere; {contest_config.act_bits:g} is none of "
                       f"{', '.join(map(str, ACT_BITS))}")


class MethodBuilder:
    """Makes models one after another; methods with the same base share one profile."""

    def __init__(self, bundle: Bundle, settings: Settings, run: Run):
        self.bundle, self.settings, self.run = bundle, settings, run
        self._profiles: dict[QuantConfig, pipeline.Profile] = {}

    def make(self, method: Method, on_progress: OnProgress) -> BuiltMethod:
        """The method's model, from the shared trace."""
        contest_config, quant = self.settings.contest_config, quant_of(method, self.settings.contest_config)
        recorded = pipeline.record(self.bundle, self.settings.trace, run=self.run, on_progress=on_progress)
        if method.groups == "evolved" and contest_config.weight_bits != 16:
            return self._evolved(method, quant, recorded, on_progress)
        if method.allocation == "plan" or quant.hessian == "fisher":
            return self._profiled(method, quant, on_progress)
        started = time.perf_counter()
        bank = solve_bank(self.bundle, Calibration(trace=recorded), quant, self._widths(quant), on_progress=on_progress)
        quantized = build(self.bundle, bank, self._uniform(method, quant, pipeline.sigma_of(recorded)))
        return BuiltMethod(quantized=quantized, quantize_seconds=time.perf_counter() - started)

    def _widths(self, quant: QuantConfig) -> dict[str, tuple[int]]:
        """The width of every layer in a plan of one width."""
        uniform = costs.tabulate(self.bundle, quant, self.settings.trace.steps).uniform(self.settings.contest_config.weight_bits)
        return {layer.name: (bits,) for layer, bits in zip(self.bundle.layers, uniform)}

    def _uniform(self, method: Method, quant: QuantConfig, sigma_T: Sequence[float], group_size_L=None):
        contest_config = self.settings.contest_config
        return pipeline.uniform_plan(self.bundle, quant, sigma_T, contest_config.weight_bits, int(contest_config.act_bits), method.name,
                                     group_size_L=group_size_L)

    def _profiled(self, method: Method, quant: QuantConfig, on_progress: OnProgress) -> BuiltMethod:
        """Fisher-weighted weights, and for "plan" the searched activation bits."""
        if quant not in self._profiles:
            self._profiles[quant] = pipeline.profile(self.bundle, self.settings.trace, quant=quant, run=self.run, on_progress=on_progress)
        found = self._profiles[quant]
        sigma_T = pipeline.sigma_of(found.trace)
        if method.allocation == "uniform":
            quantized = build(self.bundle, found.bank, self._uniform(method, quant, sigma_T))
            return BuiltMethod(quantized=quantized, quantize_seconds=found.seconds)
        started = time.perf_counter()
        # the last ones first: a search that measures on fresh prompts takes the first
        unseen = [prompt for prompt in reversed(self.bundle.prompts("calibration")) if prompt not in found.trace.prompts]
        # every method stores modulation alike: bytes compare what is done to the other layers
        config = self.settings.search.model_copy(update={"modulation_widths": "fixed"})
        result = pipeline.search(self.bundle, found, self._budget(quant, sigma_T), config, run=self.run,
                                 judge_prompts=unseen, on_progress=on_progress)
        plan = self._judged(found, result.chosen.plan, unseen, on_progress).model_copy(update={"method": method.name})
        return BuiltMethod(quantized=build(self.bundle, found.bank, plan), quantize_seconds=found.seconds,
                           search_seconds=time.perf_counter() - started, evaluations=result.evaluations)

    def _judged(self, found: pipeline.Profile, plan: BitPlan, unseen: Sequence[str], on_progress: OnProgress) -> BitPlan:
        """The plan, or its activation bits on one weight width for all layers, whichever ends closer to float on prompts that
        neither calibration nor the comparison uses. A mix of widths is chosen by losses on calibration inputs, which it can
        overfit: one that is ahead there may be far behind elsewhere."""
        quant, width, costs_of = found.quant, self.settings.contest_config.weight_bits, found.costs
        even = make_plan(layers=self.bundle.layers, sigma_T=plan.sigma_T, act_bits_TL=plan.act_bits_TL, costs=costs_of, quant=quant,
                         model_hash=self.bundle.model_hash,
                         weight_choice_L=[BitChoice.of(bits, quant, layer)
                                          for bits, layer in zip(costs_of.uniform(width), self.bundle.layers)])
        limit_bytes = self._budget(quant, plan.sigma_T).max_weight_bytes
        if not unseen or even.weight_bits_L == plan.weight_bits_L or even.weight_bytes > limit_bytes:
            return plan
        config = TraceConfig(prompts=tuple(unseen[:pipeline.JUDGE_PROMPTS]), steps=len(plan.sigma_T), seed=pipeline.JUDGE_SEED)
        judging = trace.record(self.bundle, config, on_progress=on_progress)

        def weights(weight_bits_L):
            return build(self.bundle, found.bank, pipeline.uniform_plan(self.bundle, quant, plan.sigma_T, weight_bits_L, 16))

        rollout = Rollout(self.bundle, judging, weights, samples=judging.samples, scoring="raw")
        return min((plan, even), key=rollout.error_of)

    def _budget(self, quant: QuantConfig, sigma_T: Sequence[float]) -> Budget:
        """The bytes of the method's own uniform size, or of the effective bits that the settings allow."""
        contest_config = self.settings.contest_config
        if contest_config.effective_bits is None:
            max_bytes = pipeline.uniform_plan(self.bundle, quant, sigma_T, contest_config.weight_bits, 16).weight_bytes
        else:
            max_bytes = costs.outside_bytes(self.bundle, quant, len(sigma_T)) + int(
                contest_config.effective_bits * costs.layer_parameters(self.bundle) / 8)
        return Budget.parse({"max_weight_bytes": max_bytes, "max_mean_act_bits": contest_config.act_bits}, "budget")

    def _evolved(self, method: Method, quant: QuantConfig, recorded, on_progress: OnProgress) -> BuiltMethod:
        """A bank for each group size, then the sizes of least end-to-end error within the bytes of the uniform size."""
        started, sigma_T, contest_config = time.perf_counter(), pipeline.sigma_of(recorded), self.settings.contest_config
        quants = [quant.model_copy(update={"group_size": size}) for size in evolution.SIZES]
        solved = solve_banks(self.bundle, Calibration(trace=recorded), quants, self._widths(quant), on_progress=on_progress)
        banks = dict(zip(evolution.SIZES, solved))
        solve_seconds, config = time.perf_counter() - started, self.settings.evolution
        every, layers = len(self.bundle.layers), [layer for layer in self.bundle.layers if layer.has_act_bits]
        even = costs.tabulate(self.bundle, quant, len(sigma_T))
        tables = [costs.tabulate(self.bundle, quant, len(sigma_T), [size] * every) for size in evolution.SIZES]
        column = tables[0].weight_bits_C.index(contest_config.weight_bits)
        bytes_LC = [[int(table.weight_bytes_LC[layer.index, column]) for table in tables] for layer in layers]
        limit_bytes = sum(int(even.weight_bytes_LC[layer.index, column]) for layer in layers)
        now: dict[str, WeightBank] = {}

        def of_all(size_L) -> list:
            """Group sizes of all layers; modulation has its own."""
            chosen = dict(zip((layer.index for layer in layers), size_L))
            return [chosen.get(index, quant.group_size) for index in range(every)]

        def error_of(size_L) -> float:
            now["bank"] = with_groups(banks, of_all(size_L))
            return rollout.error_of(self._uniform(method, quant, sigma_T, of_all(size_L)))

        def modules(weight_bits_L):
            return build(self.bundle, now["bank"], self._uniform(method, quant, sigma_T, self._sizes(now["bank"])))

        rollout = Rollout(self.bundle, recorded, modules, samples=config.samples, scoring="raw")
        found = evolution.evolve(bytes_LC, limit_bytes, error_of, config, on_progress=on_progress)
        sizes_L = of_all(found.group_size_L)
        plan = self._uniform(method, quant, sigma_T, sizes_L)
        return BuiltMethod(quantized=build(self.bundle, with_groups(banks, sizes_L), plan), quantize_seconds=solve_seconds,
                           search_seconds=time.perf_counter() - started - solve_seconds, evaluations=found.evaluations)

    def _sizes(self, bank: WeightBank):
        width, own = self.settings.contest_config.weight_bits, bank.quant.group_size
        return [bank.weights[layer.name, width].group_size if layer.has_act_bits else own for layer in bank.layers]
