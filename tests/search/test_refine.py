"""Refinement: factors that measurements fit, moves that keep the budget, and what it gains where the table is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.test_search_problem import make_task
from tests.search.toys import ACT_BITS, EntangledEvaluator, TableEvaluator, make_costs, make_table, run
from workbench.options import Budget
from workbench.plans import mean_act_bits
from workbench.search.recorder import Measured
from workbench.search.refine import Corrected

COSTS = make_costs()


def measured(problem, weights, rows, error):
    return Measured(weight_bits_L=weights, act_bits_TL=rows, weight_bytes=COSTS.total_bytes(weights), act_bits_mean=mean_act_bits(rows),
                    error=error, origin="refined")


def random_plans(problem, count, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        weights = tuple(int(bits) for bits in random.choice((2, 4, 8), len(problem.layers)))
        yield weights, tuple(tuple(int(bits) for bits in row) for row in random.choice(ACT_BITS, (problem.steps, len(problem.layers))))


def test_without_correction_the_groups_add_up_to_the_table():
    problem = make_task(1)
    corrected = Corrected(problem)
    for weights, rows in random_plans(problem, 10):
        weight_R, act_RBC = corrected.features(measured(problem, weights, rows, 1.0))
        assert weight_R.sum() + act_RBC.sum() == pytest.approx(problem.predicted_error(weights, rows), rel=1e-6)


def test_the_fit_recovers_the_order_of_factors_that_made_the_measurements():
    problem = make_task(2)
    corrected = Corrected(problem)
    truth_P = np.zeros(len(corrected._spread_P))
    truth_P[corrected._part["width"]] = np.log([6.0, 2.0, 1.0, 1.0])
    truth_P[corrected._part["span"]] = np.linspace(-0.7, 0.7, corrected.spans)
    plans = []
    for weights, rows in random_plans(problem, 60):
        weight_R, act_RBC = corrected.features(measured(problem, weights, rows, 1.0))
        plans.append(measured(problem, weights, rows, float(corrected._model(truth_P, weight_R[None], act_RBC[None])[0])))
    factors = corrected.fit(plans)
    seen, unseen = factors.theta_P, [measured(problem, *plan, 1.0) for plan in random_plans(problem, 20, seed=9)]
    spans = seen[corrected._part["span"]]
    assert (np.diff(spans) > 0).all() and seen[corrected._part["width"]][0] > seen[corrected._part["width"]][2]
    for plan in unseen:
        true = float(corrected._model(truth_P, *(feature[None] for feature in corrected.features(plan)))[0])
        assert abs(np.log(corrected.predict(factors, plan) / true)) < abs(np.log(
            np.exp(seen[0]) * problem.predicted_error(plan.weight_bits_L, plan.act_bits_TL) / true)) + 0.1


@given(seed=st.integers(0, 100), size=st.none() | st.integers(COSTS.total_bytes([2] * 3), 2500), bits=st.none() | st.floats(3, 16),
       draw=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_move_keeps_every_limit_whatever_the_factors(seed, size, bits, draw):
    if size is None and bits is None:
        return
    problem = make_task(seed, budget=Budget(max_weight_bytes=size, max_mean_act_bits=bits))
    corrected = Corrected(problem)
    theta_P = np.random.default_rng(draw).normal(0, 2, len(corrected._spread_P))
    weights, rows = corrected.plan(theta_P, (4, 4, 4))
    assert size is None or COSTS.total_bytes(weights) <= size
    assert mean_act_bits(rows) <= problem.target_bits


def test_plans_that_cannot_be_used_are_no_reason_to_fail():
    problem = make_task(0)
    corrected = Corrected(problem)
    rows = problem.rows_uniform(16)
    useless = [measured(problem, (16, 16, 16), rows, 0.0), measured(problem, (4, 4, 4), problem.rows_uniform(4), float("inf"))]
    assert (corrected.fit(useless).theta_P == 0).all()


class Mistaken(TableEvaluator):
    """The truth is another table than the one the search plans by: the last half of the steps matters 20 times more."""

    def row_error(self, step, row):
        return super().row_error(step, row) * (20 if step >= self.table.error_TLC.shape[0] // 2 else 1)


@pytest.mark.parametrize("seed", range(4))
def test_where_the_table_is_wrong_refinement_gets_closer_than_the_plans_it_started_from(seed):
    table = make_table(seed, steps=8, layers=6)
    limit = make_costs(6).total_bytes([4] * 6)
    budget = Budget(max_weight_bytes=limit, max_mean_act_bits=5.0)
    before, after = (run(table, Mistaken(table), budget=budget, rivals="uniform", refine=rounds).chosen for rounds in (0, 12))
    assert after.error < before.error and after.origin == "refined"


@pytest.mark.parametrize("seed", range(3))
def test_refinement_never_chooses_worse_and_repeats_by_seed(seed):
    table = make_table(seed)
    before = run(table, EntangledEvaluator(table), refine=0).chosen
    first, again = (run(table, EntangledEvaluator(table), refine=8, seed=3) for _ in range(2))
    assert first.chosen.error <= before.error
    assert [s.plan for s in first.front] == [s.plan for s in again.front]
