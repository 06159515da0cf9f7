"""The verb: from a distortion table, a cost table and an evaluator to a front of measured plans.

The beam runs on one allocation of weight bits, the best within the memory budget. Other allocations, from the
smallest to the largest, get a few measured Lagrangian plans each, so that the front spans the whole range of budgets.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from workbench.options import BadInput, Budget, Cancelled, OnProgress, QuantConfig, SearchConfig, ignore_progress
from workbench.plans import BitChoice, CostTable, ScoredPlan, make_plan
from workbench.search.beam import beam_search
from workbench.search.lagrangian import ActHull, activation_hull, allocate_weights, largest_sum
from workbench.search.ledger import Evaluator, Row, SearchFailed
from workbench.search.log import Checkpoint, Log, Measured
from workbench.search.pareto import select
from workbench.search.rivals import uniform_rows, uniform_weights
from workbench.types import DistortionTable, LayerInfo, SearchResult

Rows = tuple[Row, ...]  # activation bits (T, L)

RUNGS = (3.3, 4.0, 5.0, 6.5, 8.0)  # mean activation bits of the Lagrangian plans that seed the beam
TYPICAL_ACT_BITS = 4.0  # where plans are measured when no mean of activation bits is set
TYPICAL_WEIGHT_BITS = 4  # what the beam runs on when no memory limit is set


def search(*, layers: Sequence[LayerInfo], sigma_T: Sequence[float], table: DistortionTable, costs: CostTable, quant: QuantConfig,
           model_hash: str, budget: Budget, config: SearchConfig, evaluator: Evaluator, checkpoint: Checkpoint | None = None,
           resume: tuple[dict, dict[str, bytes]] | None = None, on_progress: OnProgress = ignore_progress) -> SearchResult:
    """Measure plans and return their front; `chosen` has the least measured error within `budget`.

    `checkpoint(json, blobs)` is called after each step of the beam and each measured plan; pass the pair of the last
    call as `resume` and the result is that of the uninterrupted search, `seconds` apart.
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
    return _result(task, log, min(config.samples, getattr(evaluator, "samples", config.samples)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, and the allocations that follow from the tables alone."""

    layers: tuple[LayerInfo, ...]
    sigma_T: tuple[float, ...]
    table: DistortionTable
    costs: CostTable
    quant: QuantConfig
    model_hash: str
    budget: Budget
    config: SearchConfig

    @property
    def steps(self) -> int:
        return len(self.sigma_T)

    @cached_property
    def hull(self) -> ActHull:
        return activation_hull(self.table)

    @property
    def target_bits(self) -> float:
        """The mean of activation bits that matters most."""
        return self.budget.max_mean_act_bits or max(TYPICAL_ACT_BITS, min(self.table.act_bits_C))

    def check(self) -> None:
        expected = (self.steps, len(self.layers), len(self.table.act_bits_C))
        if tuple(self.table.error_TLC.shape) != expected:
            raise BadInput(f"the distortion table is {tuple(self.table.error_TLC.shape)}; steps, layers and choices are {expected}")
        limit, least = self.budget.max_mean_act_bits, min(self.table.act_bits_C)
        if limit is not None and limit < least:
            raise BadInput(f"max_mean_act_bits is {limit:g}; the smallest feasible is {least}")
        if self.budget.max_weight_bytes is not None:
            self.weights_within(self.budget.max_weight_bytes)

    def rows_within(self, mean_bits: float) -> Rows:
        """The Lagrangian plan of activation bits with at most this mean."""
        return self.hull.rows_within(largest_sum(mean_bits, self.steps * len(self.layers)))

    def rows_uniform(self, act_bits: int) -> Rows:
        return uniform_rows(act_bits, self.steps, len(self.layers))

    def weights_within(self, max_bytes: int) -> Row:
        return allocate_weights(self.table.weight_error_LC, self.costs, max_bytes, self.table.weight_bits_C)

    @cached_property
    def uniform_bytes(self) -> dict[int, int]:
        return {bits: size for bits, size in uniform_weights(self.costs).items() if bits in self.table.weight_bits_C}

    def weight_candidates(self) -> list[Row]:
        """What the beam may run on: the best allocation within the memory limit and the best uniform one; without a limit
        the typical uniform width."""
        limit, layers = self.budget.max_weight_bytes, len(self.layers)
        if limit is None:
            nearest = min(self.uniform_bytes, key=lambda bits: (abs(bits - TYPICAL_WEIGHT_BITS), bits))
            return [(nearest,) * layers]
        uniform = [(bits,) * layers for bits, size in self.uniform_bytes.items() if size <= limit]
        return list(dict.fromkeys([self.weights_within(limit), *uniform[-1:]]))

    def other_weights(self) -> list[Row]:
        """Allocations that span the range of memory: the best within the bytes of every uniform width."""
        levels = dict.fromkeys(self.weights_within(size) for size in self.uniform_bytes.values())
        return [weights for weights in levels if weights not in self.weight_candidates()]

    def rungs(self) -> list[Rows]:
        """Lagrangian plans from few bits to many, one of them exactly at the target."""
        least = min(self.table.act_bits_C)
        means = [mean for mean in RUNGS if mean >= least and abs(mean - self.target_bits) > 0.25]
        return list(dict.fromkeys(self.rows_within(mean) for mean in sorted([*means, self.target_bits])))

    def companions(self, weights: Row, chosen: Row) -> list[Rows]:
        """Which plans of activation bits are measured with other weights: more bits go with larger weights."""
        least = min(self.table.act_bits_C)
        if self.costs.total_bytes(weights) == min(self.uniform_bytes.values()):
            return [self.rows_uniform(least), self.rows_within(self.target_bits)]
        larger = self.costs.total_bytes(weights) > self.costs.total_bytes(chosen)
        means = (self.target_bits, 8.0 if self.target_bits < 7 else 5.0) if larger else (max(least, RUNGS[0]), self.target_bits)
        return [self.rows_within(mean) for mean in means]

    def fingerprint(self) -> str:
        """Of everything that decides the course of the search."""
        parts = (self.model_hash, self.sigma_T, [layer.name for layer in self.layers], self.table.act_bits_C, self.table.weight_bits_C,
                 self.costs.weight_bits_C, self.costs.fixed_bytes, self.quant, self.budget, self.config)
        digest = hashlib.sha256(repr(parts).encode())
        for tensor in (self.table.error_TLC, self.table.weight_error_LC, self.costs.weight_bytes_LC, self.costs.macs_L):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _measure_all(task: Task, log: Log) -> None:
    """Weights, references, beam, other weights: in this order, so that the screen has points to compare with early."""
    candidates, others, rungs = task.weight_candidates(), task.other_weights(), task.rungs()
    references = [bits for bits in task.table.act_bits_C if bits != 16]
    planned_beam = _planned(task, len(rungs))
    log.total = task.steps * (len(candidates) + len(references) + 2 * len(others)) + planned_beam
    for weights in candidates:
        _rollout(task, log, weights, task.rows_uniform(16), "uniform", "float activations")
    chosen = _best_weights(task, log, candidates)
    for bits in references:
        _rollout(task, log, chosen, task.rows_uniform(bits), "uniform", f"uniform A{bits}")
    log.phase(planned_beam, "beam search")
    _beam(task, log, chosen, rungs)
    for weights in others:
        for rows in task.companions(weights, chosen):
            _rollout(task, log, weights, rows, "lagrangian", f"weights of {task.costs.total_bytes(weights) / 1e6:.2f} MB")


def _rollout(task: Task, log: Log, weights: Row, rows: Rows, origin: str, what: str) -> None:
    log.phase(task.steps, what)
    log.measure([log.ledger.rollout(weights, rows)], [origin], what)


def _best_weights(task: Task, log: Log, candidates: list[Row]) -> Row:
    """The candidate of least measured error with float activations; a prediction alone does not decide this."""
    error = {weights: log.measured[weights, task.rows_uniform(16)].error for weights in candidates}
    best = min(candidates, key=error.__getitem__)
    if error[best] == float("inf"):
        raise SearchFailed("even with float activations the quantized weights give NaN or infinity; allow more memory")
    return best


def _beam(task: Task, log: Log, weights: Row, rungs: list[Rows]) -> None:
    """The beam on the chosen weights; every path that reaches the end is measured."""
    follow = task.config.rollout == "quantized"
    tiers_TC = tiers(task)
    ends = beam_search(log.ledger.root(weights), steps=task.steps, width=task.config.beam, seeds=rungs,
                       configurations=lambda path: tiers_TC[path.step], on_step=log.beam_step,
                       extend=log.ledger.extend if follow else log.ledger.extend_at_float)
    if not follow:
        ends = tuple(log.ledger.rollout(weights, log.ledger.bits_TL(path)) for path in ends)
    seeded = set(rungs)
    origins = ["lagrangian" if log.ledger.bits_TL(path) in seeded else "beam" for path in ends]
    log.measure(ends, origins, "beam")


def tiers(task: Task) -> list[list[Row]]:
    """For each step, the configurations that extend a path: the rows of Lagrangian plans from low to high."""
    plans = task.rungs()
    picked = [plans[round(i * (len(plans) - 1) / (task.config.configs - 1))] for i in range(task.config.configs)]
    return [list(dict.fromkeys(plan[step] for plan in picked)) for step in range(task.steps)]


def _planned(task: Task, seeds: int) -> int:
    """Model steps the beam takes at most."""
    configs, width = task.config.configs, task.config.beam
    if task.config.rollout == "float":
        return task.steps * (configs + seeds + width * configs + seeds)
    return configs + seeds + (task.steps - 1) * (width * configs + seeds)


def _result(task: Task, log: Log, samples: int) -> SearchResult:
    front = tuple(_scored(task, plan, samples) for plan in log.front())
    uniform = [plan for plan in log.measured.values() if plan.origin == "uniform" and plan.error < float("inf")]
    return SearchResult(front=front, references=tuple(_scored(task, plan, samples) for plan in uniform),
                        chosen=select(front, task.budget), evaluations=log.ledger.evaluations, seconds=log.seconds,
                        events=tuple(log.events))


def _scored(task: Task, measured: Measured, samples: int) -> ScoredPlan:
    """The measured plan with its costs and its predicted error, which is the table's sum."""
    table = task.table
    predicted = sum(float(table.error_TLC[t, i, table.act_bits_C.index(bits)])
                    for t, row in enumerate(measured.act_bits_TL) for i, bits in enumerate(row))
    predicted += sum(float(table.weight_error_LC[i, table.weight_bits_C.index(bits)])
                     for i, bits in enumerate(measured.weight_bits_L))
    choices = [BitChoice(weight_bits=bits, group_size=task.quant.group_size) for bits in measured.weight_bits_L]
    plan = make_plan(layers=task.layers, sigma_T=task.sigma_T, weight_choice_L=choices, act_bits_TL=measured.act_bits_TL,
                     costs=task.costs, quant=task.quant, model_hash=task.model_hash, predicted_error=predicted,
                     method="adatsq_uniform" if measured.origin == "uniform" else "adatsq")
    return ScoredPlan(plan=plan, error=measured.error, samples=samples, origin=measured.origin)
