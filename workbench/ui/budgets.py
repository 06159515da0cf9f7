"""The axes along which a plan can be limited: one slider and one panel of the front for each that the cost table knows about.

A further limit of `Budget` needs one more line in AXES; the sliders, the front, its table and the checks follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.options import BadInput, Budget
from workbench.ui import inputs
from workbench.ui.tables import MB


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`field` of Budget; a plan's value and a slider's differ by `scale`. span(found) gives the slider's ends, or None where this
    machine's cost table does not know the axis. `column` is the axis's place in the points of a running search."""

    field: str
    label: str
    brief: str  # for the axis of a plot
    short: str
    unit: str
    scale: float
    step: float
    of_plan: Callable[[Any], float | None]
    span: Callable[[Any], tuple[float, float] | None]
    column: int | None = None

    def shown(self, plan) -> float | None:
        """The plan's value in the slider's unit."""
        value = self.of_plan(plan)
        return None if value is None else value / self.scale


def memory_range(found) -> tuple[float, float]:
    """Smallest and largest megabytes that a plan can take."""
    costs = found.costs
    return (
        (costs.fixed_bytes + int(costs.weight_bytes_LC.min(1).values.sum())) / MB,
        (costs.fixed_bytes + int(costs.weight_bytes_LC.max(1).values.sum())) / MB,
    )


def _latency_range(found) -> tuple[float, float] | None:
    """Milliseconds of an image, where the cost table has times."""
    if found.costs.latency is None:
        return None
    low_ms, high_ms = found.costs.latency.range_ms(found.sensitivity.steps)
    return (low_ms, high_ms) if high_ms > low_ms else None


AXES = (
    Axis(
        field="max_weight_bytes", label="transformer in memory", brief="memory, MB", short="MB", unit="MB", scale=MB, step=0.01,
        of_plan=lambda plan: plan.weight_bytes, span=memory_range, column=0,
    ),
    Axis(
        field="max_latency_ms", label="time of an image's steps", brief="time, ms", short="ms", unit="ms", scale=1, step=0.1,
        of_plan=lambda plan: plan.latency_ms, span=_latency_range,
    ),
    Axis(
        field="max_mean_act_bits", label="mean activation bits", brief="mean act. bits", short="bits", unit="bits", scale=1, step=0.05,
        of_plan=lambda plan: plan.act_bits_mean, span=lambda found: inputs.bounds(Budget, "max_mean_act_bits"), column=1,
    ),
)


def offered(found) -> list[Axis]:
    """The axes that a profile's cost table knows; before a profile, those that every table knows."""
    return [axis for axis in AXES if (axis.column is not None if found is None else axis.span(found) is not None)]


def start(found, budget: Budget) -> dict[str, float]:
    """Where the sliders stand after a profile: at `budget`, and at the largest value of an axis that it does not limit."""
    limits = {axis: getattr(budget, axis.field) for axis in offered(found)}
    return {axis.field: round_up(axis.span(found)[1] if limit is None else limit / axis.scale, axis.step) for axis, limit in limits.items()}


def read(found, values: dict[str, float]) -> Budget:
    """A budget from slider values by field; raises BadInput in the sliders' units."""
    limits = {}
    for axis in offered(found):
        value = values.get(axis.field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise BadInput(f"the budget in {axis.unit} must be a number")
        least, most = inputs.bounds(Budget, axis.field)
        if value <= 0 or value < least or (most is not None and value > most):
            right = "greater than 0" if most is None else f"from {least:g} to {most:g}"
            raise BadInput(f"the budget of {value:g} {axis.unit} must be {right}")
        limits[axis.field] = round(value * axis.scale) if axis.scale != 1 else value
    return Budget.parse(limits, "budget")


def require_feasible(found, values: dict[str, float]) -> None:
    """Raises BadInput when a limit is below what the smallest plan takes."""
    for axis in offered(found):
        low, _ = axis.span(found)
        if values[axis.field] < low - axis.step / 2:
            raise BadInput(f"the budget of {values[axis.field]:.2f} {axis.unit} is below the smallest feasible, {low:.2f} {axis.unit}")


def within(values: dict[str, float | None], limits: dict[str, float]) -> bool:
    """Does a plan (values by field, in slider units) keep every limit? Rounding of the sliders is forgiven."""
    return all(values.get(field) is None or values[field] <= limit + 1e-9 for field, limit in limits.items())


def round_up(value: float, step: float) -> float:
    """The least multiple of a slider's step that is not below a value."""
    return round(math.ceil(value / step - 1e-6) * step, 6)


def values_of(plan) -> dict[str, float | None]:
    """A plan on every axis, in slider units."""
    return {axis.field: axis.shown(plan) for axis in AXES}
