"""The stages as shell commands: each takes parsed flags and a progress listener and returns (JSON object, what to print).

Heavy imports happen inside the commands, so that help is instant and bad flags are refused at once.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

from workbench import flags, prompts, terminal
from workbench.options import (
    ACT_BITS,
    PIPELINES_OWN,
    BadInput,
    Budget,
    Cancelled,
    Frozen,
    GenerationConfig,
    LatencyConfig,
    QuantConfig,
    SearchConfig,
    SensitivityConfig,
    TraceConfig,
    setting,
)

MEGABYTE = 1_000_000


class Limits(Frozen):
    """What a plan may spend."""

    budget_mb: float | None = setting(None, "resident megabytes (10^6 bytes) of the transformer", gt=0)
    budget_ms: float | None = setting(None, "milliseconds of one image's transformer calls on the target", gt=0)
    act_bits: float | None = setting(None, "mean activation bits over steps and layers", ge=min(ACT_BITS), le=16)
    pick: str = setting("best", "of the front: best: least error within the budget; knee: best compromise within it; or a quality floor "
                                "in dB of the latent, met as cheaply as possible", pattern=r"^(best|knee|\d+(\.\d+)?)$")

    def budget(self) -> Budget:
        """The same in bytes, milliseconds and bits; raises BadInput where no limit is set."""
        return Budget.parse({"max_mean_act_bits": self.act_bits, "max_latency_ms": self.budget_ms,
                             "max_weight_bytes": None if self.budget_mb is None else int(self.budget_mb * MEGABYTE)}, "budget")


# The commands.

def models(args, listener):
    """List the embedded models, or one model's layers."""
    from workbench.models import sources

    if args.model:
        bundle = loaded(args, listener)
        rows = [(layer.name, layer.n_out, layer.k_in, layer.tokens, layer.macs_per_step) for layer in bundle.layers]
        result = {"name": bundle.name, "model_hash": bundle.model_hash, "parameters": bundle.parameters,
                  "float_bytes": bundle.float_bytes, "protected": bundle.protected,
                  "modulation": [layer.name for layer in bundle.modulation],
                  "layers": [dict(zip(("name", "n_out", "k_in", "tokens", "macs_per_step"), row)) for row in rows]}
        return result, [terminal.table(f"{bundle.name}: {len(rows)} quantizable layers",
                                       ("layer", "out", "in", "tokens", "MACs per step"), rows)]
    found = [{"name": name, "family": sources.check_folder(folder),
              "disk_bytes": sum(p.stat().st_size for p in folder.rglob("*.safetensors"))}
             for name, folder in sources.EMBEDDED.items()]
    rows = [(m["name"], m["family"], megabytes(m["disk_bytes"])) for m in found]
    return {"models": found}, [terminal.table("embedded models", ("name", "family", "weights on disk"), rows)]


def profile(args, listener):
    """Record the float model and measure how sensitive each step and layer is."""
    _, found = _profiled(args, listener, flags.read(args, QuantConfig))
    smap = found.sensitivity
    names = [layer.name for layer in smap.layers]
    mean_L, worst_L = smap.fisher_TL.mean(0).tolist(), smap.fisher_TL.argmax(0).tolist()
    rows = [(name, f"{mean:.3e}", worst + 1) for name, mean, worst in zip(names, mean_L, worst_L)]
    title = f"temporal Fisher ({smap.config.estimator}), {smap.steps} steps, {found.seconds:.1f} s"
    return profile_json(found), [terminal.table(title, ("layer", "mean over steps", "most sensitive step"), rows)]


def profile_json(found) -> dict:
    """The map of a profile: rows are steps, columns layers."""
    smap = found.sensitivity
    return {"layers": [layer.name for layer in smap.layers], "sigma": smap.sigma_T1[:-1].tolist(),
            "fisher": smap.fisher_TL.tolist(), "alpha": smap.alpha_TL.tolist(), "seconds": found.seconds,
            "stderr": None if smap.stderr_TL is None else smap.stderr_TL.tolist(), "samples": smap.samples,
            "estimator": smap.config.estimator, "model_hash": smap.model_hash}


def search(args, listener):
    """Find the plans that trade bits for error best, and choose one within a budget."""
    limits = flags.read(args, Limits)
    budget = limits.budget()
    config, quant = flags.read(args, SearchConfig), flags.read(args, QuantConfig)
    from workbench import costs, latency, pipeline
    from workbench.search import selection

    steps, target = flags.read(args, TraceConfig).steps, flags.read(args, LatencyConfig).target
    bundle = loaded(args, listener)
    times = latency.tabulate(bundle, quant, target, on_progress=listener) if limits.budget_ms else None
    reachable = selection.feasible(costs.tabulate(bundle, quant, steps, latency=times), ACT_BITS, steps)
    if blamed := selection.blame(budget, reachable):  # before a minute is spent on a profile
        raise BadInput("the budget is not feasible: " + "; ".join(blamed))
    bundle, found = _profiled(args, listener, quant)
    try:
        result = pipeline.search(bundle, found, budget, config, run=run_of(args), on_progress=listener)
    except Cancelled as stopped:
        if stopped.so_far is not None:
            path = _written_plan(args, stopped.so_far.chosen.plan)
            print(f"stopped; the best plan so far (error {stopped.so_far.chosen.error:.3g}) is in {path}", file=sys.stderr)
        raise
    picked = picked_from(result, budget, limits.pick)
    path = _written_plan(args, picked.plan)
    written = search_json(result, picked)
    written["chosen"]["plan"] = str(path)
    here = {name: written["chosen"][name] for name in ("weight_bytes", "act_bits_mean", "latency_ms")}
    rows = [(*_costs(p), f"{p['error']:.3e}", "chosen" if here.items() <= p.items() else "") for p in written["front"]]
    title = f"front of {len(rows)} plans, {result.evaluations} evaluations, {result.seconds:.1f} s"
    others = [(p["origin"], *_costs(p), f"{p['error']:.3e}") for p in written["references"]]
    headers = ("weights", "mean act bits", *(() if picked.plan.latency_ms is None else ("ms, modelled",)), "error (NMSE)")
    shown = [terminal.table(title, (*headers, ""), rows), terminal.table("rivals and references", ("plan", *headers), others),
             *([] if picked.plan.latency_ms is None else [f"ms: an image's transformer calls on {picked.plan.latency_target}, "
                                                          "the sum of its table's layer times"]), _chosen_line(written["chosen"]),
             *(f"rank correlation of {r.prediction} with measured error: {_rho(r.spearman)} over {r.plans} plans, "
               f"{_rho(r.spearman_near)} over {r.plans_near} near the budget" for r in result.ranking), f"plan: {path}"]
    return written, shown


def search_json(result, picked) -> dict:
    """What a search found and which plan was picked of it, without the plan itself."""
    front = sorted(result.front, key=lambda scored: (scored.plan.weight_bytes, scored.plan.act_bits_mean))
    interval = {"low": picked.low, "high": picked.high, "samples": picked.samples, "held_out": picked.held_out}
    return {"front": [point(scored) for scored in front],
            "chosen": {**point(picked), **interval, "origin": picked.origin, "act_bits_macs": picked.plan.act_bits_macs},
            "evaluations": result.evaluations, "seconds": result.seconds, "ranking": [vars(each) for each in result.ranking],
            "references": [{**point(scored), "origin": scored.origin} for scored in result.references]}


def picked_from(result, budget, pick: str):
    """The plan that was asked for: the search's choice, the knee, or the cheapest above a floor in dB."""
    from workbench.search import selection

    if pick == "best":
        return result.chosen
    return selection.pick_knee(result.front, budget) if pick == "knee" else selection.pick_cheapest(result.front, float(pick))


def _written_plan(args, plan) -> Path:
    from workbench import runs

    path = _plan_path(args, plan)
    runs.write_json(path, plan.model_dump(mode="json"))
    return path


def _costs(found: dict) -> tuple[str, ...]:
    """Cells of a `point`: bytes, bits and, where a table says it, time."""
    time = () if found["latency_ms"] is None else (f"{found['latency_ms']:.4g}",)
    return megabytes(found["weight_bytes"]), f"{found['act_bits_mean']:.2f}", *time


def _chosen_line(chosen: dict) -> str:
    prompts = f"{chosen['samples']} {'held-out' if chosen['held_out'] else 'calibration'} prompts"
    spread = "" if chosen["low"] is None else f" [{chosen['low']:.3e}, {chosen['high']:.3e}]"
    size, bits, *time = _costs(chosen)
    costs = ", ".join((size, f"{bits} mean act bits", *(f"{ms} ms" for ms in time)))
    return f"chosen: {costs}, error {chosen['error']:.3e}{spread} over {prompts}"


def _rho(value: float | None) -> str:
    return "too few" if value is None else f"{value:.2f}"


def quantize(args, listener):
    """Solve the weights of a plan and report what solving achieved, layer by layer."""
    _, quantized = _quantized(args, listener)
    plan, reports = quantized.plan, [quantized.reports[name] for name in quantized.plan.layer_names if name in quantized.reports]
    layers = [{"layer": r.layer, "loss_rtn": r.loss_rtn, "loss_solved": r.loss_solved, "damping": r.damping,
               "dead_channels": r.dead_channels, "note": r.note} for r in reports]
    rows = [(r.layer, f"{r.loss_rtn:.3e}", f"{r.loss_solved:.3e}", r.note) for r in reports]
    return ({"plan_id": plan.plan_id, "weight_bytes": quantized.weight_bytes, "act_bits_mean": plan.act_bits_mean, "layers": layers},
            [terminal.table(f"{megabytes(quantized.weight_bytes)} of weights", ("layer", "loss rounded", "loss solved", "note"), rows)])


def generate(args, listener):
    """Generate images with the float model, with a plan (--plan), or with an exported checkpoint."""
    options, folder = flags.read(args, TraceConfig, prompts=prompts_of(args)), _image_folder(args.to)
    from PIL import Image

    from workbench import export, pipeline
    from workbench import generate as stage

    if export.is_export(args.model):
        if args.plan:
            raise BadInput(f"{args.model} is an exported checkpoint and brings its own plan; leave --plan out")
        bundle, quantized = pipeline.load_quantized(args.model, args.device)
    elif args.plan:
        bundle, quantized = _quantized(args, listener)
    else:
        bundle, quantized = loaded(args, listener), None
    texts, seeds = stage.sample(options.prompts or bundle.prompts("showcase")[:stage.BATCH], options.seed, options.steps)
    made = stage.run(bundle, texts, seeds, bundle.integrator(options.steps), quantized=quantized, on_progress=listener)
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for index, (text, seed) in enumerate(zip(texts, seeds)):
        path = folder / f"{index:03d}-{re.sub(r'[^a-z0-9]+', '-', text.lower())[:40].strip('-')}-{seed}.png"
        Image.fromarray(made.images[index]).save(path)
        images.append({"prompt": text, "seed": seed, "image": str(path)})
    result = {"model": bundle.name, "quantized": quantized is not None, "steps": options.steps, "images": images,
              "seconds_per_image": made.seconds_per_image, "device": str(bundle.device)}
    rows = [(image["prompt"], image["seed"], image["image"]) for image in images]
    return result, [terminal.table(f"{made.seconds_per_image:.3f} s per image", ("prompt", "seed", "image"), rows)]


def export(args, listener):
    """Write a quantized checkpoint folder and verify it by reading it back."""
    from workbench import export as stage
    from workbench import pipeline

    if not args.to:
        raise BadInput("--to is missing; give the folder to write")
    stage.check_target(args.to)
    bundle, quantized = _quantized(args, listener)
    plan = quantized.plan
    written = pipeline.export(bundle, quantized, args.to)
    result = {"folder": str(args.to), "plan_id": plan.plan_id, "weight_bytes": written.weight_bytes,
              "disk_bytes": written.disk_bytes, "files": len(written.files), "verified": written.verified}
    return result, [f"{args.to}: {len(written.files)} files, {megabytes(written.disk_bytes)} on disk, "
                    f"{megabytes(written.weight_bytes)} of transformer weights, verified by reading back"]


def serve(args, _listener):
    """Start the app in the browser."""
    if args.port is not None and not 1 <= args.port <= 65535:
        raise BadInput(f"--port {args.port}: use a number from 1 to 65535")
    if args.run:
        os.environ["ADATSQ_RUNS"] = args.run
    sys.argv = ["app.py", *(["--port", str(args.port)] if args.port else []), *(["--host", args.host] if args.host else [])]
    runpy.run_module("workbench.app", run_name="__main__", alter_sys=True)
    return {}, []


# What the commands share.

def loaded(args, listener, otherwise: GenerationConfig = PIPELINES_OWN):
    """The model of the flags, set to generate what they ask for; `otherwise` where they ask for nothing."""
    asked = flags.read(args, GenerationConfig).over(otherwise)
    from workbench import pipeline

    return pipeline.load(args.model, args.device, on_progress=listener).at(asked)


def _profiled(args, listener, quant: QuantConfig):
    """(bundle, profile); options are read before the model is loaded."""
    trace_config = flags.read(args, TraceConfig, prompts=prompts_of(args))
    sensitivity_config = flags.read(args, SensitivityConfig)
    run = run_of(args)
    from workbench import pipeline

    bundle = loaded(args, listener)
    target = flags.read(args, LatencyConfig).target
    return bundle, pipeline.profile(bundle, trace_config, sensitivity_config, quant, target=target, run=run, on_progress=listener)


def _quantized(args, listener):
    """(bundle, quantized model) of --plan; the plan is checked before anything is measured, and only its widths are solved."""
    if not args.plan:
        raise BadInput("--plan is missing; give a plan file written by the search")
    text, trace_config = read_plan(args.plan), flags.read(args, TraceConfig, prompts=prompts_of(args))
    sensitivity_config, run = flags.read(args, SensitivityConfig), run_of(args)
    from workbench import pipeline
    from workbench.plans import BitPlan

    plan = BitPlan.parse(text, "plan")
    bundle = loaded(args, listener, plan.generation)
    plan = pipeline.validate_plan(bundle, plan)
    return bundle, pipeline.quantize_plan(bundle, plan, trace_config, sensitivity_config, run=run, on_progress=listener)


def read_plan(path: str) -> str:
    try:
        if Path(path).stat().st_size > 64 * MEGABYTE:
            raise BadInput(f"{path} is larger than 64 MB; no plan is")
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not a plan (a JSON file written by the search)") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror.lower()}; give a plan file written by the search") from None


def prompts_of(args) -> tuple[str, ...]:
    return prompts.read(args.prompts) if args.prompts else ()


def run_of(args):
    if not args.run:
        return None
    from workbench.runs import Run

    return Run(args.run)


def _plan_path(args, plan) -> Path:
    """Where the chosen plan goes: --plan-out, the run folder, beside the JSON file, or the current folder."""
    if args.plan_out:
        return Path(args.plan_out)
    folder = args.run or (Path(args.json).parent if args.json not in (None, "-") else ".")
    return Path(folder) / f"plan-{plan.plan_id}.json"


def _image_folder(path: str | None) -> Path:
    if not path:
        raise BadInput("--to is missing; give a folder for the images")
    if Path(path).exists() and not Path(path).is_dir():
        raise BadInput(f"--to {path} is a file; give a folder for the images")
    return Path(path)


def point(scored) -> dict:
    """What a plan costs and how far it is from float."""
    return {"weight_bytes": scored.plan.weight_bytes, "act_bits_mean": scored.plan.act_bits_mean, "latency_ms": scored.plan.latency_ms,
            "error": scored.error}


def megabytes(count: int) -> str:
    return f"{count / MEGABYTE:.2f} MB"
