"""Allocation from the table, against enumeration."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.search.toys import make_costs, make_table
from workbench.options import BadInput
from workbench.plans import mean_act_bits
from workbench.search.knapsack import allocate_weights
from workbench.search.lagrangian import activation_hull, hull, largest_sum

seeds = st.integers(0, 10_000)


def enumerate_plans(error_IC, cost_IC):
    """(cost, error, columns) of every plan."""
    items = np.arange(len(error_IC))
    for columns in product(range(error_IC.shape[1]), repeat=len(error_IC)):
        yield cost_IC[items, columns].sum(), error_IC[items, columns].sum(), columns


def random_items(seed, items=4, choices=4):
    random = np.random.default_rng(seed)
    cost_IC = np.sort(random.integers(1, 12, (items, choices)), axis=1).astype(float)
    return random.exponential(size=(items, choices)), cost_IC


@given(seeds, st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_plan_at_a_price_minimises_the_lagrangian(seed, mu):
    error_IC, cost_IC = random_items(seed)
    columns_I = hull(error_IC, cost_IC).at(mu)
    items = np.arange(len(error_IC))
    found = error_IC[items, columns_I].sum() + mu * cost_IC[items, columns_I].sum()
    assert found == pytest.approx(min(error + mu * cost for cost, error, _ in enumerate_plans(error_IC, cost_IC)))


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_lagrangian_plan_is_the_best_of_all_plans_at_its_own_cost(seed):
    error_IC, cost_IC = random_items(seed)
    made, items = hull(error_IC, cost_IC), np.arange(len(error_IC))
    everything = list(enumerate_plans(error_IC, cost_IC))
    for mu in (*made.slope_E, 0.0):
        columns_I = made.at(mu * (1 - 1e-9))
        cost, error = cost_IC[items, columns_I].sum(), error_IC[items, columns_I].sum()
        assert error == pytest.approx(min(e for c, e, _ in everything if c <= cost))


@given(seeds, st.floats(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_limit_is_kept_and_what_is_lost_is_less_than_one_edge(seed, limit):
    error_IC, cost_IC = random_items(seed)
    made, items = hull(error_IC, cost_IC), np.arange(len(error_IC))
    if limit < made.cost_range[0]:
        with pytest.raises(BadInput, match=f"smallest feasible cost, {made.cost_range[0]:g}"):
            made.within(limit)
        return
    columns_I = made.within(limit)
    assert cost_IC[items, columns_I].sum() <= limit
    exact = min(error for cost, error, _ in enumerate_plans(error_IC, cost_IC) if cost <= limit)
    largest_edge = max((error_IC.max(axis=1) - error_IC.min(axis=1)).max(), 0)
    assert exact - 1e-9 <= error_IC[items, columns_I].sum() <= exact + largest_edge + 1e-9


def test_equal_slopes_and_points_on_an_edge():
    made = hull([[4.0, 2.0, 0.0], [4.0, 3.9, 0.0]], [0.0, 1.0, 2.0])
    assert made.slope_E.tolist() == [2.0, 2.0] and made.edge_item_E.tolist() == [0, 1]
    assert made.at(2.0).tolist() == [0, 0] and made.at(1.99).tolist() == [2, 2]
    assert made.within(3.0).tolist() == [2, 0]


def test_a_width_that_is_worse_than_a_cheaper_one_is_never_chosen():
    made = hull([[1.0, 5.0, 0.5]], [3.0, 4.0, 8.0])
    assert {int(made.within(limit)[0]) for limit in np.arange(3, 12, 0.5)} == {0, 2}


@given(seeds, st.floats(3, 16))
@settings(max_examples=40, deadline=None)
def test_activation_plans_keep_their_mean_and_use_it(seed, mean):
    table = make_table(seed)
    rows = activation_hull(table).rows_within(largest_sum(mean, 12))
    assert mean_act_bits(rows) <= mean
    if mean < 15:  # a remainder smaller than the cheapest step up (3 to 4 bits in one cell) may be left, or one that nothing fits
        assert mean - mean_act_bits(rows) < 8 / 12


def test_a_cost_of_one_layer_changes_who_gets_bits():
    table = make_table(0)
    dear = activation_hull(table, cost_TLC=np.array([[1.0], [1.0], [1000.0]]) * np.array(table.act_bits_C))
    equal = activation_hull(table)
    mu = float(np.median(equal.hull.slope_E))
    last = [sum(row[2] for row in made.rows_at(mu)) for made in (equal, dear)]
    assert last[1] < last[0] and [r[:2] for r in dear.rows_at(mu)] == [r[:2] for r in equal.rows_at(mu)]


@pytest.mark.parametrize("mean, count", [(3.6, 1080), (4.0, 12), (3.3, 1080), (3.1, 54), (16.0, 7), (5.7, 999)])
def test_largest_sum_never_exceeds_the_mean(mean, count):
    total = largest_sum(mean, count)
    assert total / count <= mean < (total + 1) / count


@given(seeds, st.integers(1000, 2500))
@settings(max_examples=40, deadline=None)
def test_weights_are_the_best_of_all_allocations_within_the_bytes(seed, max_bytes):
    table, costs = make_table(seed), make_costs()
    bytes_LC, error_LC = costs.weight_bytes_LC.numpy(), table.weight_error_LC.double().numpy()
    feasible = [(error, columns) for cost, error, columns in enumerate_plans(error_LC, bytes_LC)
                if cost + costs.fixed_bytes <= max_bytes]
    if not feasible:
        least = costs.fixed_bytes + int(bytes_LC[:, 0].sum())
        with pytest.raises(BadInput, match=f"max_weight_bytes is {max_bytes}; the smallest feasible is {least}"):
            allocate_weights(table.weight_error_LC, costs, max_bytes)
        return
    bits_L = allocate_weights(table.weight_error_LC, costs, max_bytes)
    found = sum(error_LC[i, costs.weight_bits_C.index(bits)] for i, bits in enumerate(bits_L))
    assert costs.total_bytes(bits_L) <= max_bytes
    assert found == pytest.approx(min(feasible)[0], rel=1e-6)


@example(1064, 1918, 19.0)  # the two best plans differ by less than HiGHS's absolute gap allows
@given(seeds, st.integers(1000, 2500), st.floats(3, 40))
@settings(max_examples=60, deadline=None)
def test_weights_under_two_limits_are_the_best_that_keep_both(seed, max_bytes, max_us):
    table, costs = make_table(seed), make_costs()
    bytes_LC, error_LC = costs.weight_bytes_LC.numpy(), table.weight_error_LC.double().numpy()
    us_LC = np.random.default_rng(seed).uniform(1, 12, bytes_LC.shape)
    small = [(error, us_LC[np.arange(3), list(columns)].sum()) for cost, error, columns in enumerate_plans(error_LC, bytes_LC)
             if cost + costs.fixed_bytes <= max_bytes]
    if not small:
        return
    feasible = [error for error, us in small if us <= max_us]
    bits_L = allocate_weights(table.weight_error_LC, costs, max_bytes, second_constraint=(us_LC, max_us))
    if not feasible:
        assert bits_L is None
        return
    columns = [costs.weight_bits_C.index(bits) for bits in bits_L]
    assert costs.total_bytes(bits_L) <= max_bytes and us_LC[np.arange(3), columns].sum() <= max_us
    assert error_LC[np.arange(3), columns].sum() == pytest.approx(min(feasible), rel=1e-6)


def test_weights_at_exactly_the_smallest_bytes_and_columns_in_another_order():
    table, costs = make_table(3), make_costs()
    least = costs.total_bytes([2, 2, 2])
    assert allocate_weights(table.weight_error_LC, costs, least) == (2, 2, 2)
    flipped = allocate_weights(table.weight_error_LC.flip(1), costs, 1500, weight_bits_C=WEIGHT_BITS[::-1])
    assert flipped == allocate_weights(table.weight_error_LC, costs, 1500)


WEIGHT_BITS = make_costs().weight_bits_C
