"""Rank correlations against scipy's, the online switch along a rollout, and the search against everything there is."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tests.search.toys import EntangledEvaluator, TableEvaluator, make_costs, make_table, run
from workbench.options import Budget
from workbench.search.evaluation_cache import EvaluationCache
from workbench.search.online import online_rollout
from workbench.search.ranking import predict, rank, spearman


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=3, max_size=30))
def test_spearman_is_scipy_s(pairs):
    first, second = zip(*pairs)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert np.isnan(spearman(first, second))
    else:
        assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_infinite_errors_and_too_few_plans_are_left_out_and_said():
    predicted = {"good": [1, 2, 3, 4, 5, 6, 0], "bad": [6, 5, 4, 3, 2, 1, 9]}
    measured = [10, 20, 30, 40, 50, 60, float("inf")]
    good, bad = rank(predicted, measured, near=[True, True, True, False, False, False, False])
    assert (good.spearman, good.plans, bad.spearman) == (1.0, 6, -1.0)
    assert (good.spearman_near, good.plans_near) == (None, 3)


def test_a_table_that_is_the_truth_ranks_every_plan_right():
    table = make_table(1)
    result = run(table, TableEvaluator(table))
    assert all(each.spearman == pytest.approx(1) for each in result.ranking)
    for scored in result.front:
        assert predict(table, scored.plan.weight_bits_L, scored.plan.act_bits_TL) == pytest.approx(scored.error, rel=1e-5)


@pytest.mark.parametrize("target", [3.5, 5.0, 7.9])
def test_the_online_switch_runs_steps_at_4_or_8_bits_and_more_of_them_high_for_a_higher_target(target):
    table = make_table(0, steps=10)

    def high_steps(target_bits):
        cache = EvaluationCache(EntangledEvaluator(table), summed=False, on_extend=lambda: None)
        rows = cache.bits_TL(online_rollout(cache, (4, 4, 4), lambda bits: ((bits,) * 3,) * 10, 10, target_bits))
        assert len(rows) == 10 and all(row in ((4,) * 3, (8,) * 3) for row in rows) and rows[0][0] == 8
        return sum(row[0] == 8 for row in rows)
    assert high_steps(target) >= high_steps(3.0)
    assert high_steps(7.9) > high_steps(4.0)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_better_exists_where_every_plan_can_be_tried(seed):
    """2 steps, 3 layers, 3 widths, fixed weights: all 729 plans. The table is wrong by a factor that depends on the step."""
    table = make_table(seed, steps=2, act_bits=(3, 4, 16), weight_bits=(4, 16))

    class Mistaken(TableEvaluator):
        def row_error(self, step, row):
            return super().row_error(step, row) * (1, 15)[step]

    budget = Budget(max_weight_bytes=make_costs(3, (4, 16)).total_bytes([4] * 3), max_mean_act_bits=6.0)
    evaluator = Mistaken(table)
    evaluator.use_weights((4, 4, 4))
    plans = (tuple(zip(*[iter(bits)] * 3)) for bits in product((3, 4, 16), repeat=6) if sum(bits) <= 36)
    best = min(evaluator.error((evaluator.weights, plan)) for plan in plans)
    found = run(table, Mistaken(table), budget=budget, rivals="uniform", beam=8, configs=8, refine=20).chosen
    assert found.error == pytest.approx(best, rel=1e-9)
