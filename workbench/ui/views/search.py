"""Screen 3: the front, the beam, the bits of a plan and what it costs. Letters: T steps, L layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.ui import budgets, figures
from workbench.ui.figures import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, axis, log_axis, rounded
from workbench.ui.tables import pick_table, seconds, table
from workbench.ui.views.plans import ERROR, origin_name, predicted_ratio

PAINTED, HELD_OUT = "painted", "held out"  # points whose error is modelled, or measured on other prompts than the front's
FADED, TRAIL = 0.4, 8  # opacity of plans beyond the budget; steps of the beam that fade behind the present one
# The parts of the search: mark, colour and short name of the plans that each brought to the front.
PARTS = {"lagrangian": ("diamond", "#74aee6", "Lagrangian"), "beam": ("circle", BLUE, "beam"),
         "refined": ("triangle-up", "#6a5fe0", "refinement")}
FRONT = ("square", "#1f9fb0", "others on the front")  # of a rival's origin, or no longer on it
PREDICTIONS = {
    "planning_table": "what the search plans by",
    "additive": "additive table",
    "adjoint directional": "adjoint table, by each linear's own error",
    "adjoint white": "adjoint table, as if errors were white noise",
    "local directional": "local table, by each linear's own error",
    "local white": "local table, as if errors were white noise",
}
# A rival keeps its mark and colour whatever else is shown.
RIVALS = {
    "uniform": ("diamond-open", ORANGE),
    "greedy": ("square-open", VIOLET),
    "milp": ("triangle-up-open", "#b5651d"),
    "layers": ("cross-open", "#7a8b2e"),
    "dp": ("star-open", RED),
    "bisection": ("hexagon-open", "#0f8b8d"),
    "ends": ("triangle-down-open", "#b04a8f"),
    "online": ("pentagon-open", "#6b7280"),
}
OTHER = ("hourglass-open", "#6b7280")
RING = ("chosen", "circle-open")  # around the chosen plan, and where its point is of a kind of its own
RINGS = {PAINTED: ("painted, error modelled", "circle-open-dot"), HELD_OUT: ("chosen, measured on held-out prompts", "circle-x-open")}
TABLE_ROWS = 40
ENVELOPE = "least error"  # its line explains itself and has no entry in the legend
GAP, TALL_GAP = 0.07, 0.13  # between the panels of the front: beside each other, and above each other on a phone
PANEL_PX, LEGEND_PX = 230, 150  # heights there


@dataclass(frozen=True)
class Point:
    """A measured plan as the front shows it: its id, its value on every axis (slider units), and its error."""

    kind: str  # front or references
    plan_id: str  # empty where there is nothing to choose
    origin: str
    values: dict
    error: float


def points(found, events=(), replay: int | None = None) -> list[Point]:
    """Every plan of a finished search, or what a running one has found so far; with `replay`, the front as it was by that step of the
    beam."""
    known = [] if found is None else [
        Point(kind, scored.plan.plan_id, scored.origin, budgets.values_of(scored.plan), scored.error)
        for kind, plans in (("front", found.front), ("references", found.references))
        for scored in plans
    ]
    steps = beam_steps(events)
    if replay is None or not replay < len(steps):
        return known
    still = {_key(point): point for point in reversed(known)}  # of a plan that is in both lists, the one on the front
    return [still.get(_key(then), then) for then in map(_passed, steps[max(1, replay) - 1].front)]


def _passed(point) -> Point:
    """A point of a search's event. Where a better plan has taken its place since, no plan is kept for it and there is none to choose."""
    values = {a.field: point[a.column] / a.scale for a in budgets.AXES if a.column is not None}
    return Point("front", "", "on the front then, not now", values, point[2])


def _key(point: Point) -> tuple:
    """What an event tells of a plan, to find it again among those that the search ended with."""
    return (*(rounded(point.values[a.field], 6) for a in budgets.AXES if a.column is not None), rounded(point.error))


def _as_searched(scored, found):
    """The same plan with the error that the search measured, on the prompts of all its points; a finalist need not be on
    the front."""
    measured = (*found.front, *found.references, *found.finalists) if found is not None else ()
    return next((other for other in measured if other.plan.plan_id == scored.plan.plan_id), None)


def place_of(scored, found) -> Point | None:
    """Where a plan stands on the front; one judged on other prompts would stand beside its own point, so that is taken if there is one."""
    if scored is None or scored.error is None:
        return None
    searched = _as_searched(scored, found)
    same, kind = (searched, "") if searched is not None else (scored, HELD_OUT if scored.held_out else "")
    return Point(kind, same.plan.plan_id, same.origin, budgets.values_of(same.plan), same.error)


def painted_place(painted, edits, found) -> Point | None:
    """Where a painted plan may stand: the measured error of the plan before, times the ratio of their predicted errors."""
    before = place_of(edits[0], found) if painted is not None and edits else None
    ratio = predicted_ratio(painted, edits)
    return None if before is None or ratio is None else Point(PAINTED, "", PAINTED, budgets.values_of(painted.plan), before.error * ratio)


def front(shown: list[Point], chosen: Point | None, pinned: Point | None, limits: dict, floor: float | None = None,
          nothing: str = "Plans appear here as soon as the search has measured them", whole: Sequence[Point] = ()) -> dict:
    """Error against every axis that the plans have a value on; a click finds the plan by its id. `whole`: where the search ended,
    when an earlier step of it is shown: axes stay as they are there, and a plan that is not found yet has no ring."""
    if not shown:
        return figures.empty(nothing)
    within = [*shown, *whole]
    errors = log_axis(ERROR, [p.error for p in within])
    panels = [a for a in budgets.AXES if any(p.values.get(a.field) is not None for p in within)]
    if whole:
        errors["range"] = list(_range([math.log10(p.error) for p in within if p.error > 0], None))
        found = set(map(_key, shown))
        chosen, pinned = (point if point is not None and (point.kind in (PAINTED, HELD_OUT) or _key(point) in found) else None
                          for point in (chosen, pinned))
    traces, layout, narrow, shapes, labels = [], {}, {}, [], []
    for number, panel in enumerate(panels):
        x, y = (f"{letter}{number + 1}" if number else letter for letter in "xy")
        drawn = [*_panel(shown, panel, limits), *_rings(chosen, pinned, panel)]
        entries = [] if number else [_entry(trace) for trace in drawn if trace["name"] != ENVELOPE]
        traces += [trace | {"xaxis": x, "yaxis": y} for trace in (*(each | {"showlegend": False} for each in drawn), *entries)]
        span = _range([p.values.get(panel.field) for p in within], limits.get(panel.field))
        wide, tall = _axes(panel, number, len(panels), errors, span)
        layout |= {f"{letter}axis{x[1:]}": wide[letter] for letter in "xy"}
        narrow |= {f"{letter}axis{x[1:]}": tall[letter] for letter in "xy"}
        if limits.get(panel.field) is not None:
            marks, label = figures.limit(limits[panel.field], span, x, y)
            shapes += marks
            labels.append(label)
        if floor is not None:
            shapes.append({"type": "line", "name": "floor", "line": {"color": GREEN, "dash": "dot", "width": 1.5}, "xref": f"{x} domain",
                           "x0": 0, "x1": 1, "yref": y, "y0": floor, "y1": floor})
    layout |= {"legend": figures.legend(font={"size": 10}), "margin": {"l": 64, "r": 14, "t": 44, "b": 48},  # a phone shows all entries
               "meta": {"narrow": narrow, "narrow_height": PANEL_PX * len(panels) + LEGEND_PX}}
    return figures.figure(traces, f"front-{len(panels)}", showlegend=True, shapes=shapes, annotations=labels, **layout)


def _axes(panel, number: int, count: int, errors: dict, span) -> tuple[dict, dict]:
    """A panel's two axes: beside each other with one scale of errors at the left, and what differs on a phone, where they are stacked."""
    nth = str(number + 1) if number else ""
    follower = {"matches": "y", "anchor": "x" + nth, "title": {"text": ""}, "showticklabels": False} if number else {}
    wide = {"x": axis(panel.brief, domain=_part(number, count, GAP), range=span, tickangle=0, nticks=3, anchor="y" + nth),
            "y": errors | follower}
    return wide, {"x": {"domain": [0, 1]}, "y": {"domain": _part(count - 1 - number, count, TALL_GAP), "showticklabels": True,
                                                  "title": {"text": "error"}}}


def _part(number: int, count: int, gap: float) -> list[float]:
    """The number-th of `count` equal parts of 0 to 1, with gaps between."""
    width = (1 - gap * (count - 1)) / count
    return [number * (width + gap), number * (width + gap) + width]


def _entry(trace: dict) -> dict:
    """A trace's entry in the legend, which is not faded where its first plan is."""
    mark = {**trace["marker"], "opacity": 1.0}
    return {"type": "scatter", "mode": "markers", "name": trace["name"], "legendgroup": trace["legendgroup"], "x": [None], "y": [None],
            "showlegend": True, "hoverinfo": "skip", "marker": mark}


def _rings(chosen: Point | None, pinned: Point | None, panel) -> list[dict]:
    """A ring around the chosen plan and a box around plan A; a ring with a dot where a painted plan may stand."""
    rings, marked = [], [] if chosen is None else [(RINGS.get(chosen.kind, RING), chosen, GREEN)]
    for (kind, symbol), point, colour in (*marked, (("plan A", "square-open"), pinned, VIOLET)):
        if point is not None and point.values.get(panel.field) is not None:
            mark = {"symbol": symbol, "size": 18, "color": colour, "line": {"width": 3}}
            rings.append({"type": "scatter", "mode": "markers", "name": kind, "hoverinfo": "skip", "legendgroup": kind,
                          "x": [rounded(point.values[panel.field], 6)], "y": [rounded(point.error)], "marker": mark})
    return rings


def _range(values, limit) -> tuple[float, float]:
    known = [v for v in (*values, limit) if v is not None]
    pad = 0.06 * (max(known) - min(known)) or 0.5
    return min(known) - pad, max(known) + pad


def _panel(shown: list[Point], panel, limits) -> list[dict]:
    """One axis's points: the front with its envelope, marked by the part of the search, then every kind of rival with a mark of its own."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(shown, key=lambda p: p.kind != "front"):
        same_mark = point.kind == "front" and point.origin not in PARTS
        groups.setdefault((point.kind, FRONT[2] if same_mark else point.origin), []).append(point)
    traces = [_envelope([p for p in shown if p.kind == "front"], panel)]
    for (kind, origin), members in groups.items():
        members = [p for p in members if p.values.get(panel.field) is not None]
        symbol, colour, label = PARTS.get(origin, FRONT) if kind == "front" else (*RIVALS.get(origin, OTHER), origin_name(origin))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "legendgroup": label,
                "x": [rounded(p.values[panel.field], 6) for p in members],
                "y": [rounded(p.error) for p in members],
                "customdata": [[p.plan_id, origin_name(p.origin), _costs_words(p)] for p in members],
                "hovertemplate": "%{customdata[1]}<br>%{customdata[2]}<br>measured error %{y:.3e} (calibration prompts)<extra></extra>",
                "marker": {
                    "symbol": symbol,
                    "color": colour,
                    "size": 9 if kind == "front" else 12,
                    "line": {"width": 0 if kind == "front" else 1.5},
                    "opacity": [1.0 if budgets.within(p.values, limits) else FADED for p in members],
                },
            }
        )
    return traces


def _envelope(members: list[Point], panel) -> dict:
    """The least error that can be had up to each value of the axis."""
    x, y, best = [], [], float("inf")
    for point in sorted((p for p in members if p.values.get(panel.field) is not None), key=lambda p: (p.values[panel.field], p.error)):
        if point.error < best:
            best = point.error
            x.append(rounded(point.values[panel.field], 6))
            y.append(rounded(best))
    return {"type": "scatter", "mode": "lines", "name": ENVELOPE, "x": x, "y": y, "hoverinfo": "skip", "opacity": 0.45,
            "line": {"shape": "hv", "width": 1.5, "color": BLUE}}


def _costs_words(point: Point) -> str:
    return ", ".join(f"{point.values[a.field]:.2f} {a.unit}" for a in budgets.AXES if point.values.get(a.field) is not None)


def plan_table(shown: list[Point], chosen: str | None, samples: int) -> str:
    """The front and its rivals for the keyboard and for those who read rather than look; every row can be picked.
    chosen: the id of the chosen plan."""
    panels = [a for a in budgets.AXES if any(p.values.get(a.field) is not None for p in shown)]
    ordered = sorted(shown, key=lambda p: (p.kind != "front", p.error))[:TABLE_ROWS]
    rows = [
        (
            {"plan": p.plan_id},
            p.plan_id == chosen,
            [
                origin_name(p.origin) if p.kind != "front" else "front: " + origin_name(p.origin),
                *(f"{p.values[a.field]:.2f}" if p.values.get(a.field) is not None else "" for a in panels),
                f"{p.error:.2e}",
            ],
        )
        for p in ordered
    ]
    headers = ["plan", *(a.unit for a in panels), "error"]
    caption = f"The same plans as a table; errors are means over {samples} calibration prompt{'s'[: samples > 1]}"
    return pick_table(headers, rows, caption, numeric=tuple(range(1, len(headers)))) if rows else ""


def parts_table(result) -> str:
    """What each part of the search added within its budget: its best plan, and what that gains over the parts before it."""
    from workbench.search.selection import quality_db  # brings torch

    rows, best = [], None
    for origin in PARTS:
        error = min((s.error for s in result.finalists if s.origin == origin), default=None)
        if error is None:
            continue
        gain = "" if best is None else f"{max(0.0, quality_db(error) - quality_db(best)):+.2f}"
        best = error if best is None else min(best, error)
        rows.append((origin_name(origin), f"{error:.2e}", f"{quality_db(error):.2f}", gain))
    caption = "What each part of the search added within the budget that it was started with (measured, calibration prompts)"
    return table(("part", "best error", "dB", "gain, dB"), rows, caption) if rows else ""


def ranking_table(result) -> str:
    """How well what the search plans by, and the tables it could have planned by, order the plans that were measured."""
    rows = [(PREDICTIONS.get(r.prediction, r.prediction), _rho(r.spearman, r.plans), _rho(r.spearman_near, r.plans_near))
            for r in result.ranking]
    caption = "How well predictions order measured plans (Spearman's rank correlation; 1 is perfect)"
    return table(("prediction", "all plans", "plans near the budget"), rows, caption) if rows else ""


def _rho(value: float | None, plans: int) -> str:
    return f"too few plans ({plans})" if value is None else f"{value:.2f} (n = {plans})"


def beam_steps(events) -> list:
    """Plans measured in one go report themselves as candidates and survivors alike; steps of the beam do not."""
    return [event for event in events if event.candidates != event.survivors]


def beam(steps, last: int | None) -> dict:
    """The beam after one step with the survivors of the steps before it as a fading trail; last counts from 1, None is the newest."""
    if not steps:
        return figures.empty("The beam's candidates appear here, step by step")
    now = len(steps) if last is None else min(max(1, int(last)), len(steps))
    traces = []
    for age, event in reversed(list(enumerate(reversed(steps[max(0, now - 1 - TRAIL) : now - 1]), 1))):
        traces.append(_cloud(event.survivors, f"survivors, {age} before", GREEN, 7, 0.55 * (1 - age / (TRAIL + 1)), age == 1, "trail"))
    event = steps[now - 1]
    traces.append(_cloud(event.candidates, "candidates", GREY, 6, 0.9, True, "candidates"))
    traces.append(_cloud(event.survivors, "survivors", GREEN, 11, 1.0, True, "survivors"))
    if len(traces) > 2:
        traces[-3]["name"] = "steps before"
    return figures.figure(
        traces,
        "beam",
        xaxis=axis("mean activation bits so far"),
        showlegend=True,
        yaxis=log_axis(f"score after step {event.step} of {event.steps}", *(t["y"] for t in traces)),
    )


def _cloud(points_, name, colour, size, opacity, legend, group) -> dict:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "legendgroup": group,
        "showlegend": legend,
        "opacity": rounded(opacity, 2),
        "x": [rounded(p[0], 5) for p in points_],
        "y": [rounded(p[1]) for p in points_],
        "marker": {"color": colour, "size": size},
        "hovertemplate": "%{x:.2f} mean bits so far<br>score %{y:.3e}<extra>" + name + "</extra>",
    }


def search_line(event, result) -> str:
    if result is not None:
        return (
            f"{len(result.front)} plans on the front, {len(result.references)} references; {result.evaluations:,} "
            f"model evaluations in {seconds(result.seconds)}."
        )
    if event is None:
        return ""
    return f"{event.message or f'step {event.step} of {event.steps}'}; {event.evaluations:,} model evaluations, {seconds(event.seconds)}."


def rivals_line(result, chosen, limits: dict) -> str:
    """How the chosen plan stands against the best rival that keeps the same budget, both on the calibration prompts."""
    if result is None or chosen is None:
        return ""
    mine = _as_searched(chosen, result)
    keeping = [s for s in result.references if budgets.within(budgets.values_of(s.plan), limits)]
    if mine is None or not mine.error:
        return ""
    if not budgets.within(budgets.values_of(chosen.plan), limits):
        return "The chosen plan is beyond this budget."
    if not keeping:
        return "No rival keeps this budget."
    best = min(keeping, key=lambda s: s.error)
    if best.plan.plan_id == chosen.plan.plan_id:
        return "The chosen plan is itself the best rival within the budget."
    return f"Within the budget the best rival is {origin_name(best.origin)}, with {best.error / mine.error:.2f} × the chosen plan's error."
