"""The shell commands that judge: methods against each other, and the quantized model against float and other libraries."""

from __future__ import annotations

from pathlib import Path

from workbench import flags, terminal
from workbench.commands import loaded, megabytes, prompts_of, read_plan, run_of
from workbench.options import (
    PIPELINES_OWN,
    BenchConfig,
    ContestConfig,
    EvolutionConfig,
    Frozen,
    QuantConfig,
    SearchConfig,
    TraceConfig,
    setting,
)


class Contest(Frozen):
    """Who competes, and who the others are paired with."""

    methods: str = setting("rtn,gptq,adatsq_uniform,adatsq", "names, separated by commas, or all", min_length=1)
    reference: str = setting("", "method that the paired differences are against; default: adatsq, else the last")


def compare(args, listener):
    """Judge methods by the same prompts and seeds against the float model."""
    entry, contest_config = flags.read(args, Contest), flags.read(args, ContestConfig)
    images = flags.read(args, TraceConfig, prompts=prompts_of(args))
    search, evolution = flags.read(args, SearchConfig), flags.read(args, EvolutionConfig)
    names = tuple(name.strip().replace("-", "_") for name in entry.methods.split(",") if name.strip())
    from workbench import contest
    from workbench.contest.compare import Settings
    from workbench.contest.table import NUMBERS, QUALITY, cell

    names = contest.chosen(names)
    bundle = loaded(args, listener)
    settings = Settings(contest_config=contest_config, trace=TraceConfig(steps=images.steps), search=search, evolution=evolution)
    float_run, results, result = contest.run_comparison(bundle, names, settings, prompts=images.prompts, seed=images.seed, run=run_of(args),
                                                        reference=entry.reference, on_progress=listener)
    _write_comparison(args, float_run, results, result)
    shown = [name for name in QUALITY if any(name in row for row in result["results"])]
    rows = [(r["method"], *(cell(r, name) for name in (*NUMBERS, *shown)), r["compute"]) for r in result["results"]]
    title = (f"{result['model']}, {result['steps']} steps, {len(float_run.made.prompts)} prompts; float: "
             f"{megabytes(result['float']['weight_bytes'])}, {result['float']['seconds_per_image']:.3f} s per image")
    columns = ("method", *(NUMBERS[name][0] for name in NUMBERS), *(QUALITY[name][0] for name in shown), "compute")
    return result, [terminal.table(title, columns, rows)]


def _write_comparison(args, float_run, results, result) -> None:
    """--csv, --markdown and --grid."""
    from workbench import contest

    for path, text in ((args.csv, contest.csv_text), (args.markdown, contest.markdown_text)):
        if path:
            Path(path).write_text(text(result), encoding="utf-8")
    if args.grid:
        from PIL import Image

        Image.fromarray(contest.image_grid(float_run, results)).save(args.grid, format="PNG")


def bench(args, listener):
    """Time the quantized model on this machine: layers, whole images, other libraries."""
    config, quant = flags.read(args, BenchConfig), flags.read(args, QuantConfig)
    text = read_plan(args.plan) if args.plan else None
    from workbench import pipeline
    from workbench.plans import BitPlan

    given = BitPlan.parse(text, "plan") if text else None
    bundle = loaded(args, listener, given.generation if given else PIPELINES_OWN)
    sigma_T = bundle.integrator(TraceConfig().steps).sigma_T1[:-1].tolist()
    plan = pipeline.validate_plan(bundle, given) if given else pipeline.uniform_plan(bundle, quant, sigma_T, 4, 4)
    result = pipeline.bench(bundle, plan, config, on_progress=listener)
    made, where = result["model"], f"{result['device']}, medians"
    rows = [(f"{r['m']} x {r['n']} x {r['k']}", r["choice"], r["backend"], f"{r['us']:.0f}", f"{r['float_us']:.0f}", f"{r['speedup']:.2f}")
            for r in result["layers"]]
    whole = [("float", made["float_type"], f"{made['float_ms']:.1f}", megabytes(made["float_bytes"])),
             ("quantized", made["quantized_type"], f"{made['quantized_ms']:.1f}", megabytes(made["quantized_bytes"])),
             ("quantized, predicted", "", f"{made['predicted_ms']:.1f}", megabytes(plan.weight_bytes)),
             *((f"{each['name']} {each['version'] or ''}", each.get("reason", ""), f"{each['model_ms']:.1f}" if each["model_ms"] else "",
                megabytes(each["bytes"]) if each["bytes"] else "") for each in result["baselines"])]
    return result, [terminal.table(f"layers, one image ({where})", ("M x N x K", "choice", "runs on", "us", "float us", "times faster"),
                                   rows),
                    terminal.table(f"one image, {len(plan.sigma_T)} steps ({where})", ("model", "float type", "ms", "bytes"), whole)]
