"""The verbs, and the only module that knows all stages. Everything the app and the shell do goes through here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from workbench import baselines, generate, inspection, latency, metrics, sensitivity
from workbench import bench as benches
from workbench import costs as cost_tables
from workbench.checkpoints import Checkpoints
from workbench.models import Bundle, sources
from workbench.models.resident import Resident
from workbench.options import (
    WEIGHT_BITS,
    BadInput,
    BenchConfig,
    Budget,
    LatencyConfig,
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
from workbench.quant import calibration
from workbench.quant import quantize as quantize_stage
from workbench.quant.bank import Calibration, WeightBank, round_bank, solve_bank
from workbench.quant.quantize import QuantizedModel, build
from workbench.replay import trace
from workbench.replay.trace import Trace
from workbench.rollout import Rollout
from workbench.runs import Run
from workbench.search.ranking import predict
from workbench.search.search import search as run_search
from workbench.search.search_problem import pin_weights
from workbench.sensitivity.signed import with_signs
from workbench.stored import mapped, record, signed_errors
from workbench.types import Comparison, DistortionTable, SearchResult, SensitivityMap

JUDGE_PROMPTS, JUDGE_SEED = 16, 10_000  # held-out prompts that choose among the finalists, and their seeds
SEARCH_PROMPTS, SEARCH_SEED = 8, 5_000  # prompts that a search measures on (at least), and their seeds
_LOADED: Resident[Bundle] = Resident()


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
    """The model of a source; one copy per process, however often it is asked for. One that nobody uses any more may be let go when
    others are loaded (`models/resident.py`)."""
    spec = ModelSpec.parse({"source": source, "device": device}, "model")
    return _LOADED.get((source, str(sources.find_device(device))), lambda: sources.load(spec))


def is_loaded(source: str, device: str = "auto") -> bool:
    """Whether `load` would return at once."""
    return (source, str(sources.find_device(device))) in _LOADED


def profile(bundle: Bundle, trace_config: TraceConfig | None = None, config: SensitivityConfig | None = None,
            quant: QuantConfig | None = None, *, target: str = latency.THIS_MACHINE, run: Run | None = None,
            on_progress: OnProgress = ignore_progress) -> Profile:
    """Record the float trajectories, map their sensitivity, solve every layer at every width, tabulate what each choice costs on
    `target`. Stages that `run` holds are read."""
    LatencyConfig.parse({"target": target}, "latency")
    trace_config, config, quant = trace_config or TraceConfig(), config or SensitivityConfig(), quant or QuantConfig()
    started = time.perf_counter()
    recorded = record(bundle, trace_config, run=run, on_progress=on_progress)
    fitted = calibration.fit_transforms(bundle, recorded, quant, calibration.REFERENCE_BITS, on_progress=on_progress)
    smap = mapped(bundle, recorded, config, quant, fitted, run, on_progress)
    bank = solve_bank(bundle, Calibration(trace=recorded, alpha_TL=smap.alpha_TL, fitted=fitted, run=run), quant, WEIGHT_BITS,
                      on_progress=on_progress)
    times = latency.tabulate(bundle, quant, target, on_progress=on_progress)
    return Profile(trace=recorded, sensitivity=smap, bank=bank, quant=quant,
                   costs=cost_tables.tabulate(bundle, quant, recorded.steps, latency=times),
                   table=sensitivity.tabulate(smap, bank.weight_bits_C, bank.weight_error_LC),
                   seconds=time.perf_counter() - started)


def search(bundle: Bundle, profiled: Profile, budget: Budget, config: SearchConfig | None = None, *, run: Run | None = None,
           judge_prompts: Sequence[str] = (), pinned_L: Sequence[int | None] | None = None,
           on_progress: OnProgress = ignore_progress) -> SearchResult:
    """AdaTSQ's beam search under a budget, refined on measured error; with `run`, an interrupted search goes on where it was.

    Plans are measured on prompts that calibration has not seen; the best few within budget are then judged on held-out ones, or
    on `judge_prompts` where the held-out ones are kept for a comparison. pinned_L: weight bits of layers that are not to be chosen; by
    default those of modulation, where the config fixes it."""
    config, sigma_T = config or SearchConfig(), sigma_of(profiled.trace)
    fresh = fresh_trace(bundle, profiled, config, run, on_progress)
    signed = None
    if config.scoring == "adjoint" or config.planning_table == "signed":
        signed = signed_errors(bundle, fresh, profiled.bank, (profiled.trace, profiled.sensitivity.config), run, on_progress)
    # neither the budget nor the beam: what one search has measured serves another
    checkpoints = None if run is None else Checkpoints(
        run, Run.key(bundle.model_hash, profiled.trace, fresh, profiled.sensitivity.config, profiled.quant, profiled.bank.weight_bits_C,
                     config.scoring, config.samples, config.seed))
    planning_table = with_signs(profiled.table, signed, bundle.layers) if signed and config.planning_table == "signed" else profiled.table
    table, costs, weights = profiled.table, profiled.costs, weights_of(bundle, profiled)
    if pinned_L is None and (config.modulation_widths == "fixed" or profiled.quant.modulation == "cached"):
        pinned_L = costs.usual_bits_L
    if pinned_L is not None:
        (table, _), (planning_table, costs) = pin_weights(pinned_L, table, costs), pin_weights(pinned_L, planning_table, costs)
    rollout = Rollout(bundle, fresh, weights, samples=config.samples, scoring=config.scoring,
                      costates_T=None if signed is None else signed.costates_T)
    result = run_search(
        layers=bundle.layers, sigma_T=sigma_T, table=table, planning_table=planning_table, costs=costs, quant=profiled.quant,
        model_hash=bundle.model_hash, budget=budget, config=config, evaluator=rollout, pinned_L=pinned_L,
        ranked=_forms(profiled.sensitivity, profiled), prompts=Run.key(fresh.prompts, fresh.seeds),
        on_progress=on_progress, checkpoint=checkpoints and checkpoints.save, resume=checkpoints and checkpoints.load())
    return replace(result, chosen=_judge(bundle, profiled, result.finalists[:config.finalists], judge_prompts, on_progress))


def weights_of(bundle: Bundle, profiled: Profile):
    """The quantized model of one width per layer, as a `Rollout` asks for it."""
    def build_one(weight_bits_L):
        return build(bundle, profiled.bank, uniform_plan(bundle, profiled.quant, sigma_of(profiled.trace), weight_bits_L, 16))
    return build_one


def fresh_trace(bundle: Bundle, profiled: Profile, config: SearchConfig, run: Run | None, on_progress: OnProgress) -> Trace:
    """Float trajectories of the model's calibration prompts that the profile has not used: weights are solved to fit the ones it has.
    Where too few are left, the profile's own."""
    seen, held_out = set(profiled.trace.prompts), set(bundle.prompts("held_out"))
    fresh = [prompt for prompt in dict.fromkeys(bundle.prompts("calibration")) if prompt not in seen and prompt not in held_out]
    count = max(SEARCH_PROMPTS, config.samples)
    if len(fresh) < config.samples:
        return profiled.trace
    chosen = TraceConfig(prompts=tuple(fresh[:count]), steps=profiled.trace.steps, seed=SEARCH_SEED)
    return record(bundle, chosen, run=run, on_progress=on_progress)


def _forms(smap: SensitivityMap, profiled: Profile) -> dict[str, DistortionTable]:
    """Both forms of the distortion table that follow from one sensitivity map, by estimator and form."""
    tables = {}
    for form in ("directional", "white"):
        formed = replace(smap, config=smap.config.model_copy(update={"distortion": form}))
        tables[f"{smap.config.estimator} {form}"] = sensitivity.tabulate(formed, profiled.bank.weight_bits_C, profiled.bank.weight_error_LC)
    return tables


def table_variants(bundle: Bundle, profiled: Profile, *, run: Run | None = None,
                   on_progress: OnProgress = ignore_progress) -> dict[str, DistortionTable]:
    """All four distortion tables, {adjoint, local} x {directional, white}; the estimator that the profile lacks costs one replay."""
    tables = _forms(profiled.sensitivity, profiled)
    other = "local" if profiled.sensitivity.config.estimator == "adjoint" else "adjoint"
    config = profiled.sensitivity.config.model_copy(update={"estimator": other})
    smap = mapped(bundle, profiled.trace, config, profiled.quant, profiled.bank.transforms, run, on_progress)
    return tables | _forms(smap, profiled)


def _judge(bundle: Bundle, profiled: Profile, finalists: Sequence[ScoredPlan], prompts: Sequence[str],
           on_progress: OnProgress) -> ScoredPlan:
    """The finalist of least error on prompts that neither calibration nor search has seen."""
    held_out = _held_out(bundle, profiled, JUDGE_PROMPTS, on_progress, prompts)
    judged = []
    rollout = Rollout(bundle, held_out, weights_of(bundle, profiled), samples=held_out.samples, scoring="raw", on_step=on_progress)
    for number, scored in enumerate(finalists):
        on_progress(Progress(stage="judge", done=number, total=len(finalists), message=f"finalist {number + 1} on held-out prompts"))
        judged.append(_judged(rollout, scored))
    on_progress(Progress(stage="judge", done=len(finalists), total=len(finalists), message="finalists judged on held-out prompts"))
    return min(judged, key=lambda scored: scored.error)


def _judged(rollout: Rollout, scored: ScoredPlan) -> ScoredPlan:
    """A plan with its error on held-out prompts and the interval of it."""
    measured = metrics.interval(rollout.errors_of(scored.plan).tolist(), higher_is_better=False)
    return scored.model_copy(update={"error": measured.mean, "samples": measured.n, "held_out": True,
                                     "low": max(0.0, measured.low), "high": measured.high})


def _held_out(bundle: Bundle, profiled: Profile, count: int, on_progress: OnProgress, prompts: Sequence[str] = ()) -> Trace:
    """Float trajectories of held-out prompts, the model's own unless others are given. BadInput where the profile has seen them all."""
    seen = set(profiled.trace.prompts)
    prompts = tuple(prompt for prompt in prompts or bundle.prompts("held_out") if prompt not in seen)[:count]
    if not prompts:
        raise BadInput("the profile was made with every held-out prompt, so none is left to measure on; profile with others")
    return trace.record(bundle, TraceConfig(prompts=prompts, steps=profiled.trace.steps, seed=JUDGE_SEED), on_progress=on_progress)


def paint_plan(bundle: Bundle, profiled: Profile, weight_bits_L: Sequence[int], act_bits_TL: Sequence[Sequence[int]],
               method: str = "painted") -> BitPlan:
    """A plan of these bits, with its exact costs and what the profile's table predicts for it. Nothing is run."""
    choices = [BitChoice.of(bits, profiled.quant, layer) for bits, layer in zip(weight_bits_L, bundle.layers, strict=True)]
    return make_plan(layers=bundle.layers, sigma_T=sigma_of(profiled.trace), weight_choice_L=choices, act_bits_TL=act_bits_TL,
                     costs=profiled.costs, quant=profiled.quant, model_hash=bundle.model_hash, method=method,
                     predicted_error=predict(profiled.table, weight_bits_L, act_bits_TL))


def evaluate_plan(bundle: Bundle, profiled: Profile, plan: BitPlan, *, prompts: int = JUDGE_PROMPTS,
                  on_progress: OnProgress = ignore_progress) -> ScoredPlan:
    """A plan from anywhere, painted by hand for instance, really run on held-out prompts; its error comes with an interval."""
    plan = validate_plan(bundle, plan)
    if plan.quant != profiled.quant:
        raise BadInput("the plan's weights are solved with other settings than this profile's; profile with the plan's settings first")
    if plan.sigma_T != sigma_of(profiled.trace):
        raise BadInput(f"the plan has {len(plan.sigma_T)} steps and its own noise levels; the profile has "
                       f"{profiled.trace.steps} others")
    held_out = _held_out(bundle, profiled, prompts, on_progress)
    rollout = Rollout(bundle, held_out, weights_of(bundle, profiled), samples=held_out.samples, scoring="raw", on_step=on_progress)
    return _judged(rollout, ScoredPlan(plan=plan, error=0.0, samples=1, origin="painted"))


def uniform_plan(bundle: Bundle, quant: QuantConfig, sigma_T: Sequence[float], weight_bits: int | Sequence[int], act_bits: int,
                 method: str = "adatsq_uniform", *, group_size_L: Sequence[int | None] | None = None) -> BitPlan:
    """A plan with one activation width for all steps and layers, and one weight width (modulation at its usual one), or one per layer;
    `group_size_L` where layers have group sizes of their own."""
    sizes_L = group_size_L or [quant.group_size] * len(bundle.layers)
    costs = cost_tables.tabulate(bundle, quant, len(sigma_T), sizes_L)
    widths_L = costs.uniform(weight_bits) if isinstance(weight_bits, int) else weight_bits
    return make_plan(layers=bundle.layers, sigma_T=sigma_T, quant=quant, method=method, costs=costs,
                     weight_choice_L=[cost_tables.sized(BitChoice.of(bits, quant, layer), layer, size)
                                      for bits, layer, size in zip(widths_L, bundle.layers, sizes_L, strict=True)],
                     act_bits_TL=[[act_bits] * len(bundle.layers)] * len(sigma_T), model_hash=bundle.model_hash)


def sigma_of(recorded: Trace) -> tuple[float, ...]:
    """Noise levels of the steps, without the final 0."""
    return recorded.sigma_T


def quantize(bundle: Bundle, profiled: Profile, plan: BitPlan, *, on_progress: OnProgress = ignore_progress) -> QuantizedModel:
    """The model a plan describes. Reuses the profile's solved weights; solves anew only if the plan was made with other options."""
    plan = validate_plan(bundle, plan)
    sizes = {choice.group_size for choice, layer in zip(plan.weight_choice_L, bundle.layers) if layer.has_act_bits}
    if plan.quant == profiled.quant and sizes == {plan.quant.group_size}:
        return build(bundle, profiled.bank, plan)
    calibrated = Calibration(trace=profiled.trace, alpha_TL=profiled.sensitivity.alpha_TL, reference_bits=calibration.REFERENCE_BITS)
    return quantize_stage.quantize(bundle, calibrated, plan, on_progress=on_progress)


def quantize_plan(bundle: Bundle, plan: BitPlan, trace_config: TraceConfig, config: SensitivityConfig, *, run: Run | None = None,
                  on_progress: OnProgress = ignore_progress) -> QuantizedModel:
    """The model a plan describes, from calibration prompts: the same weights as a profile's, but only at the plan's widths, and of those
    only what `run` does not hold."""
    plan, quant = validate_plan(bundle, plan), plan.quant
    recorded = record(bundle, trace_config, run=run, on_progress=on_progress)
    fitted = calibration.fit_transforms(bundle, recorded, quant, calibration.REFERENCE_BITS, on_progress=on_progress)
    alpha_TL = None
    if quant.hessian == "fisher":
        alpha_TL = mapped(bundle, recorded, config, quant, fitted, run, on_progress).alpha_TL
    calibrated = Calibration(trace=recorded, alpha_TL=alpha_TL, fitted=fitted, run=run, reference_bits=calibration.REFERENCE_BITS)
    return quantize_stage.quantize(bundle, calibrated, plan, on_progress=on_progress)


def compare(bundle: Bundle, quantized: QuantizedModel, prompts: Sequence[str], seed: int, steps: int, *,
            on_progress: OnProgress = ignore_progress, float_run=None) -> Comparison:
    """The same prompts and seeds through float and quantized; reports carry small pictures of what is finished."""
    return generate.compare(bundle, quantized, prompts, seed, steps, on_progress=on_progress, float_run=float_run, drafts=True)


def solo_timing(bundle: Bundle, quantized: QuantizedModel, steps: int, float_seconds: float, *,
                on_progress: OnProgress = ignore_progress) -> benches.SoloTiming | None:
    """One image through both models beside its prediction, where the plan has one; `float_seconds` an image is what it takes about."""
    return benches.solo_timing(bundle, quantized, steps, float_seconds, on_progress=on_progress)


def draw(bundle: Bundle, prompts: Sequence[str], seed: int, steps: int, *, on_progress: OnProgress = ignore_progress) -> generate.Generated:
    """Images of the float model, prompt i with seed + i, the same as in a comparison."""
    prompts, seeds = generate.sample(prompts, seed, steps)
    return generate.run(bundle, prompts, seeds, bundle.integrator(steps), on_progress=on_progress)


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


def load_quantized(folder, device: str = "auto") -> tuple[Bundle, QuantizedModel]:
    """The float pipeline parts and the quantized transformer of an exported folder, on `device` as `load` takes it."""
    from workbench import export as exporter

    return exporter.load_quantized(folder, device)


def validate_plan(bundle: Bundle, plan: BitPlan | dict | str) -> BitPlan:
    """A plan that fits this model, from a plan, a dict or a JSON text; BadInput says in one line why it does not."""
    if not isinstance(plan, BitPlan):
        plan = BitPlan.parse(plan, "plan")
    plan, names = plan.upgraded(bundle.layers), tuple(layer.name for layer in bundle.layers)
    if plan.model_hash != bundle.model_hash:
        raise BadInput(f"the plan belongs to model {plan.model_hash}; {bundle.name} is {bundle.model_hash}")
    if plan.layer_names != names:
        raise BadInput(f"the plan names {len(plan.layer_names)} layers that are not the {len(names)} of {bundle.name}")
    return plan


def bench(bundle: Bundle, plan: BitPlan, config: BenchConfig | None = None, *, on_progress: OnProgress = ignore_progress) -> dict:
    """Layers, whole model and installed libraries, timed here and now, as the JSON object of `bench`.

    Weights are rounded to nearest: that costs what solved weights cost, and needs no calibration."""
    config, quant, steps = config or BenchConfig(), plan.quant, len(plan.sigma_T)
    quantized = build(bundle, round_bank(bundle, quant, plan.weight_bits_L), plan)
    others, runs = baselines.prepare(bundle, steps, on_progress=on_progress) if config.baselines else ([], {})
    own = benches.whole_runs(bundle, quantized, steps)
    table, us = latency.measure_beside(own | runs, bundle, quant, rounds=config.rounds, on_progress=on_progress)
    whole = benches.whole_model(bundle, quantized, table, {name: us[name] for name in own}, steps)
    each = benches.layers(bundle, quant, config, on_progress=on_progress)
    return {"device": latency.device_name(bundle), "threads": torch.get_num_threads(), "kernels": table.provenance,
            "layers": [{**vars(layer), "speedup": layer.speedup} for layer in each], "model": vars(whole),
            "baselines": baselines.with_times(others, {name: us[name] for name in runs})}


def default_budget(bundle: Bundle, profiled: Profile) -> Budget:
    """4-bit weights and a mean of 4 activation bits: what the published tables compare at."""
    four_bit = uniform_plan(bundle, profiled.quant, sigma_of(profiled.trace), 4, 16)
    return Budget(max_weight_bytes=four_bit.weight_bytes, max_mean_act_bits=4.0)


