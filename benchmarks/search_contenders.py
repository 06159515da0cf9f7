"""The plans that `benchmarks/search.py` compares: every rival, and this search with each of its parts left out.

Dimension letters as in `workbench/types.py`: T steps, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workbench import pipeline
from workbench.options import Budget, QuantConfig, SearchConfig, TraceConfig
from workbench.plans import BitPlan
from workbench.rollout import Rollout
from workbench.runs import Run
from workbench.search.cost_model import bit_constraint, lagrangian_plans
from workbench.search.evaluation_cache import EvaluationCache
from workbench.search.knapsack import allocate_weights
from workbench.search.online import online_rollout
from workbench.search.phases import RIVALS
from workbench.search.rivals import AllocationProblem, uniform_rows
from workbench.search.rivals_steps import random_plan
from workbench.sensitivity.signed import with_signs
from workbench.stored import signed_errors

OURS = "AdaTSQ search"
NAMES = {"greedy": "greedy by sensitivity", "milp": "MILP, additive table", "layers": "LP over layers (ModelOpt)",
         "dp": "DP over steps (VaTMP)", "bisection": "bisection over steps (TMPDiff)", "ends": "first/last steps protected"}
ALONE = {"rivals": "uniform"}  # the search compared here does not see its rivals
ABLATIONS = {
    "no refinement": {"refine": 0}, "planned by the additive table": {"planning_table": "additive"},
    "scored at the float latents": {"rollout": "float"}, "raw deviation, additive, no refinement (the paper)":
        {"scoring": "raw", "planning_table": "additive", "refine": 0}}


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan, and what finding it took."""

    plan: BitPlan
    evaluations: int
    seconds: float


class Contenders:
    """Makes plans for one profile; what was found is kept in the run folder by what it was made from."""

    def __init__(self, bundle, profiled: pipeline.Profile, run: Run, config: SearchConfig, on_progress):
        self.bundle, self.profiled, self.run, self.config, self.on_progress = bundle, profiled, run, config, on_progress
        self.steps, self.layers = profiled.trace.steps, len(bundle.layers)
        self.fresh = pipeline.fresh_trace(bundle, profiled, config, run, on_progress)
        self.active_TL = np.tile([layer.has_act_bits for layer in bundle.layers], (self.steps, 1))
        errors = signed_errors(bundle, self.fresh, profiled.bank, (profiled.trace, profiled.sensitivity.config), run, on_progress)
        self.signed = with_signs(profiled.table, errors, bundle.layers)

    def at_bits(self, mean: float, weight_bits: int) -> dict[str, Found]:
        """Everything at one mean of activation bits on uniform weights: the activations alone differ."""
        weights = self.profiled.costs.uniform(weight_bits)
        problem = self._problem(mean)
        whole = {f"uniform A{bits}": bits for bits in self.profiled.table.act_bits_C if bits == mean}
        found = {name: self._kept(name, weights, mean, lambda bits=bits: self.rows_of(bits))
                 for name, bits in whole.items()}
        for name, rival in RIVALS.items():
            found[NAMES[name]] = self._kept(name, weights, mean, lambda rival=rival: self._bits(rival(problem)))
        found["Lagrangian, additive table"] = self._lagrangian(self.profiled.table, weights, mean)
        found["Lagrangian, signed errors"] = self._lagrangian(self.signed, weights, mean)
        found["online 4-to-8 switch (DVD-Quant)"] = self._online(weights, mean)
        budget = Budget(max_mean_act_bits=mean)
        for name, changes in ({"raw-deviation beam (the paper)": ABLATIONS["raw deviation, additive, no refinement (the paper)"],
                               "AdaTSQ beam, no refinement": ABLATIONS["no refinement"], OURS: {}}).items():
            found[name] = self._search(budget, changes, weights)
        found["random, as many evaluations"] = self._random(problem, weights, mean, found[OURS].evaluations // self.steps)
        return found

    def at_bytes(self, max_bytes: int, mean: float) -> dict[str, Found]:
        """Everything at one memory budget and one mean of activation bits: weights and activations differ."""
        costs, problem = self.profiled.costs, self._problem(mean)
        widths = [bits for bits in self.profiled.bank.weight_bits_C if costs.total_bytes(costs.uniform(bits)) <= max_bytes]
        uniform = costs.uniform(max(widths))
        nested = allocate_weights(self.profiled.table.weight_error_LC, costs, max_bytes, self.profiled.table.weight_bits_C)
        signed = allocate_weights(self.signed.weight_error_LC, costs, max_bytes, self.signed.weight_bits_C)
        bits = min(bits for bits in self.profiled.table.act_bits_C if bits >= mean)
        found = {f"uniform W{max(widths)}, uniform A{bits}": self._kept(
            f"uniform {bits}", uniform, mean, lambda: self.rows_of(bits))}
        found["ILP weights, MILP activations (additive)"] = self._kept("milp", nested, mean, lambda: self._bits(RIVALS["milp"](problem)))
        found["uniform weights, MILP activations (additive)"] = self._kept(
            "milp", uniform, mean, lambda: self._bits(RIVALS["milp"](problem)))
        found["ILP weights, Lagrangian activations (signed errors)"] = self._lagrangian(self.signed, signed, mean)
        found[OURS] = self._search(Budget(max_weight_bytes=max_bytes, max_mean_act_bits=mean), {})
        return found

    def ablations(self, mean: float) -> dict[str, Found]:
        """The search with each part left out, on uniform 4-bit weights."""
        budget, weights = Budget(max_mean_act_bits=mean), self.profiled.costs.uniform(4)
        found = {name: self._search(budget, changes, weights) for name, changes in ABLATIONS.items()}
        local = pipeline.table_variants(self.bundle, self.profiled, run=self.run, on_progress=self.on_progress)["local directional"]
        signed = self._problem(mean, self.signed)
        found["Lagrangian, local table"] = self._lagrangian(local, weights, mean)
        found["Lagrangian, adjoint table"] = self._lagrangian(self.profiled.table, weights, mean)
        found["Lagrangian, signed errors"] = self._lagrangian(self.signed, weights, mean)
        found["no layer axis (DP, signed errors)"] = self._kept("dp signed", weights, mean, lambda: self._bits(RIVALS["dp"](signed)))
        found["no time axis (LP, signed errors)"] = self._kept("lp signed", weights, mean, lambda: self._bits(RIVALS["layers"](signed)))
        return found

    def with_quant(self, quant: QuantConfig) -> Contenders:
        """The same on weights solved otherwise (for the ablation of Fisher weighting)."""
        recorded = self.profiled.trace
        trace_config = TraceConfig(prompts=recorded.prompts, steps=self.steps, seed=recorded.seeds[0])
        profiled = pipeline.profile(self.bundle, trace_config, quant=quant, run=self.run, on_progress=self.on_progress)
        return Contenders(self.bundle, profiled, self.run, self.config, self.on_progress)

    def _problem(self, mean: float, table=None) -> AllocationProblem:
        error_TLC = (table or self.profiled.table).error_TLC.double().numpy()
        constraint = bit_constraint(self.profiled.table.act_bits_C, self.active_TL, mean)
        return AllocationProblem(error_TLC=error_TLC, cost_TLC=constraint.cost_TLC, limit=constraint.limit)

    def rows_of(self, act_bits: int) -> tuple:
        """One width everywhere."""
        return uniform_rows(act_bits, self.active_TL)

    def _bits(self, columns_TL) -> np.ndarray:
        return np.where(self.active_TL, np.asarray(self.profiled.table.act_bits_C)[columns_TL], 16)

    def _lagrangian(self, table, weights, mean: float) -> Found:
        constraint = bit_constraint(table.act_bits_C, self.active_TL, mean)
        return self._made("lagrangian", weights, lambda: lagrangian_plans(table, [constraint]).rows())

    def _kept(self, name: str, weights, mean: float, make: Callable) -> Found:
        key = Run.key(self.bundle.model_hash, self.profiled.table, name, weights, mean)
        return self.run.resume(Found, "found", key, lambda: self._made(name, weights, make))

    def _made(self, name: str, weights, make: Callable) -> Found:
        started = time.perf_counter()
        rows = [[int(bits) for bits in row] for row in make()]
        seconds = time.perf_counter() - started
        plan = pipeline.paint_plan(self.bundle, self.profiled, weights, rows, method=name)
        return Found(plan=plan, evaluations=0, seconds=seconds)

    def _search(self, budget: Budget, changes: dict, weights=None) -> Found:
        """The search, on `weights` where its rivals have these, else choosing its own."""
        config = self.config.model_copy(update={**ALONE, **changes})
        key = Run.key(self.bundle.model_hash, self.profiled.table, self.fresh, budget, config, weights)

        def make():
            result = pipeline.search(self.bundle, self.profiled, budget, config, run=self.run, pinned_L=weights,
                                     on_progress=self.on_progress)
            return Found(plan=result.chosen.plan, evaluations=result.evaluations, seconds=result.seconds)
        return self.run.resume(Found, "found", key, make)

    def _random(self, problem: AllocationProblem, weights, mean: float, plans: int) -> Found:
        """The best of as many random plans as the search could have measured, by error on the search's prompts."""
        def make():
            random, started = np.random.default_rng(self.config.seed), time.perf_counter()
            tried = [pipeline.paint_plan(self.bundle, self.profiled, weights, self._bits(random_plan(problem, random)).tolist(), "random")
                     for _ in range(max(1, plans))]
            best = min(tried, key=self._rollout().error_of)
            return Found(plan=best, evaluations=len(tried) * self.steps, seconds=time.perf_counter() - started)
        key = Run.key(self.bundle.model_hash, self.profiled.table, self.fresh, "random", weights, mean, plans, self.config.samples,
                      self.config.seed)
        return self.run.resume(Found, "found", key, make)

    def _online(self, weights, mean: float) -> Found:
        def make():
            started = time.perf_counter()
            cache = EvaluationCache(self._rollout(), summed=False, on_extend=lambda: None)
            rows = cache.bits_TL(online_rollout(cache, weights, self.rows_of, self.steps, mean))
            plan = pipeline.paint_plan(self.bundle, self.profiled, weights, rows, "online")
            return Found(plan=plan, evaluations=self.steps, seconds=time.perf_counter() - started)
        key = Run.key(self.bundle.model_hash, self.profiled.table, self.fresh, "online", weights, mean, self.config.samples)
        return self.run.resume(Found, "found", key, make)

    def _rollout(self) -> Rollout:
        return Rollout(self.bundle, self.fresh, pipeline.weights_of(self.bundle, self.profiled), samples=self.config.samples, scoring="raw")
