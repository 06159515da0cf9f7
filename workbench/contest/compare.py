"""Run a comparison: the float model once, every method once, each measurement kept by the content of what it was made from.

Letters: S samples, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lowbit import ops

from workbench import costs, generate, judge, lpips
from workbench.contest.make import MethodBuilder, Settings, check, quant_of
from workbench.contest.table import table
from workbench.methods import METHODS, Method
from workbench.models import Bundle
from workbench.options import (
    BadInput,
    Cancelled,
    ContestConfig,
    OnProgress,
    Progress,
    TraceConfig,
    ignore_progress,
)
from workbench.plans import BitPlan
from workbench.runs import Run

RECIPE = 3  # counts up when a change of the code changes what a kept result would be
COMPARED = 64  # held-out prompts, where none are given


class SkipMethod(Cancelled):
    """Raised by a progress callback to leave the present method out and go on with the next."""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What one method did. values: every metric prompt by prompt; `retrieved` holds the prompts that the model's judge knows.
    weight_bits_quantized and weight_bits_total: 8 x bytes / parameters, of the quantized layers and of the whole transformer."""

    method: str
    plan: BitPlan
    weight_bytes: int
    weight_bits_quantized: float
    weight_bits_total: float
    quantize_seconds: float
    search_seconds: float
    search_evaluations: int
    seconds_per_image: float
    compute: str
    reason: str
    values: dict[str, tuple[float, ...]]
    retrieved: tuple[bool, ...]
    images: Any  # uint8 (S, H, W, 3)


@dataclass(frozen=True, kw_only=True)
class FloatRun:
    """The float model's side: its generation and what its own images were judged to be."""

    made: generate.Generated
    retrieved: tuple[bool, ...]


def compare_methods(bundle: Bundle, methods: Sequence[str], *, weight_bits: int, act_bits: float, prompts: Sequence[str] = (),
                    steps: int = 20, seed: int = 0, run: Run | None = None, on_progress: OnProgress = ignore_progress,
                    reference: str = "", **others) -> dict:
    """Every method on the same prompts and seeds at one nominal size, as the JSON object of `compare`.

    `act_bits` is the mean that a method may spend: a plan is searched within it, the others use it uniformly. `others`: further
    fields of ContestConfig. Paired differences are against `reference` (default: AdaTSQ, else the last method)."""
    contest_config = ContestConfig.parse({"weight_bits": weight_bits, "act_bits": act_bits, **others}, "comparison")
    settings = Settings(contest_config=contest_config, trace=TraceConfig.parse({"steps": steps}, "comparison"))
    return run_comparison(bundle, methods, settings, prompts=prompts, seed=seed, run=run, on_progress=on_progress, reference=reference)[2]


def run_comparison(bundle: Bundle, methods: Sequence[str], settings: Settings, *, prompts: Sequence[str] = (), seed: int = 0,
                   run: Run | None = None, reference: str = "", on_progress: OnProgress = ignore_progress,
                   on_result: Callable[[dict], None] | None = None, stages=None) -> tuple[FloatRun, tuple[MethodResult, ...], dict]:
    """(float, results, JSON object). What `run` holds is read: adding a method runs only that one. `on_result` gets the JSON
    object so far after every method. A listener that raises SkipMethod leaves one method out; Cancelled ends it all, and what was
    finished stays in `run`. `stages`: who has `float_run` and `evaluate_method`, where another process runs them."""
    names = chosen(methods)
    if reference and reference not in names:
        raise BadInput(f"the reference {reference} is not among the compared methods; use one of {', '.join(names)}")
    for name in names:
        check(METHODS[name], settings.contest_config)
    steps = settings.trace.steps
    prompts, seeds = generate.sample(tuple(prompts) or bundle.prompts("held_out")[:COMPARED], seed, steps)
    with contextlib.ExitStack() as stack:
        run = run or Run(stack.enter_context(tempfile.TemporaryDirectory()))
        made_for = (RECIPE, bundle.model_hash, bundle.generation, str(bundle.device), prompts, seeds, steps, lpips.path() is not None)
        here = functools.partial(evaluate_method, builder=MethodBuilder(bundle, settings, run))
        stages = stages or SimpleNamespace(float_run=float_run, evaluate_method=here)
        float_side = run.resume(FloatRun, "float", Run.key(*made_for),
                                lambda: stages.float_run(bundle, prompts, seeds, steps, on_progress=on_progress))
        results, skipped = [], []

        def so_far() -> dict:
            return {"model": bundle.name, "steps": steps, "seed": seed, "device": str(bundle.device), "settings": settings_of(settings),
                    **table(bundle, float_side, tuple(results), reference), "skipped": list(skipped)}

        for number, name in enumerate(names):
            key = Run.key(*made_for, *decided_by(METHODS[name], settings, bundle))
            report = _numbered(on_progress, number, len(names), METHODS[name].label)
            try:
                def evaluated(name=name, report=report) -> MethodResult:
                    return stages.evaluate_method(bundle, name, settings, run.folder, float_side, on_progress=report)
                results.append(run.resume(MethodResult, "method", key, evaluated))
            except SkipMethod:
                skipped.append(name)
            if on_result is not None:
                on_result(so_far())
        return float_side, tuple(results), so_far()


def chosen(methods: Sequence[str]) -> tuple[str, ...]:
    """Names of known methods, each once; "all" stands for every one."""
    names = tuple(dict.fromkeys(name for each in methods for name in (METHODS if each == "all" else (each,))))
    for name in names or ("",):
        if name not in METHODS:
            raise BadInput(f"unknown method {name!r}; use all, or one or several of {', '.join(METHODS)}")
    return names


def decided_by(method: Method, settings: Settings, bundle: Bundle) -> tuple:
    """Everything a method's result depends on beside the float run: its parts, the settings, only the search it has, and what ran it."""
    calibration = settings.trace.prompts or bundle.prompts("calibration")
    search = settings.search if method.allocation == "plan" else None
    evolution = settings.evolution if method.groups == "evolved" else None
    contest_config = settings.contest_config if search else settings.contest_config.model_copy(update={"effective_bits": None})
    backend = ops.backend(bundle.device.type, bundle.dtype)
    return (method.name, quant_of(method, contest_config), method.allocation, method.groups, contest_config, settings.trace, calibration,
            search, evolution, backend.name, backend.reason)


def settings_of(settings: Settings) -> dict:
    """What every method shares, as JSON, with both searches' settings."""
    return {**settings.contest_config.model_dump(mode="json"), "search": settings.search.model_dump(mode="json"),
            "evolution": settings.evolution.model_dump(mode="json")}


def _numbered(on_progress: OnProgress, number: int, total: int, label: str) -> OnProgress:
    def report(progress: Progress) -> None:
        on_progress(Progress(stage=progress.stage, done=progress.done, total=progress.total, detail=progress.detail,
                             message=f"{label} ({number + 1} of {total}): {progress.message}"))
    return report


def float_run(bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int], steps: int, *,
              on_progress: OnProgress = ignore_progress) -> FloatRun:
    """The float model's side of a comparison."""
    made = generate.run(bundle, prompts, seeds, bundle.integrator(steps), on_progress=on_progress)
    return FloatRun(made=made, retrieved=_retrieved(bundle, made.images, prompts))


def _retrieved(bundle: Bundle, images, prompts) -> tuple[bool, ...]:
    found = judge.of(bundle)
    return () if found is None else tuple(hit for hit in found.hits(images, prompts) if hit is not None)


def evaluate_method(bundle: Bundle, name: str, settings: Settings, folder: str | Path, float_side: FloatRun, *,
                    on_progress: OnProgress = ignore_progress, builder: MethodBuilder | None = None) -> MethodResult:
    """Make a method's model, generate with it, measure. `folder`: of the run; `builder`: one that has made other methods' models."""
    method, reference, steps = METHODS[name], float_side.made, settings.trace.steps
    made = (builder or MethodBuilder(bundle, settings, Run(folder))).make(method, on_progress)
    compared = generate.compare(bundle, made.quantized, reference.prompts, reference.seeds[0], steps, on_progress=on_progress,
                                float_run=reference)
    images = [pair.image_quantized for pair in compared.pairs]
    quant = made.quantized.plan.quant
    layer_bytes = compared.quantized_bytes - costs.outside_bytes(bundle, quant, steps)
    return MethodResult(
        method=method.name, plan=made.quantized.plan, weight_bytes=compared.quantized_bytes,
        weight_bits_quantized=costs.effective_bits(layer_bytes, costs.layer_parameters(bundle)),
        weight_bits_total=costs.effective_bits(compared.quantized_bytes, bundle.parameters),
        quantize_seconds=made.quantize_seconds, search_seconds=made.search_seconds, search_evaluations=made.evaluations,
        seconds_per_image=compared.quantized_seconds_per_image, compute=compared.compute, reason=compared.reason,
        values={name: tuple(getattr(pair, name) for pair in compared.pairs) for name in compared.metrics},
        retrieved=_retrieved(bundle, _stack(images), reference.prompts), images=_stack(images))


def _stack(images):
    return np.stack([np.asarray(image) for image in images])

