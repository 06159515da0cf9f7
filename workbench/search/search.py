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
from workbench.search.evaluation_cache import Evaluator, Row, SearchFailed
from workbench.search.pareto import within
from workbench.search.recorder import OWN, Checkpoint, Measured, SearchRecorder
from workbench.search.search_problem import SearchProblem
from workbench.types import DistortionTable, LayerInfo, SearchResult


def search(*, layers: Sequence[LayerInfo], sigma_T: Sequence[float], table: DistortionTable, costs: CostTable, quant: QuantConfig,
           model_hash: str, budget: Budget, config: SearchConfig, evaluator: Evaluator, planning_table: DistortionTable | None = None,
           ranked: Mapping[str, DistortionTable] | None = None, prompts: str = "", pinned_L: Sequence[int | None] | None = None,
           checkpoint: Checkpoint | None = None, resume: tuple[dict, dict[str, bytes]] | None = None,
           on_progress: OnProgress = ignore_progress) -> SearchResult:
    """Measure plans and return their front; `chosen` has the least measured error within `budget`.

    Rivals plan by `table`, this search by `planning_table` (by default the same). `prompts` names what the evaluator measures on; `ranked`
    are tables whose ranks are compared with those measured. pinned_L: the weight bits of layers that are not to be chosen, None
    elsewhere.
    `checkpoint(json, blobs)` is called after each step of the beam and each measured plan; pass the pair of the last
    call as `resume` and the result is that of the uninterrupted search, `seconds` apart. It may have had another budget or beam.
    Raises BadInput when the budget is below the smallest feasible or the evaluator gives nothing usable. `so_far` of SearchFailed and
    Cancelled is the result up to there, or None when no plan within budget had been measured."""
    problem = SearchProblem(layers=tuple(layers), sigma_T=tuple(float(sigma) for sigma in sigma_T), table=table,
                            planning_table=planning_table or table, costs=costs, quant=quant, model_hash=model_hash,
                            budget=budget, config=config, prompts=prompts, ranked=ranked or {}, pinned_L=pinned_L)
    problem.check()
    recorder = SearchRecorder(evaluator, costs, scored=partial(_scored, problem, evaluator.samples), steps=problem.steps,
                              summed=config.scoring == "raw", question=problem.fingerprint(), on_progress=on_progress,
                              checkpoint=checkpoint, resume=resume, active_TL=problem.active_TL)
    try:
        _measure_all(problem, recorder)
    except (Cancelled, SearchFailed) as stopped:
        recorder.save()  # nothing that has been measured is lost
        stopped.so_far = _result(problem, recorder, evaluator.samples) if _choose(problem, recorder) else None
        raise
    if _choose(problem, recorder) is None:
        raise SearchFailed("no plan within budget gave a finite error; the model breaks down at this budget: allow more")
    return _result(problem, recorder, evaluator.samples)


def _measure_all(problem: SearchProblem, recorder: SearchRecorder) -> None:
    """Weights, references and rivals, beam, refinement, other weights: in this order, so that the screen has points to compare
    with early."""
    candidates, others = problem.weight_candidates, problem.other_weights()
    recorder.total = phases.planned(problem, len(candidates), others)
    for weights, rows in problem.first_rows.items():
        phases.measure(problem, recorder, weights, problem.rows_uniform(16), "uniform", "float activations")
        if rows != problem.rows_uniform(16):
            phases.measure(problem, recorder, weights, rows, "lagrangian", f"weights of {problem.costs.total_bytes(weights) / 1e6:.2f} MB")
    chosen = _best_weights(problem, recorder, candidates)
    for bits in [bits for bits in problem.table.act_bits_C if bits != 16]:
        phases.measure(problem, recorder, chosen, problem.rows_uniform(bits), "uniform", f"uniform A{bits}")
    phases.rivals(problem, recorder, chosen)
    phases.beam(problem, recorder, chosen)
    phases.refine(problem, recorder, chosen)
    for weights, act_plans in others.items():
        for rows in act_plans:
            phases.measure(problem, recorder, weights, rows, "lagrangian", f"weights of {problem.costs.total_bytes(weights) / 1e6:.2f} MB")


def _best_weights(problem: SearchProblem, recorder: SearchRecorder, candidates: list[Row]) -> Row:
    """The candidate of least measured error with the activations that it is judged by; a prediction alone does not decide this."""
    error = {weights: [recorder.measured[weights, rows].error for rows in (problem.first_rows[weights], problem.rows_uniform(16))]
             for weights in candidates}
    best = min(candidates, key=error.__getitem__)
    if min(error[best]) == math.inf:
        raise SearchFailed("even with float activations the quantized weights give NaN or infinity; allow more memory")
    return best


def _choose(problem: SearchProblem, recorder: SearchRecorder) -> Measured | None:
    """The plan of least measured error within every limit; ties go to fewer bytes, then fewer bits."""
    return next(iter(_fitting(problem, recorder)), None)


def _fitting(problem: SearchProblem, recorder: SearchRecorder) -> list[Measured]:
    fitting = [plan for plan in recorder.measured.values() if math.isfinite(plan.error) and _fits(problem, plan)]
    return sorted(fitting, key=lambda plan: (plan.error, plan.weight_bytes, plan.act_bits_mean, plan.act_bits_TL))


def _finalists(problem: SearchProblem, recorder: SearchRecorder) -> list[Measured]:
    """Few prompts measure the plans, so the least of many errors is partly luck: who proposed a plan is as good a reason to judge it
    again. The best of each of the search's own origins, then all others."""
    fitting = _fitting(problem, recorder)
    firsts = [next((plan for plan in fitting if plan.origin == origin), None) for origin in OWN]
    ahead = sorted((plan for plan in firsts if plan is not None), key=fitting.index)
    return [*ahead, *(plan for plan in fitting if plan not in ahead)][:MOST_FINALISTS]


def _fits(problem: SearchProblem, plan: Measured) -> bool:
    return within(plan.point, problem.budget) and problem.in_time(plan.weight_bits_L, plan.act_bits_TL)


def _result(problem: SearchProblem, recorder: SearchRecorder, samples: int) -> SearchResult:
    front = tuple(_scored(problem, samples, plan) for plan in recorder.front())
    rivals = [plan for plan in recorder.references if plan.error < math.inf]
    return SearchResult(front=front, references=tuple(_scored(problem, samples, plan) for plan in rivals),
                        chosen=_scored(problem, samples, _choose(problem, recorder)), evaluations=recorder.cache.evaluations,
                        seconds=recorder.seconds, events=tuple(recorder.events),
                        ranking=phases.ranking(problem, recorder),
                        finalists=tuple(_scored(problem, samples, plan) for plan in _finalists(problem, recorder)))


def _scored(problem: SearchProblem, samples: int, measured: Measured) -> ScoredPlan:
    """The measured plan with its costs and its predicted error."""
    choices = [BitChoice.of(bits, problem.quant, layer) for bits, layer in zip(measured.weight_bits_L, problem.layers)]
    plan = make_plan(layers=problem.layers, sigma_T=problem.sigma_T, weight_choice_L=choices, act_bits_TL=measured.act_bits_TL,
                     costs=problem.costs, quant=problem.quant, model_hash=problem.model_hash,
                     predicted_error=problem.predicted_error(measured.weight_bits_L, measured.act_bits_TL),
                     method="adatsq_uniform" if measured.origin == "uniform" else "adatsq")
    return ScoredPlan(plan=plan, error=measured.error, samples=samples, origin=measured.origin)
