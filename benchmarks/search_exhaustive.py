"""Problems so small that every plan can be measured: what the search of `benchmarks/search.py` misses, and what no search could reach.

A few of the model's layers are quantized over a few steps; of the others only the adaLN weights are stored in 8 bits. Every one of
the C^(T L) plans is run to its end on held-out prompts; plans that begin alike share their first steps. The best of them is an oracle:
it is chosen on the prompts that judge.
Dimension letters as in `workbench/types.py`: T steps, L layers, C choices; P plans, X cells (T L) of a plan.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from search_contenders import OURS, Contenders

from workbench import pipeline
from workbench.options import Progress, SearchConfig, TraceConfig
from workbench.replay import trace
from workbench.rollout import Rollout
from workbench.runs import Run
from workbench.search.selection import quality_db

SHAPES = ((5, 1), (2, 2))  # steps and layers: 5^5 and 5^4 plans
PROMPTS, SEED, WEIGHT_BITS, REFERENCE_BITS = 4, 30_000, 4, 4


@dataclass(frozen=True, kw_only=True)
class Everything:
    """error_P: latent NMSE, mean over held-out prompts, of every plan; bits_PX its activation bits, step by step."""

    bits_PX: torch.Tensor
    error_P: torch.Tensor


def exhaustive(bundle, means, run: Run, on_progress) -> list[str]:
    """Markdown lines: the search and the best rival against all plans, for every shape and mean of activation bits."""
    lines = ["### Every plan of a small problem, measured", "",
             "| steps x layers | mean act bits | plans within | best of them, dB under uniform A4 | search, dB above the best | "
             "plans better than the search | best rival, dB above the best |", "|---|---:|---:|---:|---:|---:|---:|"]
    every = bundle.layers
    for steps, count in SHAPES:
        try:
            bundle.layers = _most_sensitive(bundle, every, count, steps, run, on_progress)
            chosen = Run.key(*(layer.name for layer in bundle.layers))  # nothing else in a key tells these layers from all
            kept = Run(run.folder.with_name(f"{run.folder.name}-{steps}x{count}-{chosen}"))
            profiled = pipeline.profile(bundle, TraceConfig(steps=steps), run=kept, on_progress=on_progress)
            measured = _everything(bundle, profiled, kept, on_progress)
            contenders = Contenders(bundle, profiled, kept, SearchConfig(), on_progress)
            for mean in means:
                lines.append(_row(f"{steps} x {count}", mean, measured, contenders.at_bits(mean, WEIGHT_BITS)))
                print(lines[-1], flush=True)
        finally:
            bundle.layers = every
    return [*lines, ""]


def _most_sensitive(bundle, every, count: int, steps: int, run: Run, on_progress) -> tuple:
    """The layers of an input of their own whose activations matter most at REFERENCE_BITS, as a numbering of their own."""
    table = pipeline.profile(bundle, TraceConfig(steps=steps), run=run, on_progress=on_progress).table
    error_L = table.error_TLC[..., table.act_bits_C.index(REFERENCE_BITS)].sum(0)
    alone = [layer for layer in every if layer.has_act_bits and sum(other.same_input == layer.same_input for other in every) == 1]
    chosen = sorted(sorted(alone, key=lambda layer: -float(error_L[layer.index]))[:count], key=lambda layer: layer.index)
    return tuple(replace(layer, index=i, same_input=i, fused_with=i) for i, layer in enumerate(chosen))


def _everything(bundle, profiled, run: Run, on_progress) -> Everything:
    config = TraceConfig(prompts=bundle.prompts("held_out")[-PROMPTS:], steps=profiled.trace.steps, seed=SEED)
    key = Run.key(bundle.model_hash, profiled.table, config, WEIGHT_BITS)
    return run.resume(Everything, "everything", key, lambda: _measure(bundle, profiled, trace.record(bundle, config), on_progress))


def _measure(bundle, profiled, recorded, on_progress) -> Everything:
    steps, layers, widths = recorded.steps, len(bundle.layers), profiled.table.act_bits_C
    rows = list(itertools.product(widths, repeat=layers))
    bits, error = [], []
    rollout = Rollout(bundle, recorded, pipeline.weights_of(bundle, profiled), samples=recorded.samples, scoring="raw")
    rollout.use_weights((WEIGHT_BITS,) * layers)
    begun = [((), rollout.start())]  # depth first: no more states are alive than steps times rows
    while begun:
        taken, state = begun.pop()
        if len(taken) == steps * layers:
            bits.append(taken)
            error.append(rollout.error(state))
            if len(bits) % 100 == 0:
                on_progress(Progress(stage="exhaustive", done=len(bits), total=len(rows) ** steps, message="plans measured"))
            continue
        step = len(taken) // layers
        begun += [((*taken, *row), rollout.extend(state, step, row)) for row in rows]
    return Everything(bits_PX=torch.tensor(bits, dtype=torch.int8), error_P=torch.tensor(error, dtype=torch.float64))


def _row(shape: str, mean: float, measured: Everything, found: dict) -> str:
    error_of = {tuple(bits): float(error) for bits, error in zip(measured.bits_PX.tolist(), measured.error_P)}
    within = measured.bits_PX.double().mean(1) <= mean + 1e-9
    best = float(measured.error_P[within].min())
    uniform = error_of[(REFERENCE_BITS,) * measured.bits_PX.shape[1]]
    errors = {name: error_of[tuple(bits for row in each.plan.act_bits_TL for bits in row)] for name, each in found.items()
              if each.plan.act_bits_mean <= mean + 1e-9}
    ours = errors.pop(OURS)
    rival = min((name for name in errors if not name.startswith(("AdaTSQ", "Lagrangian, signed"))), key=errors.get)
    better = int((measured.error_P[within] < ours).sum())
    to_uniform, to_ours, to_rival = (quality_db(best) - quality_db(error) for error in (uniform, ours, errors[rival]))
    return (f"| {shape} | {mean:g} | {int(within.sum())} | {to_uniform:.2f} | {to_ours:.2f} | {better} | {rival} {to_rival:.2f} |")
