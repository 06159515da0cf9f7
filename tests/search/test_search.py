"""The verb: budgets, resume, cancel, failure."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.toys import ACT_BITS, EntangledEvaluator, TableEvaluator, answer, make_costs, make_table, run
from workbench.options import MOST_FINALISTS, BadInput, Budget, Cancelled
from workbench.plans import mean_act_bits
from workbench.search.evaluation_cache import SearchFailed
from workbench.search.pareto import non_dominated, plan_point, select, within
from workbench.search.recorder import OWN, extended

COSTS = make_costs()
LEAST_BYTES, MOST_BYTES = COSTS.total_bytes([2] * 3), COSTS.total_bytes([16] * 3)


@given(seed=st.integers(0, 500), size=st.none() | st.integers(LEAST_BYTES, MOST_BYTES + 100),
       bits=st.none() | st.floats(3, 16), scoring=st.sampled_from(["adjoint", "raw"]), rollout=st.sampled_from(["quantized", "float"]))
@settings(max_examples=25, deadline=None)
def test_the_chosen_plan_is_within_any_feasible_budget_and_costs_recompute(seed, size, bits, scoring, rollout):
    if size is None and bits is None:
        return
    budget = Budget(max_weight_bytes=size, max_mean_act_bits=bits)
    result = run(make_table(seed), EntangledEvaluator(make_table(seed)), budget=budget, beam=2, configs=3, scoring=scoring, rollout=rollout)
    plan = result.chosen.plan
    assert within((COSTS.total_bytes(plan.weight_bits_L), mean_act_bits(plan.act_bits_TL)), budget)
    assert result.chosen == select(result.front, budget)
    for scored in result.front:
        assert scored.plan.weight_bytes == COSTS.total_bytes(scored.plan.weight_bits_L)
        evaluator = EntangledEvaluator(make_table(seed))
        assert scored.error == evaluator.error((scored.plan.weight_bits_L, scored.plan.act_bits_TL))


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_non_dominated_and_spans_the_budgets(seed):
    result = run(make_table(seed), EntangledEvaluator(make_table(seed)))
    points = [plan_point(scored) for scored in result.front]
    assert len(non_dominated(points)) == len(points)
    assert min(p[0] for p in points) == LEAST_BYTES and max(p[0] for p in points) == MOST_BYTES
    assert min(p[1] for p in points) == 3
    for size, bits in itertools.product((LEAST_BYTES, 1200, MOST_BYTES), (3, 4, 8, 16)):
        select(result.front, Budget(max_weight_bytes=size, max_mean_act_bits=bits))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_worse_than_uniform_bits_within_the_same_budget(seed):
    result = run(make_table(seed), EntangledEvaluator(make_table(seed)))
    uniform = [scored for scored in result.references if scored.origin == "uniform"]
    assert {scored.plan.act_bits_mean for scored in uniform} == set(ACT_BITS)
    for reference in uniform:
        size, bits, error = plan_point(reference)
        assert select(result.front, Budget(max_weight_bytes=size, max_mean_act_bits=bits)).error <= error


@pytest.mark.parametrize("kind, rollout", [(TableEvaluator, "quantized"), (EntangledEvaluator, "quantized"), (EntangledEvaluator, "float")])
@pytest.mark.parametrize("seed", range(4))
def test_a_wider_beam_never_chooses_worse(kind, rollout, seed):
    errors = [run(make_table(seed), kind(make_table(seed)), beam=beam, rollout=rollout, refine=0).chosen.error
              for beam in (1, 2, 3, 5, 8, 13)]
    assert errors == sorted(errors, reverse=True)


def test_finalists_are_within_budget_and_begin_with_the_best_of_each_origin():
    table, budget = make_table(3), Budget(max_mean_act_bits=4.0)
    result = run(table, EntangledEvaluator(table), budget=budget, refine=6)
    fitting = [scored for scored in result.finalists if scored.plan.act_bits_mean <= 4.0]
    assert fitting == list(result.finalists) and len(fitting) == len({scored.plan.plan_id for scored in fitting}) <= MOST_FINALISTS
    best = {}
    for scored in sorted(fitting, key=lambda scored: scored.error):
        best.setdefault(scored.origin, scored)
    own = [best[origin] for origin in OWN if origin in best]
    assert len(own) > 1 and list(result.finalists[:len(own)]) == sorted(own, key=lambda scored: scored.error)
    rest = [scored.error for scored in result.finalists[len(own):]]
    assert rest == sorted(rest) and result.chosen.error == min(scored.error for scored in fitting)


def test_the_prediction_is_the_sum_of_the_table():
    table = make_table(0)
    result = run(table, EntangledEvaluator(table))
    for scored in result.front:
        truth = TableEvaluator(table).error((scored.plan.weight_bits_L, scored.plan.act_bits_TL))
        assert scored.plan.predicted_error == pytest.approx(truth, rel=1e-5)


def test_it_repeats_itself_exactly():
    first, second = (run(make_table(2), EntangledEvaluator(make_table(2))) for _ in range(2))
    assert answer(first) == answer(second)


def test_ties_everywhere_give_the_same_plan_twice_and_the_cheapest():
    table = make_table(0)
    flat = type(table)(act_bits_C=table.act_bits_C, error_TLC=table.error_TLC * 0, weight_bits_C=table.weight_bits_C,
                       weight_error_LC=table.weight_error_LC * 0)
    chosen = run(flat, TableEvaluator(flat)).chosen
    assert (chosen.plan.weight_bytes, chosen.plan.act_bits_mean, chosen.error) == (LEAST_BYTES, 3, 0)


class Stop:
    """A listener that cancels after some reports, and what the search had handed out by then."""

    def __init__(self, after):
        self.left, self.last = after, None

    def on_progress(self, progress):
        self.left -= 1
        if self.left < 0:
            raise Cancelled

    def checkpoint(self, saved, blobs):
        self.last = json.loads(json.dumps(saved)), dict(blobs)


@pytest.mark.parametrize("scoring, rollout", [("adjoint", "quantized"), ("raw", "quantized"), ("adjoint", "float")])
def test_resumed_from_any_checkpoint_it_ends_as_if_never_interrupted(scoring, rollout):
    table = make_table(5)
    options = {"beam": 3, "configs": 3, "scoring": scoring, "rollout": rollout}
    checkpoints = []
    whole = run(table, EntangledEvaluator(table), checkpoint=lambda saved, blobs: checkpoints.append((json.dumps(saved), blobs)), **options)
    assert len(checkpoints) >= 4 + 5
    for saved, blobs in [*checkpoints[::5], checkpoints[-1]]:
        evaluator = EntangledEvaluator(table)
        assert answer(run(table, evaluator, resume=(json.loads(saved), blobs), **options)) == answer(whole)
    assert evaluator.calls == 0  # the last checkpoint has everything


def test_cancelled_anywhere_it_resumes_exactly_and_repeats_no_step():
    table = make_table(6)
    counted = EntangledEvaluator(table)
    whole = run(table, counted, beam=3, configs=3)
    again_anyway = counted.calls - whole.evaluations  # prefixes whose state was let go after a reference was measured
    assert again_anyway <= len(ACT_BITS) * table.error_TLC.shape[0]
    for after in range(0, whole.evaluations, 17):
        stop, evaluator = Stop(after), EntangledEvaluator(table)
        with pytest.raises(Cancelled):
            run(table, evaluator, beam=3, configs=3, on_progress=stop.on_progress, checkpoint=stop.checkpoint)
        assert evaluator.calls <= after + again_anyway  # nothing runs after the cancel
        again = EntangledEvaluator(table)
        assert answer(run(table, again, beam=3, configs=3, resume=stop.last)) == answer(whole)
        assert evaluator.calls + again.calls <= counted.calls + again_anyway


def test_cancelled_again_and_again_it_still_gets_there():
    table = make_table(6)
    whole, calls, last = run(table, EntangledEvaluator(table), beam=3, configs=3), 0, None
    for round_ in range(1, 100):
        stop, evaluator = Stop(round_ * 20), EntangledEvaluator(table)
        stop.last = last
        try:
            result = run(table, evaluator, beam=3, configs=3, on_progress=stop.on_progress, checkpoint=stop.checkpoint, resume=last)
        except Cancelled:
            last, calls = stop.last, calls + evaluator.calls
            continue
        break
    assert round_ > 4 and answer(result) == answer(whole)
    assert calls + evaluator.calls < 1.3 * whole.evaluations


def test_lost_states_are_computed_again():
    table, stop = make_table(7), Stop(60)
    whole = run(table, EntangledEvaluator(table), beam=3, configs=3)
    with pytest.raises(Cancelled):
        run(table, EntangledEvaluator(table), beam=3, configs=3, on_progress=stop.on_progress, checkpoint=stop.checkpoint)
    assert answer(run(table, EntangledEvaluator(table), beam=3, configs=3, resume=(stop.last[0], {}))) == answer(whole)


def test_a_checkpoint_of_another_search_is_refused():
    table, stop = make_table(7), Stop(30)
    with pytest.raises(Cancelled):
        run(table, EntangledEvaluator(table), on_progress=stop.on_progress, checkpoint=stop.checkpoint)
    for other, config in ((make_table(8), {}), (table, {"scoring": "raw"}), (table, {"samples": 2})):
        with pytest.raises(BadInput, match="another model, profile or scoring"):
            run(other, EntangledEvaluator(table), resume=stop.last, **config)


def test_what_one_search_has_measured_serves_one_with_another_budget_and_beam():
    table, stop = make_table(7), Stop(10**9)
    run(table, EntangledEvaluator(table), checkpoint=stop.checkpoint)
    other = {"budget": Budget(max_weight_bytes=1300, max_mean_act_bits=4.5), "beam": 5}
    counted, again = EntangledEvaluator(table), EntangledEvaluator(table)
    assert answer(run(table, again, resume=stop.last, **other)) == answer(run(table, counted, **other))
    assert again.calls < counted.calls


def test_scoring_at_the_float_latents_measures_each_row_once_and_only_survivors_to_the_end():
    table = make_table(3, steps=6)
    evaluator = EntangledEvaluator(table)
    result = run(table, evaluator, rollout="float", beam=6, refine=0, rivals="uniform")
    assert evaluator.calls <= result.evaluations + 6  # the start of a plan that follows a reference
    assert result.evaluations < run(table, evaluator, beam=6, refine=0, rivals="uniform").evaluations


@pytest.mark.parametrize("rollout", ["quantized", "float"])
def test_progress_is_monotonic_and_its_total_is_known_from_the_start(rollout):
    reports = []
    result = run(make_table(0), TableEvaluator(make_table(0)), on_progress=reports.append, rollout=rollout)
    assert len({report.total for report in reports}) == 1
    done = [report.done for report in reports]
    assert done == sorted(done) and done[-1] == reports[0].total
    events = [report.detail for report in reports if report.detail is not None]
    assert [dataclasses.replace(event, plans=()) for event in events] == list(result.events)
    assert result.evaluations <= reports[0].total


def test_what_was_found_so_far_can_be_chosen_from_and_grows_into_the_result():
    reports, found = [], None
    result = run(make_table(3), EntangledEvaluator(make_table(3)), on_progress=reports.append)
    for event in (report.detail for report in reports if report.detail is not None):
        found = extended(found, event.plans)
        assert tuple(plan_point(scored) for scored in found.front) == event.front
    assert (found.front, found.references) == (result.front, result.references) and result.references
    assert not any(event.plans for event in result.events), "a result holds each plan once"


def test_events_show_the_beam_and_the_growing_front():
    table = make_table(0)
    result = run(table, TableEvaluator(table))
    beam_steps = [event for event in result.events if event.message.startswith("step ")]
    assert [event.step for event in beam_steps] == [1, 2, 3, 4]
    assert all(set(event.survivors) <= set(event.candidates) for event in beam_steps)
    assert set(result.events[-1].front) == {plan_point(scored) for scored in result.front}


@pytest.mark.parametrize("budget, message", [
    (Budget(max_weight_bytes=LEAST_BYTES - 1), f"max_weight_bytes is {LEAST_BYTES - 1}; the smallest feasible is {LEAST_BYTES}"),
    (Budget(max_weight_bytes=2000, max_mean_act_bits=3.5), "max_mean_act_bits is 3.5; the smallest feasible is 4")])
def test_an_infeasible_budget_names_the_limit_and_what_is_feasible(budget, message):
    table = make_table(0, act_bits=(4, 8, 16))
    evaluator = TableEvaluator(table)
    with pytest.raises(BadInput, match=message):
        run(table, evaluator, budget=budget)
    assert evaluator.calls == 0


@given(seed=st.integers(0, 100))
@settings(max_examples=5, deadline=None)
def test_the_very_smallest_budget_is_feasible(seed):
    table = make_table(seed)
    plan = run(table, TableEvaluator(table), budget=Budget(max_weight_bytes=LEAST_BYTES, max_mean_act_bits=3)).chosen.plan
    assert set(plan.weight_bits_L) == {2} and plan.act_bits_mean == 3


class Fragile(TableEvaluator):
    """Fails, or answers NaN, from some call on."""

    def __init__(self, table, calls, poison):
        super().__init__(table)
        self.left, self.poison = calls, poison

    def extend(self, state, step, act_bits_L):
        self.left -= 1
        if self.left < 0 and self.poison is RuntimeError:
            raise RuntimeError("the device\nhas gone")
        return super().extend(state, step, act_bits_L)

    def score(self, state, step):
        return math.nan if self.left < 0 else super().score(state, step)

    def error(self, state):
        return math.nan if self.left < 0 else super().error(state)


@pytest.mark.parametrize("calls", [0, 3, 30, 60])
def test_a_failing_model_ends_in_one_line_and_loses_nothing(calls):
    table, stop = make_table(9), Stop(10**9)
    with pytest.raises(SearchFailed, match=r"^the model failed at step \d of a path: the device has gone; \d+ measured plans are kept$"):
        run(table, Fragile(table, calls, RuntimeError), checkpoint=stop.checkpoint)
    counted, again = TableEvaluator(table), TableEvaluator(table)
    whole = run(table, counted)
    assert answer(run(table, again, resume=stop.last)) == answer(whole)
    assert again.calls <= counted.calls - calls + 3


def test_nothing_but_nan_is_an_error_not_a_plan():
    table = make_table(9)
    with pytest.raises(SearchFailed, match="even with float activations"):
        run(table, Fragile(table, 0, math.nan))


@pytest.mark.parametrize("before_the_end", [10, 40, 60])
def test_nan_later_on_keeps_what_was_found(before_the_end):
    table = make_table(9)
    counted, only = TableEvaluator(table), {"refine": 0, "rivals": "uniform"}
    whole = run(table, counted, **only)
    late = run(table, Fragile(table, counted.calls - before_the_end, math.nan), **only)
    assert late.chosen.error >= whole.chosen.error and (late.chosen == whole.chosen) == (before_the_end == 10)
    assert all(math.isfinite(scored.error) for scored in (*late.front, *late.references))
