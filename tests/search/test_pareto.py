"""Non-dominated sets against the definition, and what a budget selects."""

import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.options import BadInput, Budget
from workbench.search.pareto import distance_to_origin, knee, non_dominated, select, within

number = st.integers(0, 6)
points_2d = st.lists(st.tuples(number, number), max_size=30)
points_3d = st.lists(st.tuples(number, number, number), max_size=30)


def brute_force(points):
    """By definition: nothing is at least as good in everything and different, or equal and earlier."""
    def beaten(i):
        return any(all(a <= b for a, b in zip(points[j], points[i])) and (points[j] != points[i] or j < i)
                   for j in range(len(points)) if j != i)
    return {i for i in range(len(points)) if not beaten(i)}


@given(points_2d | points_3d)
def test_non_dominated_is_what_the_definition_says(points):
    kept = non_dominated(points)
    assert set(kept) == brute_force(points)
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)


@given(points_3d, st.randoms())
def test_the_set_of_points_does_not_depend_on_their_order(points, random_):
    shuffled = points[:]
    random_.shuffle(shuffled)
    assert [points[i] for i in non_dominated(points)] == [shuffled[i] for i in non_dominated(shuffled)]


def test_points_that_are_not_finite_are_never_kept():
    assert non_dominated([(0, math.nan), (1, math.inf), (2, 5.0), (3, 7.0)]) == [2]
    assert non_dominated([(0, math.nan)]) == []
    with pytest.raises(BadInput, match="finite"):
        knee([(0, math.inf)])


def test_the_knee_is_near_on_both_axes_and_the_first_of_equals():
    assert knee([(0, 100), (1, 20), (2, 10), (10, 0), (9, 50)]) == 1  # (.1, .2) and (.2, .1) are equally near
    assert knee([(5, 5)]) == 0


def test_distance_survives_a_constant_axis():
    assert distance_to_origin([(5, 0.0), (5, 2.0)]).tolist() == [0.0, 1.0]


def scored(weight_bytes, bits, error, plan_id="x"):
    return SimpleNamespace(plan=SimpleNamespace(weight_bytes=weight_bytes, act_bits_mean=bits, plan_id=plan_id), error=error)


FRONT = [scored(100, 3.0, 9.0), scored(100, 5.0, 4.0), scored(200, 3.0, 5.0), scored(200, 5.0, 1.0)]


@given(st.none() | st.integers(50, 250), st.none() | st.floats(3, 6))
def test_select_takes_the_least_error_within_budget_or_says_what_is_feasible(size, bits):
    if size is None and bits is None:
        return
    budget = Budget(max_weight_bytes=size, max_mean_act_bits=bits)
    fitting = [s for s in FRONT if within((s.plan.weight_bytes, s.plan.act_bits_mean), budget)]
    if fitting:
        assert select(FRONT, budget).error == min(s.error for s in fitting)
    else:
        with pytest.raises(BadInput, match="smallest plan needs 100"):
            select(FRONT, budget)


def test_select_names_the_limit_to_blame():
    with pytest.raises(BadInput, match=r"max_mean_act_bits is 3; the smallest mean of a plan is 4"):
        select([scored(100, 4.0, 1.0)], Budget(max_mean_act_bits=3.0))
    with pytest.raises(BadInput, match=r"within 150 bytes the smallest mean of activation bits is 5, not 4"):
        select([scored(100, 5.0, 1.0), scored(200, 3.0, 1.0)], Budget(max_weight_bytes=150, max_mean_act_bits=4.0))
    with pytest.raises(BadInput, match="empty"):
        select([], Budget(max_weight_bytes=150))


def test_select_breaks_ties_the_same_way_in_any_order():
    tied = [scored(200, 3.0, 1.0, "a"), scored(100, 5.0, 1.0, "b"), scored(100, 4.0, 1.0, "d"), scored(100, 4.0, 1.0, "c")]
    for seed in range(10):
        random.Random(seed).shuffle(tied)
        assert select(tied, Budget(max_weight_bytes=200)).plan.plan_id == "c"
