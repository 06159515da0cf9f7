"""What a search measures, one kind of work after the other. Each phase takes the task and the log and measures whole plans.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import numpy as np

from workbench.options import BadInput
from workbench.search import rivals as by_layer
from workbench.search import rivals_steps as by_step
from workbench.search.beam import beam_search
from workbench.search.evaluation_cache import Row
from workbench.search.online import online_rollout
from workbench.search.ranking import NEAR, rank
from workbench.search.recorder import SearchRecorder
from workbench.search.refine import Corrected, Factors
from workbench.search.search_problem import Rows, SearchProblem
from workbench.types import Ranking

RIVALS = {"greedy": by_layer.greedy, "milp": by_layer.mixed_integer, "layers": by_layer.layers_only, "dp": by_step.steps_exact,
          "bisection": by_step.steps_bisection, "ends": by_step.protected_ends}
SPREAD_BITS = (3.3, 3.6, 5.0, 6.5)  # mean activation bits where the refined table also plans, so that the front gains around the target
DRAWS = 8  # attempts at a move that has not been measured yet


def measure(problem: SearchProblem, recorder: SearchRecorder, weights: Row, rows: Rows, origin: str, what: str) -> None:
    """Roll a whole plan out and report its error."""
    recorder.phase(problem.steps, what)
    recorder.measure([recorder.cache.rollout(weights, rows)], [origin], what)


def rivals(problem: SearchProblem, recorder: SearchRecorder, weights: Row) -> None:
    """The other methods' allocations on the same weights, under the same limit. One that cannot meet it is left out and named."""
    if problem.config.rivals != "all":
        return
    allocation = problem.allocation_problem(weights)
    for name, rival in RIVALS.items():
        try:
            rows = problem.bits_of(rival(allocation))
        except BadInput:  # one choice for all layers may cost more than the limit where costs differ by layer
            recorder.phase(problem.steps, name)
            continue
        measure(problem, recorder, weights, rows, name, f"rival: {name}")
    recorder.phase(problem.steps, "rival: online switch")
    if {by_step.ONLINE_LOW, by_step.ONLINE_HIGH} <= set(problem.table.act_bits_C):
        path = online_rollout(recorder.cache, weights, problem.rows_uniform, problem.steps, problem.target_bits)
        recorder.measure([path], ["online"], "rival: online switch, its bits counted after the fact")


def beam(problem: SearchProblem, recorder: SearchRecorder, weights: Row) -> None:
    """The beam on the chosen weights, and the measured error of the paths that reach the end."""
    cache, follow, relaxed = recorder.cache, problem.config.rollout == "quantized", problem.lagrangian_plans(weights)
    seed_plans = problem.seed_plans(weights)
    recorder.phase(_planned_beam(problem, len(seed_plans)), "beam search")
    last = beam_search(cache.root(weights), steps=problem.steps, width=problem.config.beam, seeds=seed_plans, on_step=recorder.beam_step,
                       configurations=lambda path: problem.configurations(relaxed, path.step, relaxed.spent(cache.bits_TL(path))),
                       extend=cache.extend if follow else cache.extend_at_float)
    if follow:  # every candidate has been run to its end
        ends = last.candidates
    else:  # sorted, so that plans which share a prefix follow each other
        kept = dict.fromkeys((*last.anchors, *last.survivors))
        ends = [cache.rollout(weights, rows) for rows in sorted(cache.bits_TL(path) for path in kept)]
    origins = ["lagrangian" if cache.bits_TL(path) in seed_plans else "beam" for path in ends]
    recorder.measure(ends, origins, "beam")


def refine(problem: SearchProblem, recorder: SearchRecorder, weights: Row) -> None:
    """Moves within the budget by a table that learns from every measurement; every other one a draw, the others the most likely best.
    At the end the learned table plans once at each of some other means, for the front."""
    rounds = problem.config.refine
    if not rounds:
        return
    corrected, random = Corrected(problem), np.random.default_rng(problem.config.seed)
    for number in range(rounds):
        move = _next_move(problem, recorder, corrected, random, weights, bold=number % 2 == 1)
        if move is None:
            recorder.phase(problem.steps * (rounds - number), "refinement: nothing new to try")
            break
        measure(problem, recorder, *move, "refined", f"refinement {number + 1} of {rounds}")
    factors = corrected.fit(recorder.measured.values())
    for mean in SPREAD_BITS:
        spread = _at_mean(problem, corrected, factors, weights, mean)
        if spread is None or spread in recorder.measured:
            recorder.phase(problem.steps, "refinement: nothing new to try")
        else:
            measure(problem, recorder, *spread, "refined", f"refined at {mean:g} bits")


def _next_move(problem: SearchProblem, recorder: SearchRecorder, corrected: Corrected, random: np.random.Generator, weights: Row, *,
               bold: bool):
    """A plan within the budget that has not been measured, or None."""
    factors = corrected.fit(recorder.measured.values())
    for attempt in range(DRAWS):
        theta_P = corrected.draw(factors, random) if bold or attempt else factors.theta_P
        move = _planned_by(corrected, theta_P, weights)
        if move is not None and move not in recorder.measured:
            return move
    return None


def _planned_by(corrected: Corrected, theta_P: np.ndarray, weights: Row) -> tuple[Row, Rows] | None:
    """The corrected table's plan, or None where two limits that bind leave it none."""
    try:
        return corrected.plan(theta_P, weights)
    except BadInput:
        return None


def _at_mean(problem: SearchProblem, corrected: Corrected, factors: Factors, weights: Row, mean: float) -> tuple[Row, Rows] | None:
    budget = problem.budget.model_copy(update={"max_mean_act_bits": max(mean, min(problem.table.act_bits_C))})
    return _planned_by(Corrected(problem.under(budget)), factors.theta_P, weights)


def planned(problem: SearchProblem, candidates: int, others: dict[Row, list[Rows]]) -> int:
    """Model steps of the whole search at most."""
    references = sum(bits != 16 for bits in problem.table.act_bits_C)
    rival_plans = len(RIVALS) + 1 if problem.config.rivals == "all" else 0
    refined = problem.config.refine + len(SPREAD_BITS) if problem.config.refine else 0
    first = candidates * (1 if problem.budget.max_latency_ms is None else 2)
    plans = first + references + rival_plans + refined + sum(map(len, others.values()))
    return problem.steps * plans + _planned_beam(problem, len(problem.seed_plans(problem.weight_candidates[0])))


def _planned_beam(problem: SearchProblem, seeds: int) -> int:
    """Model steps the beam takes at most."""
    configs, width = problem.config.configs, problem.config.beam
    if problem.config.rollout == "float":
        return problem.steps * (width * configs + seeds) + problem.steps * (width + seeds)
    return configs + seeds + (problem.steps - 1) * (width * configs + seeds)


def ranking(problem: SearchProblem, recorder: SearchRecorder) -> tuple[Ranking, ...]:
    """How well the guide and the other tables order what was measured."""
    plans = list(recorder.measured.values())
    tables = {"planning_table": problem.planning_table, **(problem.ranked or {"additive": problem.table})}
    predicted = {name: [problem.predicted_error(plan.weight_bits_L, plan.act_bits_TL, table) for plan in plans]
                 for name, table in tables.items()}
    near = [abs(plan.act_bits_mean - problem.target_bits) < NEAR * problem.target_bits for plan in plans]
    return rank(predicted, [plan.error for plan in plans], near)
