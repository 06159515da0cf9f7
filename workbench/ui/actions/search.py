"""Screen 3: search, choose from the front, paint a plan by hand, hold two plans against each other."""

from __future__ import annotations

import math

from workbench.options import ACT_BITS, BadInput, SearchConfig
from workbench.ui import budgets, inputs, widget
from workbench.ui.actions.common import (
    bundle_of,
    choose,
    chosen_of,
    need,
    noise_levels,
    profile_of,
    run_of,
    same_noise,
    select_cell,
)
from workbench.ui.session import Drafted, Session
from workbench.zerogpu import stages

SEARCH_INPUTS = ("beam", "configs", "samples", "scoring", "rollout", "finalists")
KEPT_EDITS = 100
MOST_DB = 120  # identical latents in float32 are about there


def search(session: Session, *given) -> None:
    """given: one value per slider of `budgets.AXES`, then the settings."""
    bundle, found = bundle_of(session), profile_of(session)
    limits_, settings = _slider_values(given[: len(budgets.AXES)]), given[len(budgets.AXES) :]
    budget = budgets.read(found, limits_)
    config = inputs.read(SearchConfig, SEARCH_INPUTS, settings)
    budgets.require_feasible(found, limits_)

    def work(on_progress):
        result = stages().search(bundle, found, budget, config, run=run_of(session), on_progress=on_progress)
        session.set(result=result, so_far=None, events=result.events, replay=None)
        choose(session, result.chosen)

    session.require_idle()
    undo = session.kept("events", "so_far", "result") if session.result is not None else {}
    session.set(events=(), so_far=None, result=None, budget=_offered(found, limits_))
    session.submit("search", "search", work, undo)


def _slider_values(values) -> dict:
    return {axis.field: value for axis, value in zip(budgets.AXES, values)}


def _offered(found, values: dict) -> dict:
    return {axis.field: values[axis.field] for axis in budgets.offered(found)}


def move_budget(session: Session, *values) -> None:
    """A slider was moved: draw its line and pick again from the finished front, at once."""
    limits_ = _slider_values(values)
    budget = budgets.read(session.profile, limits_)
    session.set(budget=_offered(session.profile, limits_))
    if session.result is not None:
        choose(session, _select(session.result.front, budget, session.budget))


def _select(front, budget, limits_: dict):
    """The plan of least error within budget; if none fits, say what would, in the units of the sliders."""
    from workbench.search import pareto

    if not any(pareto.within(pareto.plan_point(scored), budget) for scored in front):
        axes = [axis for axis in budgets.AXES if axis.field in limits_]
        asked = " and ".join(f"{limits_[axis.field]:.2f} {axis.unit}" for axis in axes)
        least = ", ".join(f"{min(axis.shown(scored.plan) for scored in front):.2f} {axis.unit}" for axis in axes)
        raise BadInput(f"no plan of the front is within {asked}; the smallest takes {least} (not all of it in one plan)")
    return pareto.select(front, budget)


def pick_knee(session: Session) -> None:
    """The plan where spending more begins to buy little."""
    from workbench.search import selection

    _choose_freely(session, selection.pick_knee(need(session.found, "search first: the knee is a point of the front").front))


def pick_floor(session: Session, floor_db) -> None:
    """The cheapest plan whose latent signal-to-error ratio reaches `floor_db`."""
    from workbench.search import selection

    front = need(session.found, "search first: the floor picks a point of the front").front
    session.set(floor_db=None)
    if not isinstance(floor_db, int | float) or not 0 <= floor_db <= MOST_DB:
        raise BadInput(f"the quality floor must be a number from 0 to {MOST_DB} dB")
    reached = selection.pick_cheapest(front, floor_db)
    session.set(floor_db=float(floor_db))
    _choose_freely(session, reached)


def floor_error(floor_db: float) -> float:
    """The normalised error at a signal-to-error ratio."""
    return 10 ** (-floor_db / 10)


def _choose_freely(session: Session, scored) -> None:
    """Choose a plan whatever the sliders say, and let them follow to where it just fits."""
    values = budgets.values_of(scored.plan)
    fitting = {
        axis.field: budgets.round_up(values[axis.field], axis.step)
        for axis in budgets.offered(session.profile)
        if values[axis.field] is not None
    }
    session.set(budget={**session.budget, **fitting}, sliders_moved=object())
    choose(session, scored)


def click_point(session: Session, payload) -> None:
    """A point of the front or a row of its table."""
    found, plan_id = session.found, widget.clicked_plan(payload)
    if found is not None and plan_id is not None:
        plans = {scored.plan.plan_id: scored for scored in (*found.references, *found.front)}
        choose(session, need(plans.get(plan_id), "that plan has just been replaced by a better one; choose another"))


def replay(session: Session, step) -> None:
    """Look at an earlier step of the beam; None, or what is no step, follows the search."""
    session.set(replay=int(step) if isinstance(step, int | float) and math.isfinite(step) else None)


# By hand


def click_bits(session: Session, payload) -> None:
    """A cell of the bit map selects its layer and step everywhere."""
    if session.chosen is None or session.bundle is None or session.brush is not None:
        return
    plan = session.chosen.plan
    cell = widget.clicked_cell(payload, len(plan.layer_names), len(plan.sigma_T))
    if cell is not None:
        select_cell(session, cell[0], same_noise(cell[1], plan.sigma_T, noise_levels(session)))


def cell_of_plan(session: Session) -> tuple[int | None, int | None]:
    """The selected layer, and the chosen plan's step nearest in noise to the selected one."""
    layer, step = session.cell
    return layer, same_noise(step, noise_levels(session), session.chosen.plan.sigma_T if session.chosen else ())


def set_brush(session: Session, bits) -> None:
    """The width to paint with; anything else selects again."""
    session.set(brush=bits if bits in ACT_BITS else None)


def paint(session: Session, payload) -> None:
    """A rectangle of the bit map was painted: a new plan with its cost and predicted error, at once."""
    scored, found, bundle = chosen_of(session), session.profile, bundle_of(session)
    plan, bits = scored.plan, session.brush
    area = widget.painted_cells(payload, len(plan.layer_names), len(plan.sigma_T))
    if area is None or bits is None:
        return
    from workbench.plans import BitChoice

    need(found, "profile the model first: the cost of a painted plan comes from its tables")
    part, rows, columns = area
    act_bits_TL = [list(row) for row in plan.act_bits_TL]
    weight_choice_L = list(plan.weight_choice_L)
    if part == "weights":
        if bits not in found.table.weight_bits_C:
            raise BadInput(f"weights were not solved at {bits} bits; the widths are {', '.join(map(str, found.table.weight_bits_C))}")
        for layer in rows:
            weight_choice_L[layer] = BitChoice.of(bits, plan.quant, bundle.layers[layer])
    else:
        for step in columns:
            for layer in rows:
                if act_bits_TL[step][layer] is not None:
                    act_bits_TL[step][layer] = bits
    painted = draft(bundle, found, plan, weight_choice_L, act_bits_TL)
    if painted.plan.plan_id != plan.plan_id:
        choose(session, painted, (*session.edits, scored)[-KEPT_EDITS:])


def undo(session: Session) -> None:
    """The plan before the last brush stroke."""
    if not session.edits:
        raise BadInput("nothing has been painted since the last undo")
    *rest, before = session.edits
    choose(session, before, tuple(rest))


def draft(bundle, found, plan, weight_choice_L, act_bits_TL) -> Drafted:
    """A plan made by hand, its costs read from the profile's tables. Its predicted error is that of `plan`, which a search may have
    predicted by another table, times the ratio of both sums of the profile's table; without one, the sum."""
    from workbench.plans import make_plan

    before = predicted_error(found.table, plan.weight_bits_L, plan.act_bits_TL, plan.sigma_T)
    after = predicted_error(found.table, [choice.weight_bits for choice in weight_choice_L], act_bits_TL, plan.sigma_T)
    scale = plan.predicted_error / before if before and plan.predicted_error is not None else 1.0
    made = make_plan(
        layers=bundle.layers,
        sigma_T=plan.sigma_T,
        weight_choice_L=weight_choice_L,
        act_bits_TL=act_bits_TL,
        costs=found.costs,
        quant=plan.quant,
        model_hash=plan.model_hash,
        method="painted",
        predicted_error=None if after is None else scale * after,
    )
    return Drafted(made, origin="painted")


def predicted_error(table, weight_bits_L, act_bits_TL, sigma_T) -> float | None:
    """The table's sum over weights and over steps and layers; None where the plan has other steps than the table."""
    if len(table.error_TLC) != len(sigma_T):
        return None
    acts = sum(
        float(table.error_TLC[t, i, table.act_bits_C.index(bits)])
        for t, row in enumerate(act_bits_TL)
        for i, bits in enumerate(row)
        if bits is not None
    )
    return acts + sum(float(table.weight_error_LC[i, table.weight_bits_C.index(bits)]) for i, bits in enumerate(weight_bits_L))


# Two plans


def pin(session: Session) -> None:
    """Keep the chosen plan as A, to hold the next one against it."""
    session.set(pinned=chosen_of(session))


def swap(session: Session) -> None:
    """A becomes the chosen plan and the other way round."""
    first, second = need(session.pinned, "pin a plan as A first"), chosen_of(session)
    session.set(pinned=second)
    choose(session, first)
