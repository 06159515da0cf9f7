"""What a search measures, one kind of work after the other. Each phase takes the task and the log and measures whole plans.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import numpy as np

from workbench.options import BadInput
from workbench.search import rivals as by_layer
from workbench.search import rivals_steps as by_step
from workbench.search.beam import beam_search
from workbench.search.ledger import Row
from workbench.search.log import Log
from workbench.search.online import online_rollout
from workbench.search.ranking import NEAR, rank
from workbench.search.refine import Corrected, Factors
from workbench.search.task import Rows, Task
from workbench.types import Ranking

RIVALS = {"greedy": by_layer.greedy, "milp": by_layer.mixed_integer, "layers": by_layer.layers_only, "dp": by_step.steps_exact,
          "bisection": by_step.steps_bisection, "ends": by_step.protected_ends}
SPREAD_BITS = (3.3, 3.6, 5.0, 6.5)  # mean activation bits where the refined table also plans, so that the front gains around the target
DRAWS = 8  # attempts at a move that has not been measured yet


def measure(task: Task, log: Log, weights: Row, rows: Rows, origin: str, what: str) -> None:
    """Roll a whole plan out and report its error."""
    log.phase(task.steps, what)
    log.measure([log.ledger.rollout(weights, rows)], [origin], what)


def rivals(task: Task, log: Log, weights: Row) -> None:
    """The other methods' allocations on the same weights, under the same limit. One that cannot meet it is left out and named."""
    if task.config.rivals != "all":
        return
    problem = task.problem(weights)
    for name, rival in RIVALS.items():
        try:
            rows = task.bits_of(rival(problem))
        except BadInput:  # one choice for all layers may cost more than the limit where costs differ by layer
            log.phase(task.steps, name)
            continue
        measure(task, log, weights, rows, name, f"rival: {name}")
    log.phase(task.steps, "rival: online switch")
    if {by_step.ONLINE_LOW, by_step.ONLINE_HIGH} <= set(task.table.act_bits_C):
        path = online_rollout(log.ledger, weights, task.rows_uniform, task.steps, task.target_bits)
        log.measure([path], ["online"], "rival: online switch, its bits counted after the fact")


def beam(task: Task, log: Log, weights: Row) -> None:
    """The beam on the chosen weights, and the measured error of the paths that reach the end."""
    ledger, follow, steered = log.ledger, task.config.rollout == "quantized", task.steer(weights)
    rungs = task.rungs(weights)
    log.phase(_planned_beam(task, len(rungs)), "beam search")
    last = beam_search(ledger.root(weights), steps=task.steps, width=task.config.beam, seeds=rungs, on_step=log.beam_step,
                       configurations=lambda path: task.configurations(steered, path.step, steered.spent(ledger.bits_TL(path))),
                       extend=ledger.extend if follow else ledger.extend_at_float)
    if follow:  # every candidate has been run to its end
        ends = last.candidates
    else:  # sorted, so that plans which share a prefix follow each other
        kept = dict.fromkeys((*last.anchors, *last.survivors))
        ends = [ledger.rollout(weights, rows) for rows in sorted(ledger.bits_TL(path) for path in kept)]
    origins = ["lagrangian" if ledger.bits_TL(path) in rungs else "beam" for path in ends]
    log.measure(ends, origins, "beam")


def refine(task: Task, log: Log, weights: Row) -> None:
    """Moves within the budget by a table that learns from every measurement; every other one a draw, the others the most likely best.
    At the end the learned table plans once at each of some other means, for the front."""
    rounds = task.config.refine
    if not rounds:
        return
    corrected, random = Corrected(task), np.random.default_rng(task.config.seed)
    for number in range(rounds):
        move = _next_move(task, log, corrected, random, weights, bold=number % 2 == 1)
        if move is None:
            log.phase(task.steps * (rounds - number), "refinement: nothing new to try")
            break
        measure(task, log, *move, "refined", f"refinement {number + 1} of {rounds}")
    factors = corrected.fit(log.measured.values())
    for mean in SPREAD_BITS:
        spread = _at_mean(task, corrected, factors, weights, mean)
        if spread is None or spread in log.measured:
            log.phase(task.steps, "refinement: nothing new to try")
        else:
            measure(task, log, *spread, "refined", f"refined at {mean:g} bits")


def _next_move(task: Task, log: Log, corrected: Corrected, random: np.random.Generator, weights: Row, *, bold: bool):
    """A plan within the budget that has not been measured, or None."""
    factors = corrected.fit(log.measured.values())
    for attempt in range(DRAWS):
        theta_P = corrected.draw(factors, random) if bold or attempt else factors.theta_P
        move = _planned_by(corrected, theta_P, weights)
        if move is not None and move not in log.measured:
            return move
    return None


def _planned_by(corrected: Corrected, theta_P: np.ndarray, weights: Row) -> tuple[Row, Rows] | None:
    """The corrected table's plan, or None where two limits that bind leave it none."""
    try:
        return corrected.plan(theta_P, weights)
    except BadInput:
        return None


def _at_mean(task: Task, corrected: Corrected, factors: Factors, weights: Row, mean: float) -> tuple[Row, Rows] | None:
    budget = task.budget.model_copy(update={"max_mean_act_bits": max(mean, min(task.table.act_bits_C))})
    return _planned_by(Corrected(task.under(budget)), factors.theta_P, weights)


def planned(task: Task, candidates: int, others: dict[Row, list[Rows]]) -> int:
    """Model steps of the whole search at most."""
    references = sum(bits != 16 for bits in task.table.act_bits_C)
    beside = len(RIVALS) + 1 if task.config.rivals == "all" else 0
    refined = task.config.refine + len(SPREAD_BITS) if task.config.refine else 0
    plans = candidates * (1 if task.budget.max_latency_ms is None else 2) + references + beside + refined + sum(map(len, others.values()))
    return task.steps * plans + _planned_beam(task, len(task.rungs(task.weight_candidates[0])))


def _planned_beam(task: Task, seeds: int) -> int:
    """Model steps the beam takes at most."""
    configs, width = task.config.configs, task.config.beam
    if task.config.rollout == "float":
        return task.steps * (width * configs + seeds) + task.steps * (width + seeds)
    return configs + seeds + (task.steps - 1) * (width * configs + seeds)


def ranking(task: Task, log: Log) -> tuple[Ranking, ...]:
    """How well the guide and the other tables order what was measured."""
    plans = list(log.measured.values())
    tables = {"guide": task.guide, **(task.ranked or {"additive": task.table})}
    predicted = {name: [task.predicted_error(plan.weight_bits_L, plan.act_bits_TL, table) for plan in plans]
                 for name, table in tables.items()}
    near = [abs(plan.act_bits_mean - task.target_bits) < NEAR * task.target_bits for plan in plans]
    return rank(predicted, [plan.error for plan in plans], near)
