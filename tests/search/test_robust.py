"""A search that is killed, cancelled or given a broken model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.search.test_search import Stop
from tests.search.toys import EntangledEvaluator, TableEvaluator, answer, make_table, run
from workbench.options import BadInput, Budget, Cancelled
from workbench.search.evaluation_cache import SearchFailed
from workbench.search.pareto import plan_point, within


def test_killed_at_any_moment_it_resumes_to_the_same_result(tmp_path):
    script = Path(__file__).with_name("killed.py")
    made = subprocess.run([sys.executable, script, tmp_path, "0"], capture_output=True, text=True, check=True)
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["status"] == 0 and found["same"]
    assert found["killed"] >= 3  # later rounds may reach the end before they are killed


def test_a_cancel_is_obeyed_before_the_next_step_of_the_model():
    table = make_table(3)
    total = run(table, TableEvaluator(table)).evaluations
    for after in range(1, total, 29):
        evaluator, calls_at_cancel = TableEvaluator(table), []

        def cancel(progress, after=after, evaluator=evaluator, calls=calls_at_cancel):
            if evaluator.calls >= after:
                calls.append(evaluator.calls)
                raise Cancelled
        with pytest.raises(Cancelled):
            run(table, evaluator, on_progress=cancel)
        assert evaluator.calls == calls_at_cancel[0] <= after + table.error_TLC.shape[0]  # prefixes are rerun without a report


def test_stopping_keeps_the_best_so_far():
    table = make_table(3)
    whole = run(table, EntangledEvaluator(table))
    kept = []
    for after in (5, 30, 60, 90):
        with pytest.raises(Cancelled) as stopped:
            run(table, EntangledEvaluator(table), on_progress=Stop(after).on_progress)
        kept.append(stopped.value.so_far)
    assert kept[0] is None and all(result is not None for result in kept[1:])
    errors = [result.chosen.error for result in kept[1:]]
    assert errors == sorted(errors, reverse=True) and errors[-1] >= whole.chosen.error
    assert all(within(plan_point(result.chosen), Budget(max_weight_bytes=1300, max_mean_act_bits=5.0)) for result in kept[1:])


class Poisoned(TableEvaluator):
    """From some call on it answers with a poison: a number that is none, or an exception."""

    def __init__(self, table, after, poison):
        super().__init__(table)
        self.after, self.poison = after, poison

    def extend(self, state, step, act_bits_L):
        if self.calls >= self.after and isinstance(self.poison, Exception):
            raise self.poison
        return super().extend(state, step, act_bits_L)

    def _spoilt(self, value):
        return self.poison if self.calls > self.after and isinstance(self.poison, float) else value

    def score(self, state, step):
        return self._spoilt(super().score(state, step))

    def error(self, state):
        return self._spoilt(super().error(state))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, RuntimeError("out of memory"), ValueError(""),
                                    MemoryError("12 GiB\nmissing")])
@pytest.mark.parametrize("after", [0, 7, 45, 90])
def test_a_poisoned_model_ends_in_one_clear_line_and_keeps_what_it_had(poison, after):
    table, stop = make_table(9), Stop(10**9)
    try:
        result = run(table, Poisoned(table, after, poison), checkpoint=stop.checkpoint)
    except SearchFailed as error:
        assert "\n" not in str(error) and len(str(error)) > 30
        assert isinstance(error, BadInput)  # shown as a line, not as a traceback
        result = error.so_far
    if result is not None:
        assert all(math.isfinite(scored.error) for scored in (*result.front, *result.references, result.chosen))
    assert after < 45 or result is not None
    if stop.last is not None and isinstance(poison, Exception):  # once the machine is well again, nothing is measured twice
        well, counted = TableEvaluator(table), TableEvaluator(table)
        assert answer(run(table, well, resume=stop.last)) == answer(run(table, counted))
        assert well.calls <= counted.calls - after + 2 * table.error_TLC.shape[0]


def test_the_same_seed_repeats_and_another_refines_otherwise():
    table = make_table(2, steps=6)
    first, again, other = (run(table, EntangledEvaluator(table), seed=seed, refine=8) for seed in (1, 1, 2))
    assert answer(first) == answer(again)
    assert {s.plan.plan_id for s in first.front} != {s.plan.plan_id for s in other.front} or first.events != other.events
