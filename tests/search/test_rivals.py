"""Every rival against enumeration on problems small enough for it, and the budget they all share."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workbench.options import BadInput
from workbench.search import rivals, rivals_steps
from workbench.search.rivals import AllocationProblem

RIVALS = {"greedy": rivals.greedy, "milp": rivals.mixed_integer, "layers only": rivals.layers_only,
          "steps exact": rivals_steps.steps_exact, "steps bisection": rivals_steps.steps_bisection,
          "protected ends": rivals_steps.protected_ends,
          "random": lambda problem: rivals_steps.random_plan(problem, np.random.default_rng(0))}
PER_STEP = ("steps exact", "steps bisection", "protected ends")
BITS_C = np.array([3.0, 4.0, 8.0])


def make_problem(seed: int, slack: float, steps=2, layers=2, whole=True) -> AllocationProblem:
    """Errors that mostly fall with the bits; `slack` from 0 (the cheapest plan) to 1 (the dearest)."""
    random = np.random.default_rng(seed)
    error_TLC = random.exponential(size=(steps, layers, 1)) * 4.0 ** -BITS_C * random.lognormal(0, 0.4, (steps, layers, 3))
    cost_TLC = np.broadcast_to(BITS_C, error_TLC.shape) if whole else random.uniform(0.5, 2, (steps, layers, 1)) * BITS_C ** 0.7
    least, most = cost_TLC.min(-1).sum(), cost_TLC.max(-1).sum()
    return AllocationProblem(error_TLC=error_TLC, cost_TLC=cost_TLC, limit=float(least + slack * (most - least)))


def plans(problem, per_step=False, per_layer=False):
    """Every plan within the limit: (error, columns)."""
    steps, layers, choices = problem.error_TLC.shape
    shape = (steps, 1) if per_step else (1, layers) if per_layer else (steps, layers)
    for columns in product(range(choices), repeat=shape[0] * shape[1]):
        columns_TL = np.broadcast_to(np.reshape(columns, shape), (steps, layers))
        if problem.fits(columns_TL):
            yield problem.error(columns_TL), columns_TL


seeds, slacks = st.integers(0, 10_000), st.floats(0, 1)


@pytest.mark.parametrize("name", RIVALS)
@given(seed=seeds, slack=slacks, whole=st.booleans(), steps=st.integers(1, 5), layers=st.integers(1, 4))
@example(seed=77, slack=0.0, whole=False, steps=3, layers=4)
@settings(max_examples=15, deadline=None)
def test_the_budget_is_never_exceeded_and_every_cell_has_a_choice(name, seed, slack, whole, steps, layers):
    problem = make_problem(seed, slack, steps, layers, whole)
    try:
        columns_TL = RIVALS[name](problem)
    except BadInput as error:  # costs that differ by layer: one choice everywhere may cost more than the cheapest of each
        assert name in PER_STEP and not whole and "fits everywhere" in str(error)
        return
    assert columns_TL.shape == (steps, layers) and set(np.unique(columns_TL)) <= {0, 1, 2}
    assert problem.cost(columns_TL) <= problem.limit


@given(seed=seeds, slack=slacks, whole=st.booleans())
@example(seed=10000, slack=0.9999999999999999, whole=False)
@settings(max_examples=30, deadline=None)
def test_milp_is_the_best_of_all_plans(seed, slack, whole):
    problem = make_problem(seed, slack, whole=whole)
    assert problem.error(rivals.mixed_integer(problem)) == pytest.approx(min(plans(problem), key=lambda p: p[0])[0], rel=1e-6)


@given(seed=seeds, slack=slacks)
@settings(max_examples=30, deadline=None)
def test_the_dynamic_programme_is_the_best_of_all_plans_with_one_choice_a_step(seed, slack):
    problem = make_problem(seed, slack, steps=4)
    columns_TL = rivals_steps.steps_exact(problem)
    assert (columns_TL == columns_TL[:, :1]).all()
    best = min(error for error, _ in plans(problem, per_step=True))
    assert problem.error(columns_TL) == pytest.approx(best, rel=1e-12)
    assert problem.error(rivals_steps.steps_bisection(problem)) >= best * (1 - 1e-12)


@given(seed=seeds, slack=slacks)
@settings(max_examples=20, deadline=None)
def test_costs_that_are_not_whole_lose_less_than_a_thousandth_of_the_limit(seed, slack):
    problem = make_problem(seed, slack, steps=4, layers=1, whole=False)
    tighter = AllocationProblem(error_TLC=problem.error_TLC, cost_TLC=problem.cost_TLC, limit=max(problem.least, problem.limit * 0.999))
    best = min(error for error, _ in plans(tighter, per_step=True))
    assert problem.error(rivals_steps.steps_exact(problem)) <= best * (1 + 1e-12)


@given(seed=seeds, slack=slacks)
@example(seed=0, slack=1 - 2 ** -53)  # so little below everything at 8 bits that HiGHS lets it pass
@settings(max_examples=30, deadline=None)
def test_layers_only_knows_no_time_and_loses_at_most_one_layer_to_the_exact_answer(seed, slack):
    problem = make_problem(seed, slack, steps=2, layers=4)
    columns_TL = rivals.layers_only(problem)
    assert (columns_TL == columns_TL[:1]).all()
    best = min(error for error, _ in plans(problem, per_layer=True))
    one_layer = problem.error_TLC.sum(0).max()
    assert best - 1e-12 <= problem.error(columns_TL) <= best + one_layer


def test_greedy_raises_the_largest_error_first_whatever_it_costs():
    error_TLC = np.array([[[10.0, 1.0, 0.0], [9.0, 0.5, 0.0]]])
    cost_TLC = np.array([[[3.0, 9.0, 20.0], [3.0, 4.0, 8.0]]])
    assert rivals.greedy(AllocationProblem(error_TLC=error_TLC, cost_TLC=cost_TLC, limit=12.0)).tolist() == [[1, 0]]
    assert rivals.greedy(AllocationProblem(error_TLC=error_TLC, cost_TLC=cost_TLC, limit=11.9)).tolist() == [[0, 2]]
    assert rivals.greedy(AllocationProblem(error_TLC=error_TLC, cost_TLC=cost_TLC, limit=13.0)).tolist() == [[1, 1]]


@given(seed=seeds, slack=slacks)
@settings(max_examples=20, deadline=None)
def test_the_protected_steps_are_as_many_at_each_end_and_no_other_number_or_pair_is_better(seed, slack):
    problem = make_problem(seed, slack, steps=5)
    columns_T = rivals_steps.protected_ends(problem)[:, 0].tolist()
    assert columns_T == columns_T[::-1] and sum(a != b for a, b in pairwise(columns_T)) in (0, 2)
    symmetric = [error for error, columns_TL in plans(problem, per_step=True)
                 if sum(a != b for a, b in pairwise(columns_TL[:, 0].tolist())) in (0, 2)
                 and columns_TL[:, 0].tolist() == columns_TL[::-1, 0].tolist()]
    assert problem.error(rivals_steps.protected_ends(problem)) == pytest.approx(min(symmetric), rel=1e-12)


def test_bisection_splits_only_where_it_pays():
    error_TLC = np.tile([1.0, 0.5, 0.0], (8, 1, 1))
    error_TLC[5] *= 100
    cost_TLC = np.broadcast_to(BITS_C, error_TLC.shape)
    columns_T = rivals_steps.steps_bisection(AllocationProblem(error_TLC=error_TLC, cost_TLC=cost_TLC, limit=8 * 3 + 4.5))[:, 0]
    assert columns_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_random_plans_repeat_by_seed_and_leave_nothing_that_fits():
    problem = make_problem(3, 0.5, steps=4, layers=3)
    first, again, other = (rivals_steps.random_plan(problem, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    left = problem.limit - problem.cost(first)
    assert all(BITS_C[column + 1] - BITS_C[column] > left for column in first.ravel() if column < 2)


def test_a_limit_below_the_cheapest_plan_is_refused_with_both_numbers():
    with pytest.raises(BadInput, match=r"a limit of 11\.9 is below the smallest feasible cost, 12"):
        AllocationProblem(error_TLC=np.zeros((2, 2, 3)), cost_TLC=np.broadcast_to(BITS_C, (2, 2, 3)), limit=11.9)


def test_the_online_switch_runs_one_step_high_once_the_change_has_added_up():
    moved, bits = 0.0, []
    for change in (0.4, 0.4, 0.4, 0.4, 1.5, 0.1):
        chosen, moved = rivals_steps.online_bits(change, moved, 1.0)
        bits.append(chosen)
    assert bits == [4, 4, 8, 4, 8, 4]
