"""A plan wherever it is shown: its bits as a map, its costs as a table, and what differs between two. Letters: T steps, L layers."""

from __future__ import annotations

import itertools

from workbench.ui import figures
from workbench.ui.tables import MB, empty, megabytes, notice, numbers, pick, table
from workbench.ui.views.layers import layer_labels, spans

ERROR = "error: NMSE of the final latent"
ORIGINS = {
    "beam": "beam search",
    "lagrangian": "Lagrangian sweep",
    "refined": "refinement",
    "uniform": "uniform bits",
    "imported": "imported",
    "painted": "painted by hand",
    "link": "from a link",
    "greedy": "greedy",
    "milp": "integer programme",
    "layers": "one width per layer",
    "dp": "one width per step, the best",
    "bisection": "one width per step, by halving",
    "ends": "first and last steps protected",
    "online": "online switch, 4 or 8 bits",
}
FLOAT = "float"  # activations that have no bits
FEW = 5  # measurements on fewer prompts say little of their spread
ROW_PX, MAP_EDGE_PX, MAP_MOST_PX = 14, 110, 1500


def origin_name(origin: str) -> str:
    """What proposed a plan, in words; an unknown origin speaks for itself."""
    return ORIGINS.get(origin, origin.replace("_", " "))


def bit_map(plan, layers, cell=(None, None), brush: int | None = None) -> dict:
    """Layer x step, with the stored weight's bits at the left; `brush`: the width being painted, None when a click selects."""
    if plan is None:
        return figures.empty("The bits of the chosen plan, layer by step")
    bits_LT = [list(row) for row in zip(*plan.act_bits_TL)]
    figure = figures.bit_heatmap(
        bits_LT, rows=layer_labels(layers), x=range(len(plan.sigma_T)), revision="bits", weight_bits_L=plan.weight_bits_L
    )
    layer, step = cell
    if layer is not None and step is not None and step < len(plan.sigma_T):
        figure["layout"]["shapes"] = figures.frame((layer, step))
    return _sized(figure, len(layers), brush)


def _sized(figure: dict, rows: int, brush: int | None = None) -> dict:
    figure["layout"]["meta"] |= {"height": min(MAP_MOST_PX, MAP_EDGE_PX + ROW_PX * rows), "brush": brush}
    return figure


def difference_map(first, second, layers) -> dict:
    """Where two plans of one model differ: bits of the second less bits of the first. Both are read at the second's noise levels."""
    if first is None or second is None:
        return figures.empty("Pin a plan as A, then choose another: what differs appears here")
    change_LT = [
        [None if None in (a, b) else b - a for a, b in zip(row_a, row_b)]
        for row_a, row_b in zip(zip(*(first.act_bits_at(sigma) for sigma in second.sigma_T)), zip(*second.act_bits_TL))
    ]
    weights_L = [b - a for a, b in zip(first.weight_bits_L, second.weight_bits_L)]
    figure = figures.change_heatmap(change_LT, rows=layer_labels(layers), x=range(len(second.sigma_T)), weights_L=weights_L)
    return _sized(figure, len(layers))


def difference_line(first, second) -> str:
    """The recipe diff in a sentence."""
    if first is None or second is None:
        return ""
    pairs = [(t, a, b) for t, sigma in enumerate(second.sigma_T) for a, b in zip(first.act_bits_at(sigma), second.act_bits_TL[t])
             if None not in (a, b)]
    changed = [(t, b - a) for t, a, b in pairs if a != b]
    weights = [b - a for a, b in zip(first.weight_bits_L, second.weight_bits_L) if a != b]
    if not changed and not weights:
        same = first.plan_id == second.plan_id
        return f"Plan {first.plan_id} is A; choose another, and what differs is shown here." if same else "Both plans decide the same."
    wider = sum(d > 0 for _, d in changed)
    steps = spans({t for t, _ in changed})
    cells = (
        f"{len(changed)} of {len(pairs)} activation widths differ ({wider} wider, {len(changed) - wider} narrower than in A, "
        f"at steps {steps})"
        if changed
        else "activation widths are the same"
    )
    return f"{cells}; {len(weights)} of {len(second.weight_bits_L)} weights differ."


def _quantized_bits(plan, layers, costs) -> list[tuple]:
    """Bits of a parameter where a plan decides them, scales included; everything else keeps its own width."""
    if costs is None:
        return []
    parameters = sum(layer.n_out * (layer.k_in + layer.has_bias) for layer in layers)
    return [
        (
            "effective weight bits, quantized layers",
            f"{8 * (plan.weight_bytes - costs.fixed_bytes) / parameters:.2f}",
            "bits/parameter",
            "exact",
        )
    ]


def _facts(scored, bundle, costs, edits=()) -> list[tuple]:
    plan = scored.plan
    error, predicted, time = [], [], []
    if scored.error is not None:
        prompts = f"{scored.samples} {'held-out' if scored.held_out else 'calibration'} prompt{'s'[: scored.samples > 1]}"
        low, high = getattr(scored, "low", None), getattr(scored, "high", None)
        interval = f"  [{low:.2e},  {high:.2e}]" if low is not None and high is not None else ""
        spread = "mean and 95 % interval over " if interval else "no interval: " if scored.samples < FEW else "mean of "
        error = [("error (NMSE of the final latent)", f"{scored.error:.3e}{interval}", "", f"measured, {spread}{prompts}")]
    estimate = estimated_error(scored, edits)
    if estimate is not None:
        predicted = [("predicted error (NMSE of the final latent)", f"{estimate:.3e}", "", "modelled, from the error before painting")]
    if plan.predicted_error is not None:
        predicted += [("predicted error, summed over layers and steps", f"{plan.predicted_error:.3e}", "",
                       "modelled, to compare plans of one profile")]
    if getattr(plan, "latency_ms", None) is not None:
        target = getattr(plan, "latency_target", None) or ""
        how = f"modelled{', as the sum of measured layer times' if '(measured' in target else ''}"
        time = [("time of an image's steps", f"{plan.latency_ms:.2f}", "ms", how)]
    return [
        ("transformer in memory", megabytes(plan.weight_bytes), "MB", "exact"),
        ("of the float size", f"{100 * plan.weight_bytes / bundle.float_bytes:.1f}", "%", "exact"),
        ("effective weight bits, whole transformer", f"{8 * plan.weight_bytes / bundle.parameters:.2f}", "bits/parameter", "exact"),
        *_quantized_bits(plan, bundle.layers, costs),
        ("mean activation bits, plain", f"{plan.act_bits_mean:.3f}", "bits", "exact"),
        ("mean activation bits, MAC-weighted", f"{plan.act_bits_macs:.3f}", "bits", "exact"),
        ("bit operations of one image", f"{plan.bit_ops / 1e9:,.1f}", "billion", "modelled"),
        *time,
        *error,
        *predicted,
    ]


def predicted_ratio(painted, edits) -> float | None:
    """A painted plan's predicted error over that of the plan before painting; None where one of them predicts none."""
    before = edits[0].plan.predicted_error if edits else None
    return painted.plan.predicted_error / before if before and painted.plan.predicted_error is not None else None


def estimated_error(painted, edits) -> float | None:
    """What a painted plan's error may be: the measured error of the plan before painting, times the ratio of their predicted errors."""
    ratio = predicted_ratio(painted, edits)
    return None if ratio is None or edits[0].error is None else edits[0].error * ratio


def painted_line(painted, edits) -> str:
    """What painting has changed so far: predicted error and costs against the plan before it."""
    if painted is None or not edits:
        return ""
    old, new, ratio = edits[0].plan, painted.plan, predicted_ratio(painted, edits)
    changes = [] if ratio is None else [f"{ratio:.3g} times its predicted error"]
    changes.append(f"{(new.weight_bytes - old.weight_bytes) / MB:+.2f} MB")
    changes.append(f"{new.act_bits_mean - old.act_bits_mean:+.3f} mean activation bits")
    if None not in (new.latency_ms, old.latency_ms):
        changes.append(f"{new.latency_ms - old.latency_ms:+.2f} ms")
    return f"Painted, against plan {old.plan_id} before: {', '.join(changes)}."


def measuring(scored, active: bool, missing: str) -> str:
    """What brings the error of a plan that is only predicted; nothing for one that has been measured. `active`: is it being measured,
    `missing`: what has to come first."""
    if scored is None or scored.error is not None:
        return ""
    if active:
        button = f'<button type="button" {pick({"measure": "stop"}, tag="button")}>Stop measuring</button>'
        return empty("Being measured", "It is run on held-out prompts, step by step; the top of the page tells how far it is.", button)
    button = f'<button type="button" {pick({"measure": "start"}, tag="button")}{" disabled" * bool(missing)}>Measure its error</button>'
    return empty("The error of this plan is not measured", missing or "It is run on held-out prompts, beside the float model.", button)


def bits_table(plan, layers) -> str:
    """The bit map as a table that can be read: stored bits, and activation bits by runs of steps."""
    rows = []
    for label, weight_bits, column in zip(layer_labels(layers), plan.weight_bits_L, zip(*plan.act_bits_TL)):
        runs, step = [], 0
        for bits, run in itertools.groupby(column):
            last = step + len(list(run)) - 1
            runs.append(f"{FLOAT if bits is None else bits} (step{'s'[: last > step]} {spans(range(step, last + 1))})")
            step = last + 1
        everywhere = f"{FLOAT if column[0] is None else column[0]} at all steps"
        rows.append((label, weight_bits, everywhere if len(runs) == 1 else ", ".join(runs)))
    shown = table(("layer", "weight bits", "activation bits"), rows)
    return f'<details class="more"><summary>All bits as a table</summary>{shown}</details>'


def plan_numbers(scored, bundle, costs, edits=()) -> str:
    """What the chosen plan costs; every number says how it is known. `costs` is None before a profile; `edits`: the plans that were painted
    to become this one."""
    if scored is None or bundle is None:
        return ""
    facts = numbers(_facts(scored, bundle, costs, edits), f"Plan {scored.plan.plan_id}: {scored.plan.method}, {origin_name(scored.origin)}")
    return notice(painted_line(scored, edits), "info") + facts


def two_plans(first, second, bundle, costs) -> str:
    """Costs of the pinned plan and of the chosen one, in one table."""
    if first is None or second is None or bundle is None:
        return ""
    of_first = {row[0]: row for row in _facts(first, bundle, costs)}
    of_second = {row[0]: row for row in _facts(second, bundle, costs)}
    rows = []
    for name, _, unit, how in {**of_first, **of_second}.values():
        (_, a, _, how_a), (_, b, _, how_b) = (of.get(name, ("", "–", "", how)) for of in (of_first, of_second))
        if how_a != how_b:  # errors on different prompts must not pass for one measurement
            word = how_a.split(",")[0]
            how_a = f"{word}, A: {how_a.removeprefix(f'{word}, ')}; B: {how_b.removeprefix(f'{word}, ')}"
        rows.append((name, f"{a} → {b}", unit, how_a))
    return numbers(rows, f"A, plan {first.plan.plan_id} → B, plan {second.plan.plan_id}")
