"""The allocations a search tries, before anything is measured."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.toys import TableEvaluator, make_costs, make_layers, make_table, run
from workbench.options import BadInput, Budget, Cancelled, QuantConfig, SearchConfig
from workbench.plans import mean_act_bits
from workbench.search.evaluation_cache import EvaluationCache
from workbench.search.rivals import uniform_rows, uniform_weights
from workbench.search.search_problem import SearchProblem

COSTS = make_costs()


def make_task(seed=0, steps=6, budget=None, **config) -> SearchProblem:
    table = make_table(seed, steps)
    return SearchProblem(layers=make_layers(3), sigma_T=tuple(1 - t / steps for t in range(steps)), table=table, planning_table=table,
                         costs=COSTS, quant=QuantConfig(), model_hash="a toy model",
                         budget=budget or Budget(max_weight_bytes=1300, max_mean_act_bits=5.0),
                         config=SearchConfig(**config))


def walk(problem, pick):
    """Follow the configurations; `pick` chooses one of those offered at each step."""
    cache = EvaluationCache(TableEvaluator(problem.table), summed=False, on_extend=lambda: None)
    path, relaxed = cache.root((4, 4, 4)), problem.lagrangian_plans((4, 4, 4))
    for step in range(problem.steps):
        offered = problem.configurations(relaxed, step, relaxed.spent(cache.bits_TL(path)))
        path = cache.extend(path, offered[pick(step) % len(offered)])
    return cache.bits_TL(path)


@given(seed=st.integers(0, 1000), mean=st.floats(4, 7), configs=st.integers(3, 8))
@settings(max_examples=25, deadline=None)
def test_whoever_always_takes_the_lowest_or_highest_ends_just_below_that_mean(seed, mean, configs):
    problem = make_task(seed, budget=Budget(max_mean_act_bits=mean), configs=configs)
    step_up = 12 / 18  # one edge at most, from 4 to 16 bits in one of 18 cells, may not fit
    low, high = (mean_act_bits(walk(problem, lambda _, end=end: end)) for end in (0, -1))
    assert max(3, 0.85 * mean) - step_up < low <= max(3, 0.85 * mean) + 1e-9
    assert 1.4 * mean - step_up < high <= 1.4 * mean + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_what_was_overspent_early_is_saved_later(seed):
    problem = make_task(seed, steps=8)
    lavish = walk(problem, lambda step: -1 if step < 3 else 0)
    frugal = walk(problem, lambda step: 0)
    assert mean_act_bits(lavish[:3]) > mean_act_bits(frugal[:3])
    assert mean_act_bits(lavish) <= max(0.85 * 5.0, (sum(map(sum, lavish[:3])) + 5 * 3 * 3) / 24) + 1e-9


def test_configurations_are_at_least_low_mid_and_high_and_never_twice():
    problem = make_task(configs=6)
    rows = problem.configurations(problem.lagrangian_plans((4, 4, 4)), 0, 0.0)
    assert len(rows) == len(set(rows)) >= 3
    assert [sum(row) for row in rows] == sorted(sum(row) for row in rows)


def test_rungs_hold_the_target_and_rise():
    problem = make_task(budget=Budget(max_mean_act_bits=5.3), steps=20)
    means = [mean_act_bits(rows) for rows in problem.seed_plans((4, 4, 4))]
    assert means == sorted(means) and min(means) < 3.3 and max(means) > 7.5
    assert any(5.3 - 12 / 60 < mean <= 5.3 for mean in means)


def test_the_beam_may_run_on_the_best_and_on_the_uniform_weights_within_the_limit():
    limit = COSTS.total_bytes([4, 4, 8])
    best, uniform = make_task(1, budget=Budget(max_weight_bytes=limit)).weight_candidates
    assert uniform == (4, 4, 4) and COSTS.total_bytes(best) <= limit
    assert make_task(budget=Budget(max_mean_act_bits=4.0)).weight_candidates == [(4, 4, 4)]


def test_other_weights_span_from_the_smallest_to_float_and_the_smallest_has_the_smallest_plan():
    problem = make_task()
    others = problem.other_weights()
    sizes = [COSTS.total_bytes(weights) for weights in others]
    assert sizes[0] == COSTS.total_bytes([2] * 3) and sizes[-1] == COSTS.total_bytes([16] * 3) and sizes == sorted(sizes)
    assert others[(2, 2, 2)][0] == uniform_rows(3, np.ones((6, 3), dtype=bool))
    assert not set(others) & set(problem.weight_candidates)
    assert uniform_weights(COSTS) == {bits: COSTS.total_bytes([bits] * 3) for bits in (2, 4, 8, 16)}


def test_default_settings_take_less_than_twelve_hundred_model_steps():
    table = make_table(0, steps=20, layers=12, act_bits=(3, 4, 6, 8, 16), weight_bits=(2, 3, 4, 6, 8, 16))
    limit = make_costs(12, table.weight_bits_C).total_bytes([4] * 12)
    totals = []

    def stop(progress):
        totals.append(progress.total)
        raise Cancelled

    with pytest.raises(Cancelled):
        run(table, TableEvaluator(table), budget=Budget(max_weight_bytes=limit, max_mean_act_bits=4.0), on_progress=stop)
    assert totals[0] < 1200


def test_a_table_of_another_size_is_refused():
    problem = make_task()
    with pytest.raises(BadInput, match=r"the distortion table is \(5, 3, 4\); steps, layers and choices are \(6, 3, 4\)"):
        dataclasses.replace(problem, table=make_table(0, steps=5)).check()
