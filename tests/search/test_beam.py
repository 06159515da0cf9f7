"""The beam against exhaustive search, and what its width promises."""

import math
from itertools import pairwise

import pytest

from tests.search.toys import EntangledEvaluator, TableEvaluator, all_rows, make_table
from workbench.search.beam import beam_search
from workbench.search.evaluation_cache import EvaluationCache, SearchFailed
from workbench.search.pareto import non_dominated


def beam(evaluator, act_bits, *, width, steps, layers, seeds=(), rows=None, summed=False, on_step=lambda step: None):
    """All final (bits, error) points of a beam that may use every row, or `rows`."""
    cache = EvaluationCache(evaluator, summed=summed, on_extend=lambda: None)
    offered = rows or all_rows(act_bits, layers)
    ends = beam_search(cache.root((8,) * layers), steps=steps, width=width, configurations=lambda path: offered, seeds=seeds,
                       extend=cache.extend, on_step=on_step).candidates
    return cache, ends, [(path.bits, cache.error(path)) for path in ends]


def exhaustive_front(evaluator, act_bits, steps, layers):
    evaluator.use_weights((8,) * layers)
    plans = [()]
    for _ in range(steps):
        plans = [(*plan, row) for plan in plans for row in all_rows(act_bits, layers)]
    points = [(float(sum(map(sum, plan))), evaluator.error((evaluator.weights, plan))) for plan in plans]
    return [points[i] for i in non_dominated(points)]


@pytest.mark.parametrize("kind", [TableEvaluator, EntangledEvaluator])
@pytest.mark.parametrize("seed", range(5))
def test_as_wide_as_the_state_space_it_is_exhaustive_search(kind, seed):
    evaluator = kind(make_table(seed, steps=2, layers=3, act_bits=(3, 16)))
    _, _, points = beam(evaluator, (3, 16), width=8, steps=2, layers=3)
    assert [points[i] for i in non_dominated(points)] == exhaustive_front(evaluator, (3, 16), steps=2, layers=3)


@pytest.mark.parametrize("kind", [TableEvaluator, EntangledEvaluator])
@pytest.mark.parametrize("seed", range(6))
def test_wider_contains_narrower_and_so_is_never_worse(kind, seed):
    evaluator = kind(make_table(seed, steps=4, layers=2))
    rows = [(3, 3), (3, 8), (4, 4), (8, 4), (16, 16)]
    seeds = [[(4, 3)] * 4]
    paths = [set(beam(evaluator, None, width=width, steps=4, layers=2, rows=rows, seeds=seeds)[1]) for width in range(1, 12)]
    for narrow, wide in pairwise(paths):
        assert narrow <= wide
    assert len(paths[-1]) > len(paths[0])


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_beam_is_never_worse_than_its_seeds(seed):
    evaluator = EntangledEvaluator(make_table(seed))
    seeds = [[(4, 3, 8)] * 4, [(8, 3, 3), (3, 3, 3), (4, 4, 4), (3, 16, 3)]]
    cache, ends, points = beam(evaluator, None, width=1, steps=4, layers=3, rows=[(3, 3, 3), (16, 16, 16)], seeds=seeds)
    rolled = [cache.rollout((8, 8, 8), plan) for plan in seeds]
    assert set(rolled) <= set(ends)
    for path in rolled:
        assert min(error for bits, error in points if bits <= path.bits) <= cache.error(path)


def test_survivors_reach_both_ends_of_the_front():
    steps = []
    rows = [(3,) * 3, (4,) * 3, (8,) * 3, (16,) * 3]
    beam(TableEvaluator(make_table(1)), None, width=4, steps=4, layers=3, rows=rows, on_step=steps.append)
    for step in steps[1:]:
        bits = [path.bits / (3 * path.step) for path in step.survivors]
        assert min(bits) == 3 and max(bits) == 16 and len(set(bits)) == 4


def test_identical_paths_are_run_once_and_share_their_prefix():
    evaluator = TableEvaluator(make_table(0))
    seeds = [[(3, 3, 3)] * 4, [(3, 3, 3)] * 3 + [(4, 4, 4)]]
    cache, _, _ = beam(evaluator, None, width=1, steps=4, layers=3, rows=[(3, 3, 3)], seeds=seeds)
    assert evaluator.calls == cache.evaluations == 5


def test_raw_scores_add_up_and_adjoint_scores_do_not():
    for summed, factor in ((True, 4), (False, 1)):
        evaluator = TableEvaluator(make_table(0))
        evaluator.score = lambda state, step: 1.0
        _, ends, _ = beam(evaluator, None, width=2, steps=4, layers=3, rows=[(3, 3, 3), (4, 4, 4)], summed=summed)
        assert {path.score for path in ends} == {factor}


class Poisoned(TableEvaluator):
    """NaN on every path that ever uses 3 bits in layer 0."""

    def score(self, state, step):
        return math.nan if any(row[0] == 3 for row in state[1]) else super().score(state, step)


def test_a_path_that_scores_nan_is_never_extended():
    cache, ends, _ = beam(Poisoned(make_table(0)), None, width=8, steps=4, layers=3, rows=[(3, 3, 3), (4, 4, 4)])
    extended = {path.rows[:-1] for path in ends}
    assert all(cache.rows[row][0] != 3 for rows in extended for row in rows)


def test_nothing_but_nan_ends_with_one_clear_line():
    with pytest.raises(SearchFailed, match=r"^every candidate of step 1 scored NaN or infinity; [^\n]*$"):
        beam(Poisoned(make_table(0)), None, width=8, steps=4, layers=3, rows=[(3, 4, 4), (3, 16, 16)])
