"""The verbs, and the only module that knows all stages. Everything the app and the shell do goes through here."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from workbench import costs as cost_tables
from workbench import families, generate, inspection, sensitivity, trace
from workbench.families import Bundle
from workbench.methods import METHODS, Method
from workbench.options import (
    ACT_BITS,
    WEIGHT_BITS,
    BadInput,
    Budget,
    ModelSpec,
    OnProgress,
    Progress,
    QuantConfig,
    SearchConfig,
    SensitivityConfig,
    TraceConfig,
    ignore_progress,
)
from workbench.plans import BitChoice, BitPlan, CostTable, ScoredPlan, make_plan
from workbench.quant.quantize import QuantizedModel, WeightBank, build, solve_bank
from workbench.rollout import Rollout
from workbench.runs import Run
from workbench.search.pareto import plan_point, within
from workbench.search.search import search as run_search
from workbench.types import Comparison, DistortionTable, SearchResult, SensitivityMap, Trace

JUDGE_PROMPTS, JUDGE_SEED = 8, 10_000  # held-out prompts that choose among the finalists, and their seeds
_LOADED: dict[tuple[str, str], Bundle] = {}
_LOADING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything a search needs to know about a model, from one set of calibration prompts."""

    trace: Trace
    sensitivity: SensitivityMap
    bank: WeightBank
    table: DistortionTable
    costs: CostTable
    quant: QuantConfig
    seconds: float


def load(source: str = "emoji-flux", device: str = "auto", *, on_progress: OnProgress = ignore_progress) -> Bundle:
    """The model of a source; one copy per process, however often it is asked for."""
    spec = ModelSpec.parse({"source": source, "device": device}, "model")
    with _LOADING:
        if (source, device) not in _LOADED:
            _LOADED[source, device] = families.load(spec)
        return _LOADED[source, device]


def profile(bundle: Bundle, trace_config: TraceConfig | None = None, config: SensitivityConfig | None = None,
            quant: QuantConfig | None = None, *, run: Run | None = None, on_progress: OnProgress = ignore_progress) -> Profile:
    """Record the float trajectories, map their sensitivity, solve every layer at every width. Stages that `run` holds are read."""
    trace_config, config, quant = trace_config or TraceConfig(), config or SensitivityConfig(), quant or QuantConfig()
    started = time.perf_counter()
    with bundle.lock:
        recorded = _recorded(bundle, trace_config, run, on_progress)
        smap = _stored(run, SensitivityMap, "sensitivity", (recorded, config, quant.transform, quant.seed),
                       lambda: sensitivity.profile(bundle, recorded, config, quant, on_progress=on_progress))
        bank = solve_bank(bundle, recorded, smap.alpha_TL, quant, WEIGHT_BITS, on_progress=on_progress)
        return Profile(trace=recorded, sensitivity=smap, bank=bank, quant=quant, costs=cost_tables.tabulate(bundle, quant),
                       table=sensitivity.tabulate(smap, bank.weight_bits_C, bank.weight_error_LC),
                       seconds=time.perf_counter() - started)


def search(bundle: Bundle, profiled: Profile, budget: Budget, config: SearchConfig | None = None, *, run: Run | None = None,
           on_progress: OnProgress = ignore_progress) -> SearchResult:
    """AdaTSQ's beam search under a budget; with `run`, an interrupted search goes on where it was.

    The front is measured on calibration prompts; the best few plans within budget are then judged on held-out ones."""
    config, sigma_T = config or SearchConfig(), sigma_of(profiled.trace)
    checkpoints = None if run is None else _Checkpoints(
        run, Run.key(bundle.model_hash, profiled.trace, profiled.sensitivity.config, profiled.quant, budget, config))

    def weights(weight_bits_L):
        return build(bundle, profiled.bank, uniform_plan(bundle, profiled.quant, sigma_T, weight_bits_L, 16))

    with Rollout(bundle, profiled.trace, weights, samples=config.samples, scoring=config.scoring,
                 adjoint_RSTMD=profiled.sensitivity.adjoint_RSTMD) as rollout:
        result = run_search(
            layers=bundle.layers, sigma_T=sigma_T, table=profiled.table, costs=profiled.costs, quant=profiled.quant,
            model_hash=bundle.model_hash, budget=budget, config=config, evaluator=rollout, on_progress=on_progress,
            checkpoint=checkpoints and checkpoints.save, resume=checkpoints and checkpoints.load())
    finalists = sorted((scored for scored in result.front if within(plan_point(scored), budget)), key=lambda scored: scored.error)
    return replace(result, chosen=_judge(bundle, profiled, finalists[:config.finalists], weights, on_progress))


def _judge(bundle: Bundle, profiled: Profile, finalists: list[ScoredPlan], weights, on_progress: OnProgress) -> ScoredPlan:
    """The finalist of least error on prompts that neither calibration nor search has seen."""
    seen = set(profiled.trace.prompts)
    prompts = tuple(prompt for prompt in bundle.prompts("held_out") if prompt not in seen)[:JUDGE_PROMPTS]
    steps = profiled.trace.schedule.steps
    held_out = trace.record(bundle, TraceConfig(prompts=prompts, steps=steps, seed=JUDGE_SEED), on_progress=on_progress)
    judged = []
    with Rollout(bundle, held_out, weights, samples=len(prompts), scoring="raw") as rollout:
        for number, scored in enumerate(finalists):
            on_progress(Progress(stage="judge", done=number, total=len(finalists), message=f"finalist {number + 1} on held-out prompts"))
            judged.append(scored.model_copy(update={"error": rollout.error_of(scored.plan), "samples": len(prompts), "held_out": True}))
    on_progress(Progress(stage="judge", done=len(finalists), total=len(finalists), message="finalists judged on held-out prompts"))
    return min(judged, key=lambda scored: scored.error)


def uniform_plan(bundle: Bundle, quant: QuantConfig, sigma_T: Sequence[float], weight_bits: int | Sequence[int], act_bits: int,
                 method: str = "adatsq_uniform") -> BitPlan:
    """A plan with one activation width for all steps and layers, and one weight width, or one per layer."""
    widths_L = [weight_bits] * len(bundle.layers) if isinstance(weight_bits, int) else weight_bits
    return make_plan(layers=bundle.layers, sigma_T=sigma_T, costs=cost_tables.tabulate(bundle, quant), quant=quant, method=method,
                     weight_choice_L=[BitChoice(weight_bits=bits, group_size=quant.group_size) for bits in widths_L],
                     act_bits_TL=[[act_bits] * len(bundle.layers)] * len(sigma_T), model_hash=bundle.model_hash)


def sigma_of(recorded: Trace) -> tuple[float, ...]:
    """Noise levels of the steps, without the final 0."""
    return tuple(float(sigma) for sigma in recorded.schedule.sigma_T1[:-1])


def quantize(bundle: Bundle, profiled: Profile, plan: BitPlan, *, on_progress: OnProgress = ignore_progress) -> QuantizedModel:
    """The model a plan describes. Reuses the profile's solved weights; solves anew only if the plan was made with other options."""
    validate_plan(bundle, plan)
    if plan.quant == profiled.quant:
        return build(bundle, profiled.bank, plan)
    bank = solve_bank(bundle, profiled.trace, profiled.sensitivity.alpha_TL, plan.quant, plan.weight_bits_L, on_progress=on_progress)
    return build(bundle, bank, plan)


def compare(bundle: Bundle, quantized: QuantizedModel, prompts: Sequence[str], seed: int, steps: int, *,
            on_progress: OnProgress = ignore_progress, float_run=None) -> Comparison:
    """The same prompts and seeds through float and quantized."""
    return generate.compare(bundle, quantized, prompts, seed, steps, on_progress=on_progress, float_run=float_run)


def preview(bundle: Bundle, comparison: Comparison, pair: int, step: int):
    """Both models' images as they stand after a step of a comparison; BadInput where its latents were too large to keep."""
    if comparison.trajectories is None:
        raise BadInput("the latents of this comparison were too large to keep, so its steps cannot be shown; compare fewer prompts")
    return generate.preview(bundle, comparison.trajectories, pair, step)


def inspect(bundle: Bundle, recorded: Trace, layer: int, step: int, quant: QuantConfig) -> inspection.LayerStep:
    """One layer at one step: input ranges per channel and the weight's histogram."""
    return inspection.inspect(bundle, recorded, layer, step, quant)


def export(bundle: Bundle, quantized: QuantizedModel, folder, *, on_progress: OnProgress = ignore_progress):
    """A checkpoint folder that `load_quantized` reopens to the same images."""
    from workbench import export as exporter

    return exporter.write(bundle, quantized, folder, on_progress=on_progress)


def load_quantized(folder) -> tuple[Bundle, QuantizedModel]:
    """The float pipeline parts and the quantized transformer of an exported folder."""
    from workbench import export as exporter

    return exporter.load_quantized(folder)


def validate_plan(bundle: Bundle, plan: BitPlan | dict | str) -> BitPlan:
    """A plan that fits this model, from a plan, a dict or a JSON text; BadInput says in one line why it does not."""
    if not isinstance(plan, BitPlan):
        plan = BitPlan.parse(plan, "plan")
    names = tuple(layer.name for layer in bundle.layers)
    if plan.model_hash != bundle.model_hash:
        raise BadInput(f"the plan belongs to model {plan.model_hash}; {bundle.name} is {bundle.model_hash}")
    if plan.layer_names != names:
        raise BadInput(f"the plan names {len(plan.layer_names)} layers that are not the {len(names)} of {bundle.name}")
    return plan


# --- comparing methods ---------------------------------------------------------------------------------------------


def compare_methods(bundle: Bundle, methods: Sequence[str], *, weight_bits: int, act_bits: float, prompts: Sequence[str] = (),
                    steps: int = 20, seed: int = 0, run: Run | None = None, on_progress: OnProgress = ignore_progress) -> dict:
    """Every method on the same prompts and seeds at one nominal size, as the JSON object of `compare`.

    `act_bits` is the mean that a method may spend: a plan is searched within it, the others use it uniformly."""
    for name in methods or ("",):
        if name not in METHODS:
            raise BadInput(f"unknown method {name!r}; use one or several of {', '.join(METHODS)}")
        if METHODS[name].allocation == "uniform":
            _whole(act_bits, name)
    prompts, seeds = generate.sample(tuple(prompts) or bundle.prompts("held_out"), seed, steps)
    float_run = generate.run(bundle, prompts, seeds, bundle.schedule(steps), on_progress=on_progress)
    trace_config, profiles, results = TraceConfig(steps=steps), {}, []
    for name in methods:
        quantized = _quantized_by(bundle, METHODS[name], trace_config, weight_bits, act_bits, profiles, run, on_progress)
        result = compare(bundle, quantized, prompts, seed, steps, on_progress=on_progress, float_run=float_run)
        results.append(_row(bundle, name, quantized.plan, result))
    return {"model": bundle.name, "steps": steps, "seed": seed, "device": str(bundle.device), "results": results,
            "float": {"weight_bytes": bundle.float_bytes, "seconds_per_image": float_run.seconds_per_image}}


def _quantized_by(bundle: Bundle, method: Method, trace_config: TraceConfig, weight_bits: int, act_bits: float, profiles: dict,
                  run: Run | None, on_progress: OnProgress) -> QuantizedModel:
    """The model one method makes. `profiles` keeps what methods with the same base share."""
    if method.allocation == "uniform" and method.quant.hessian != "fisher":
        recorded = _recorded(bundle, trace_config, run, on_progress)
        bank = solve_bank(bundle, recorded, None, method.quant, (weight_bits,), on_progress=on_progress)
        return build(bundle, bank, uniform_plan(bundle, method.quant, sigma_of(recorded), weight_bits, int(act_bits), method.name))
    if method.quant not in profiles:
        profiles[method.quant] = profile(bundle, trace_config, quant=method.quant, run=run, on_progress=on_progress)
    profiled = profiles[method.quant]
    plan = uniform_plan(bundle, method.quant, sigma_of(profiled.trace), weight_bits, 16 if method.allocation == "plan" else int(act_bits),
                        method.name)
    if method.allocation == "plan":
        budget = Budget.parse({"max_weight_bytes": plan.weight_bytes, "max_mean_act_bits": act_bits}, "budget")
        plan = search(bundle, profiled, budget, run=run, on_progress=on_progress).chosen.plan
    return build(bundle, profiled.bank, plan)


def _whole(act_bits: float, name: str) -> None:
    if act_bits not in ACT_BITS:
        raise BadInput(f"{name} uses one activation width everywhere; {act_bits:g} is none of {', '.join(map(str, ACT_BITS))}")


def _row(bundle: Bundle, name: str, plan: BitPlan, result: Comparison) -> dict:
    layers = sum(layer.n_out * (layer.k_in + layer.has_bias) for layer in bundle.layers)
    layer_bytes = result.quantized_bytes - cost_tables.tabulate(bundle, plan.quant).fixed_bytes
    intervals = {key: {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n} for key, value in result.metrics.items()}
    return {"method": name, "weight_bytes": result.quantized_bytes,
            "act_bits_mean": plan.act_bits_mean, "act_bits_macs": plan.act_bits_macs,
            "weight_bits_quantized": cost_tables.effective_bits(layer_bytes, layers),
            "weight_bits_total": cost_tables.effective_bits(result.quantized_bytes, bundle.parameters),
            "seconds_per_image": result.quantized_seconds_per_image, "compute": result.compute, "reason": result.reason, **intervals}


# --- storage ---------------------------------------------------------------------------------------------------------


def _recorded(bundle: Bundle, config: TraceConfig, run: Run | None, on_progress: OnProgress) -> Trace:
    made_from = (bundle.model_hash, config, config.prompts or bundle.prompts("calibration"))
    return _stored(run, Trace, "trace", made_from, lambda: trace.record(bundle, config, on_progress=on_progress))


def _stored(run: Run | None, cls: type, stage: str, made_from: tuple, make):
    return make() if run is None else run.resume(cls, stage, Run.key(*made_from), make)


class _Checkpoints:
    """A search's last checkpoint in a run folder: the states first, the table that names them last."""

    def __init__(self, run: Run, key: str):
        self.run, self.key = run, key

    def save(self, table: dict, blobs: dict[str, bytes]) -> None:
        for name, blob in blobs.items():
            if not self.run.path("state", f"{self.key}-{name}").exists():
                self.run.save_blob("state", f"{self.key}-{name}", blob)
        self.run.save_json("search", self.key, {"table": table, "states": sorted(blobs)})
        for path in self.run.folder.glob(f"state-{self.key}-*.safetensors"):
            if path.stem.removeprefix(f"state-{self.key}-") not in blobs:
                path.unlink(missing_ok=True)

    def load(self) -> tuple[dict, dict[str, bytes]] | None:
        found = self.run.load_json("search", self.key)
        if not found:
            return None
        blobs = {name: self.run.load_blob("state", f"{self.key}-{name}") for name in found["states"]}
        return found["table"], {name: blob for name, blob in blobs.items() if blob is not None}


def default_budget(bundle: Bundle, profiled: Profile) -> Budget:
    """4-bit weights and a mean of 4 activation bits: what the published tables compare at."""
    four_bit = uniform_plan(bundle, profiled.quant, sigma_of(profiled.trace), 4, 16)
    return Budget(max_weight_bytes=four_bit.weight_bytes, max_mean_act_bits=4.0)


