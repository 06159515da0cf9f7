"""The verb: from a distortion table, a cost table and an evaluator to a front of measured plans.

The beam runs on one allocation of weight bits, the best within the memory budget. Other allocations, from the
smallest to the largest, get a few measured Lagrangian plans each, so that the front spans the whole range of budgets.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from workbench.options import Budget, Cancelled, OnProgress, QuantConfig, SearchConfig, ignore_progress
from workbench.plans import BitChoice, CostTable, ScoredPlan, make_plan
from workbench.search.beam import beam_search
from workbench.search.ledger import Evaluator, Row, SearchFailed
from workbench.search.log import Checkpoint, Log, Measured
from workbench.search.pareto import select
from workbench.search.task import Rows, Task
from workbench.types import DistortionTable, LayerInfo, SearchResult


def search(*, layers: Sequence[LayerInfo], sigma_T: Sequence[float], table: DistortionTable, costs: CostTable, quant: QuantConfig,
           model_hash: str, budget: Budget, config: SearchConfig, evaluator: Evaluator, checkpoint: Checkpoint | None = None,
           resume: tuple[dict, dict[str, bytes]] | None = None, on_progress: OnProgress = ignore_progress) -> SearchResult:
    """Measure plans and return their front; `chosen` has the least measured error within `budget`.

    `checkpoint(json, blobs)` is called after each step of the beam and each measured plan; pass the pair of the last
    call as `resume` and the result is that of the uninterrupted search, `seconds` apart. It may have had another budget or beam.
    Raises BadInput when the budget is below the smallest feasible or the evaluator gives nothing usable."""
    task = Task(layers=tuple(layers), sigma_T=tuple(float(sigma) for sigma in sigma_T), table=table, costs=costs, quant=quant,
                model_hash=model_hash, budget=budget, config=config)
    task.check()
    log = Log(evaluator, costs, steps=task.steps, summed=config.scoring == "raw", question=task.fingerprint(),
              on_progress=on_progress, checkpoint=checkpoint, resume=resume)
    try:
        _measure_all(task, log)
    except (Cancelled, SearchFailed):
        log.save()  # nothing that has been measured is lost
        raise
    return _result(task, log, evaluator.samples)


def _measure_all(task: Task, log: Log) -> None:
    """Weights, references, beam, other weights: in this order, so that the screen has points to compare with early."""
    candidates, others, rungs = task.weight_candidates(), task.other_weights(), task.rungs()
    references = [bits for bits in task.table.act_bits_C if bits != 16]
    planned_beam = _planned(task, len(rungs))
    log.total = task.steps * (len(candidates) + len(references) + sum(map(len, others.values()))) + planned_beam
    for weights in candidates:
        _rollout(task, log, weights, task.rows_uniform(16), "uniform", "float activations")
    chosen = _best_weights(task, log, candidates)
    for bits in references:
        _rollout(task, log, chosen, task.rows_uniform(bits), "uniform", f"uniform A{bits}")
    log.phase(planned_beam, "beam search")
    _beam(task, log, chosen, rungs)
    for weights, companions in others.items():
        for rows in companions:
            _rollout(task, log, weights, rows, "lagrangian", f"weights of {task.costs.total_bytes(weights) / 1e6:.2f} MB")


def _rollout(task: Task, log: Log, weights: Row, rows: Rows, origin: str, what: str) -> None:
    log.phase(task.steps, what)
    log.measure([log.ledger.rollout(weights, rows)], [origin], what)


def _best_weights(task: Task, log: Log, candidates: list[Row]) -> Row:
    """The candidate of least measured error with float activations; a prediction alone does not decide this."""
    error = {weights: log.measured[weights, task.rows_uniform(16)].error for weights in candidates}
    best = min(candidates, key=error.__getitem__)
    if error[best] == math.inf:
        raise SearchFailed("even with float activations the quantized weights give NaN or infinity; allow more memory")
    return best


def _beam(task: Task, log: Log, weights: Row, rungs: list[Rows]) -> None:
    """The beam on the chosen weights, and the measured error of the paths that reach the end."""
    ledger, follow = log.ledger, task.config.rollout == "quantized"
    last = beam_search(ledger.root(weights), steps=task.steps, width=task.config.beam, seeds=rungs,
                       configurations=task.configurations, on_step=log.beam_step,
                       extend=ledger.extend if follow else ledger.extend_at_float)
    if follow:  # every candidate has been run to its end
        ends = last.candidates
    else:  # sorted, so that plans which share a prefix follow each other
        kept = dict.fromkeys((*last.anchors, *last.survivors))
        ends = [ledger.rollout(weights, rows) for rows in sorted(ledger.bits_TL(path) for path in kept)]
    origins = ["lagrangian" if ledger.bits_TL(path) in rungs else "beam" for path in ends]
    log.measure(ends, origins, "beam")


def _planned(task: Task, seeds: int) -> int:
    """Model steps the beam takes at most."""
    configs, width = task.config.configs, task.config.beam
    if task.config.rollout == "float":
        return task.steps * (width * configs + seeds) + task.steps * (width + seeds)
    return configs + seeds + (task.steps - 1) * (width * configs + seeds)


def _result(task: Task, log: Log, samples: int) -> SearchResult:
    front = tuple(_scored(task, plan, samples) for plan in log.front())
    uniform = [plan for plan in log.measured.values() if plan.origin == "uniform" and plan.error < math.inf]
    return SearchResult(front=front, references=tuple(_scored(task, plan, samples) for plan in uniform),
                        chosen=select(front, task.budget), evaluations=log.ledger.evaluations, seconds=log.seconds,
                        events=tuple(log.events))


def _scored(task: Task, measured: Measured, samples: int) -> ScoredPlan:
    """The measured plan with its costs and its predicted error."""
    choices = [BitChoice(weight_bits=bits, group_size=task.quant.group_size) for bits in measured.weight_bits_L]
    plan = make_plan(layers=task.layers, sigma_T=task.sigma_T, weight_choice_L=choices, act_bits_TL=measured.act_bits_TL,
                     costs=task.costs, quant=task.quant, model_hash=task.model_hash,
                     predicted_error=task.predicted_error(measured.weight_bits_L, measured.act_bits_TL),
                     method="adatsq_uniform" if measured.origin == "uniform" else "adatsq")
    return ScoredPlan(plan=plan, error=measured.error, samples=samples, origin=measured.origin)
