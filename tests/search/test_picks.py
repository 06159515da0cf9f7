"""What is reachable, which limit is to blame, and plans picked by a wish."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.search.toys import ACT_BITS, EntangledEvaluator, make_costs, make_table, run
from workbench.options import BadInput, Budget
from workbench.search import selection

COSTS = make_costs()
REACHABLE = selection.feasible(COSTS, ACT_BITS, steps=4)
LEAST, MOST = COSTS.total_bytes([2] * 3), COSTS.total_bytes([16] * 3)


def scored(weight_bytes, bits, error, plan_id="x"):
    return SimpleNamespace(plan=SimpleNamespace(weight_bytes=weight_bytes, act_bits_mean=bits, plan_id=plan_id), error=error)


FRONT = [scored(100, 3.0, 1e-1), scored(100, 5.0, 2e-3), scored(200, 5.0, 1e-3), scored(400, 16.0, 0.0)]


def test_reachable_is_from_the_cheapest_to_the_dearest_plan_and_names_uniform_ones():
    assert REACHABLE.weight_bytes == (LEAST, MOST) and REACHABLE.mean_act_bits == (3, 16) and REACHABLE.latency_ms is None
    assert REACHABLE.uniform == (("W4A4", COSTS.total_bytes([4] * 3), 4.0, None), ("W4A8", COSTS.total_bytes([4] * 3), 8.0, None),
                                 ("W8A8", COSTS.total_bytes([8] * 3), 8.0, None))


@given(size=st.none() | st.integers(1, 2 * MOST), bits=st.none() | st.floats(3, 16))
def test_nobody_is_blamed_exactly_when_the_smallest_plan_fits(size, bits):
    if size is None and bits is None:
        return
    lines = selection.blame(Budget(max_weight_bytes=size, max_mean_act_bits=bits), REACHABLE)
    assert (len(lines) == 0) == (size is None or size >= LEAST)
    assert all("\n" not in line for line in lines)


def test_the_blame_states_the_gap_and_both_numbers():
    reachable = selection.Feasible(weight_bytes=(8_000_000, 20_000_000), mean_act_bits=(4.0, 16.0), latency_ms=None, uniform=())
    lines = selection.blame(Budget(max_weight_bytes=7_500_000, max_mean_act_bits=3.5), reachable)
    assert lines == ("memory: 7.5 MB is 0.5 MB below the smallest feasible, 8 MB",
                     "mean activation bits: 3.5 bits is 0.5 bits below the smallest feasible, 4 bits")


def test_quality_is_the_signal_to_noise_of_the_latent():
    assert selection.quality_db(0.01) == pytest.approx(20) and math.isfinite(selection.quality_db(0.0))


@given(st.floats(0, 125))
def test_the_cheapest_plan_above_a_floor_reaches_it_and_nothing_cheaper_does(floor):
    good = [s for s in FRONT if selection.quality_db(s.error) >= floor]
    if not good:
        with pytest.raises(BadInput, match=r"no plan of the front reaches .* dB; the best has 120 dB"):
            selection.pick_cheapest(FRONT, floor)
        return
    found = selection.pick_cheapest(FRONT, floor)
    assert found in good
    assert not [s for s in good if s.plan.weight_bytes < found.plan.weight_bytes and s.plan.act_bits_mean <= found.plan.act_bits_mean]


def test_the_knee_is_on_the_front_and_within_the_budget():
    assert selection.pick_knee(FRONT) is FRONT[1]
    assert selection.pick_knee(FRONT, Budget(max_mean_act_bits=4.0)) is FRONT[0]
    with pytest.raises(BadInput, match="within the budget"):
        selection.pick_knee(FRONT, Budget(max_weight_bytes=50))


def test_any_real_front_can_be_picked_from():
    result = run(make_table(1), EntangledEvaluator(make_table(1)))
    worst = min(selection.quality_db(s.error) for s in result.front)
    assert selection.pick_cheapest(result.front, worst) in result.front and selection.pick_knee(result.front) in result.front
