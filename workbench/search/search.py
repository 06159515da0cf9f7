"""The verb: from a distortion table, a cost table and an evaluator to a front of measured plans.

The beam runs on one allocation of weight bits, the best within the memory budget; its plans are then refined on measured error, weights
and activations together. Rivals are measured under the same budget. Other weights, from the smallest to the largest, get a few Lagrangian
plans each, so that the front spans the whole range of budgets.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from workbench.options import MOST_FINALISTS, Budget, Cancelled, OnProgress, QuantConfig, SearchConfig, ignore_progress
from workbench.plans import BitChoice, CostTable, ScoredPlan, make_plan
from workbench.search import phases
from workbench.search.ledger import Evaluator, Row, SearchFailed
from workbench.search.log import OWN, Checkpoint, Log, Measured
from workbench.search.pareto import within
from workbench.search.task import Task
from workbench.types import DistortionTable, LayerInfo, SearchResult


def search(*, layers: Sequence[LayerInfo], sigma_T: Sequence[float], table: DistortionTable, costs: CostTable, quant: QuantConfig,
           model_hash: str, budget: Budget, config: SearchConfig, evaluator: Evaluator, guide: DistortionTable | None = None,
           ranked: Mapping[str, DistortionTable] | None = None, prompts: str = "", pinned_L: Sequence[int | None] | None = None,
           checkpoint: Checkpoint | None = None, resume: tuple[dict, dict[str, bytes]] | None = None,
           on_progress: OnProgress = ignore_progress) -> SearchResult:
    """Measure plans and return their front; `chosen` has the least measured error within `budget`.

    Rivals plan by `table`, this search by `guide` (by default the same). `prompts` names what the evaluator measures on; `ranked` are
    tables whose ranks are compared with those measured. pinned_L: the weight bits of layers that are not to be chosen, None elsewhere.
    `checkpoint(json, blobs)` is called after each step of the beam and each measured plan; pass the pair of the last
    call as `resume` and the result is that of the uninterrupted search, `seconds` apart. It may have had another budget or beam.
    Raises BadInput when the budget is below the smallest feasible or the evaluator gives nothing usable. `so_far` of SearchFailed and
    Cancelled is the result up to there, or None when no plan within budget had been measured."""
    task = Task(layers=tuple(layers), sigma_T=tuple(float(sigma) for sigma in sigma_T), table=table, guide=guide or table, costs=costs,
                quant=quant, model_hash=model_hash, budget=budget, config=config, prompts=prompts,
                ranked=ranked or {}, pinned_L=pinned_L)
    task.check()
    log = Log(evaluator, costs, scored=partial(_scored, task, evaluator.samples), steps=task.steps, summed=config.scoring == "raw",
              question=task.fingerprint(), on_progress=on_progress, checkpoint=checkpoint, resume=resume, active_TL=task.active_TL)
    try:
        _measure_all(task, log)
    except (Cancelled, SearchFailed) as stopped:
        log.save()  # nothing that has been measured is lost
        stopped.so_far = _result(task, log, evaluator.samples) if _choose(task, log) else None
        raise
    if _choose(task, log) is None:
        raise SearchFailed("no plan within budget gave a finite error; the model breaks down at this budget: allow more")
    return _result(task, log, evaluator.samples)


def _measure_all(task: Task, log: Log) -> None:
    """Weights, references and rivals, beam, refinement, other weights: in this order, so that the screen has points to compare
    with early."""
    candidates, others = task.weight_candidates, task.other_weights()
    log.total = phases.planned(task, len(candidates), others)
    for weights, rows in task.first_rows.items():
        phases.measure(task, log, weights, task.rows_uniform(16), "uniform", "float activations")
        if rows != task.rows_uniform(16):
            phases.measure(task, log, weights, rows, "lagrangian", f"weights of {task.costs.total_bytes(weights) / 1e6:.2f} MB")
    chosen = _best_weights(task, log, candidates)
    for bits in [bits for bits in task.table.act_bits_C if bits != 16]:
        phases.measure(task, log, chosen, task.rows_uniform(bits), "uniform", f"uniform A{bits}")
    phases.rivals(task, log, chosen)
    phases.beam(task, log, chosen)
    phases.refine(task, log, chosen)
    for weights, companions in others.items():
        for rows in companions:
            phases.measure(task, log, weights, rows, "lagrangian", f"weights of {task.costs.total_bytes(weights) / 1e6:.2f} MB")


def _best_weights(task: Task, log: Log, candidates: list[Row]) -> Row:
    """The candidate of least measured error with the activations that it is judged by; a prediction alone does not decide this."""
    error = {weights: [log.measured[weights, rows].error for rows in (task.first_rows[weights], task.rows_uniform(16))]
             for weights in candidates}
    best = min(candidates, key=error.__getitem__)
    if min(error[best]) == math.inf:
        raise SearchFailed("even with float activations the quantized weights give NaN or infinity; allow more memory")
    return best


def _choose(task: Task, log: Log) -> Measured | None:
    """The plan of least measured error within every limit; ties go to fewer bytes, then fewer bits."""
    return next(iter(_fitting(task, log)), None)


def _fitting(task: Task, log: Log) -> list[Measured]:
    fitting = [plan for plan in log.measured.values() if math.isfinite(plan.error) and _fits(task, plan)]
    return sorted(fitting, key=lambda plan: (plan.error, plan.weight_bytes, plan.act_bits_mean, plan.act_bits_TL))


def _finalists(task: Task, log: Log) -> list[Measured]:
    """Few prompts measure the plans, so the least of many errors is partly luck: who proposed a plan is as good a reason to judge it
    again. The best of each of the search's own origins, then all others."""
    fitting = _fitting(task, log)
    firsts = [next((plan for plan in fitting if plan.origin == origin), None) for origin in OWN]
    ahead = sorted((plan for plan in firsts if plan is not None), key=fitting.index)
    return [*ahead, *(plan for plan in fitting if plan not in ahead)][:MOST_FINALISTS]


def _fits(task: Task, plan: Measured) -> bool:
    return within(plan.point, task.budget) and task.in_time(plan.weight_bits_L, plan.act_bits_TL)


def _result(task: Task, log: Log, samples: int) -> SearchResult:
    front = tuple(_scored(task, samples, plan) for plan in log.front())
    rivals = [plan for plan in log.references if plan.error < math.inf]
    return SearchResult(front=front, references=tuple(_scored(task, samples, plan) for plan in rivals),
                        chosen=_scored(task, samples, _choose(task, log)), evaluations=log.ledger.evaluations, seconds=log.seconds,
                        events=tuple(log.events), ranking=phases.ranking(task, log),
                        finalists=tuple(_scored(task, samples, plan) for plan in _finalists(task, log)))


def _scored(task: Task, samples: int, measured: Measured) -> ScoredPlan:
    """The measured plan with its costs and its predicted error."""
    choices = [BitChoice.of(bits, task.quant, layer) for bits, layer in zip(measured.weight_bits_L, task.layers)]
    plan = make_plan(layers=task.layers, sigma_T=task.sigma_T, weight_choice_L=choices, act_bits_TL=measured.act_bits_TL,
                     costs=task.costs, quant=task.quant, model_hash=task.model_hash,
                     predicted_error=task.predicted_error(measured.weight_bits_L, measured.act_bits_TL),
                     method="adatsq_uniform" if measured.origin == "uniform" else "adatsq")
    return ScoredPlan(plan=plan, error=measured.error, samples=samples, origin=measured.origin)
