"""Costs that the allocators do not look into: bits, microseconds, and both at once against enumeration."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.toys import ACT_BITS, TableEvaluator, make_costs, make_layers, make_table
from workbench.options import BadInput, Budget, QuantConfig, SearchConfig
from workbench.plans import LatencyTable
from workbench.search.cost_model import BudgetConstraint, bit_constraint, budget_constraints, lagrangian_plans, latency_us_LC
from workbench.search.search import search


def timed(layers=3, seed=0):
    plain, random = make_costs(layers), np.random.default_rng(seed)
    us_LWA = torch.tensor(np.sort(random.uniform(1, 20, (layers, len(plain.weight_bits_C), len(ACT_BITS))), axis=-1))
    return replace(plain, latency=LatencyTable(target="made up", measured=False, provenance="", weight_bits_W=plain.weight_bits_C,
                                               act_bits_A=ACT_BITS, us_LWA=us_LWA, fixed_us=10.0))


def constraint(seed, slack, layers=2, steps=2):
    random = np.random.default_rng(seed)
    cost_TLC = np.tile(np.sort(random.uniform(1, 10, (layers, 4)), axis=1), (steps, 1, 1))
    least, most = cost_TLC.min(-1).sum(), cost_TLC.max(-1).sum()
    return BudgetConstraint(name="max_latency_ms", unit="us", cost_TLC=cost_TLC, limit=least + slack * (most - least))


def everywhere(steps, layers):
    return np.ones((steps, layers), dtype=bool)


def columns_of(rows):
    return np.searchsorted(ACT_BITS, np.asarray(rows))


@given(seed=st.integers(0, 1000), mean=st.floats(3, 16), slack=st.floats(0.001, 1))
@settings(max_examples=60, deadline=None)
def test_neither_of_two_limits_is_ever_exceeded(seed, mean, slack):
    table = make_table(seed, steps=2, layers=2)
    limits = [bit_constraint(ACT_BITS, everywhere(2, 2), mean), constraint(seed, slack)]
    columns = [np.reshape(c, (2, 2)) for c in product(range(4), repeat=4)]
    feasible = [c for c in columns if all(limit.total(c) <= limit.limit for limit in limits)]
    assert feasible  # the cheapest plan of one constraint is the cheapest of the other here
    found = columns_of(lagrangian_plans(table, limits).rows())
    assert all(limit.total(found) <= limit.limit for limit in limits)


@given(seed=st.integers(0, 1000), slack=st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_a_limit_that_does_not_bind_changes_nothing(seed, slack):
    table, binding = make_table(seed, steps=2, layers=2), constraint(seed, slack)
    loose = bit_constraint(ACT_BITS, everywhere(2, 2), 16.0)
    assert lagrangian_plans(table, [binding, loose]).rows() == lagrangian_plans(table, [binding]).rows()


def test_where_all_widths_take_the_same_time_the_best_is_free():
    table = make_table(0)
    same = BudgetConstraint(name="max_latency_ms", unit="us", cost_TLC=np.full((4, 3, 4), 7.0), limit=4 * 3 * 7.0)
    assert lagrangian_plans(table, [same]).rows() == (((16,) * 3,) * 4)


def test_latencies_are_read_by_weight_width_and_their_absence_is_said():
    costs = timed()
    assert latency_us_LC(make_costs(), (4, 4, 4), ACT_BITS) is None
    picked = latency_us_LC(costs, (2, 4, 16), ACT_BITS)
    assert (picked == np.stack([costs.latency.us_LWA[i, costs.weight_bits_C.index(bits)] for i, bits in enumerate((2, 4, 16))])).all()
    with pytest.raises(BadInput, match="nothing is known about this machine's latencies"):
        budget_constraints(Budget(max_weight_bytes=10**6, max_latency_ms=1.0), make_costs(), (4, 4, 4), ACT_BITS, everywhere(4, 3))
    with pytest.raises(BadInput, match=r"max_latency_ms: the limit leaves .* us for the layers; the cheapest plan takes"):
        limits = budget_constraints(Budget(max_weight_bytes=10**6, max_latency_ms=0.041), costs, (4, 4, 4), ACT_BITS, everywhere(4, 3))
        lagrangian_plans(make_table(0), limits)


@pytest.mark.parametrize("with_bits", [True, False])
def test_a_search_keeps_its_time(with_bits):
    table, costs = make_table(4), timed()
    weights = (4, 4, 4)
    us_LC = latency_us_LC(costs, weights, ACT_BITS)
    limit_ms = (4 * 10.0 + 4 * us_LC.mean(1).sum()) / 1000
    budget = Budget(max_weight_bytes=costs.total_bytes(weights), max_latency_ms=limit_ms,
                         max_mean_act_bits=6.0 if with_bits else None)
    chosen = search(layers=make_layers(3), sigma_T=[1, 0.75, 0.5, 0.25], table=table, costs=costs, quant=QuantConfig(),
                    model_hash="a toy model", budget=budget, config=SearchConfig(), evaluator=TableEvaluator(table)).chosen.plan
    spent_us = latency_us_LC(costs, chosen.weight_bits_L, ACT_BITS)[np.arange(3), columns_of(chosen.act_bits_TL)].sum() + 4 * 10.0
    assert spent_us <= 1000 * limit_ms and chosen.latency_ms == pytest.approx(spent_us / 1000)
    assert not with_bits or chosen.act_bits_mean <= 6.0


def timed_search(seed, budget):
    table, costs = make_table(seed), timed(seed=seed)
    return search(layers=make_layers(3), sigma_T=[1, 0.75, 0.5, 0.25], table=table, costs=costs, quant=QuantConfig(),
                  model_hash="a toy model", budget=budget, config=SearchConfig(), evaluator=TableEvaluator(table)).chosen.plan


@given(seed=st.integers(0, 1000), width=st.sampled_from([None, 4, 8]), slack=st.floats(0, 0.3))
@settings(max_examples=40, deadline=None)
def test_a_search_that_begins_finds_weights_that_keep_memory_and_time(seed, width, slack):
    costs = timed(seed=seed)
    max_bytes = None if width is None else costs.total_bytes((width,) * 3)
    fastest_WL = costs.latency.us_LWA.numpy().min(2).T
    within = [sum(fastest_WL[columns, range(3)]) for columns in product(range(4), repeat=3)
              if max_bytes is None or costs.total_bytes([costs.weight_bits_C[column] for column in columns]) <= max_bytes]
    least_ms = 4 * (min(within) + 10.0) / 1000
    limit_ms = least_ms * (1 + slack) + 1e-9
    plan = timed_search(seed, Budget(max_weight_bytes=max_bytes, max_latency_ms=limit_ms))
    assert plan.latency_ms <= limit_ms and (max_bytes is None or plan.weight_bytes <= max_bytes)
    with pytest.raises(BadInput, match=r"max_latency_ms is .*; the smallest feasible within .* MB is [\d.]+"):
        timed_search(seed, Budget(max_weight_bytes=max_bytes, max_latency_ms=0.99 * least_ms))


@pytest.mark.parametrize("seed", range(4))
def test_time_alone_buys_wider_weights_and_keeps_every_limit(seed):
    costs, four = timed(seed=seed), (4, 4, 4)
    slowest_ms = costs.latency.range_ms(4)[1]
    limit_ms = (costs.latency.plan_ms(four, [four] * 4) + slowest_ms) / 2
    generous = timed_search(seed, Budget(max_latency_ms=limit_ms))
    assert generous.latency_ms <= limit_ms and generous.weight_bytes > costs.total_bytes(four)
    both = timed_search(seed, Budget(max_latency_ms=limit_ms, max_mean_act_bits=4.0))
    assert both.latency_ms <= limit_ms and both.act_bits_mean <= 4.0 and both.weight_bytes > costs.total_bytes(four)


def test_two_limits_on_activations_that_no_refined_table_can_keep_end_no_search():
    costs = timed()
    slow = torch.flip(costs.latency.us_LWA, (2,))  # few bits take longest: a limit on the mean and one on time pull apart
    costs = replace(costs, latency=replace(costs.latency, us_LWA=slow))
    table, us_LC = make_table(4), latency_us_LC(costs, (4, 4, 4), ACT_BITS)
    limit_ms = 4 * (10.0 + us_LC[:, 2].sum() * 1.02) / 1000
    budget = Budget(max_weight_bytes=costs.total_bytes((4, 4, 4)), max_latency_ms=limit_ms, max_mean_act_bits=8.5)
    chosen = search(layers=make_layers(3), sigma_T=[1, 0.75, 0.5, 0.25], table=table, costs=costs, quant=QuantConfig(),
                    model_hash="a toy model", budget=budget, config=SearchConfig(), evaluator=TableEvaluator(table)).chosen.plan
    assert chosen.latency_ms <= limit_ms and chosen.act_bits_mean <= 8.5
