"""DVD-Quant's rival: activation bits switched while the model runs, from 4 to 8 when its features have changed enough.

No budget is set beforehand: the switch decides by what it sees, and the mean of its bits is counted after the fact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workbench.search.evaluation_cache import EvaluationCache, Path, Row
from workbench.search.rivals_steps import ONLINE_HIGH, ONLINE_LOW, online_bits

LEAST_SHARE, MOST_SHARE = 0.2, 0.8  # of the steps that the threshold aims to run at high bits


def online_rollout(cache: EvaluationCache, weights: Row, rows_of: Callable[[int], Sequence[Row]], steps: int, target_bits: float) -> Path:
    """The path of the online switch; `rows_of(bits)` is the plan that uses one width everywhere. Its threshold is set on the float
    trajectory, so that the switch would fire as often as `target_bits` asks for."""
    share = min(MOST_SHARE, max(LEAST_SHARE, (target_bits - ONLINE_LOW) / (ONLINE_HIGH - ONLINE_LOW)))
    delta = sum(cache.change_at_float(step) for step in range(steps - 1)) / max(1.0, share * steps)
    path, bits, moved = cache.root(weights), ONLINE_HIGH, 0.0  # nothing is known before the first step: it runs at high bits
    for step in range(steps):
        path = cache.extend(path, rows_of(bits)[step])
        bits, moved = online_bits(cache.change(path), moved, delta)
    return path
