"""Screen 2: where the model is fragile. Letters: T steps, L layers, C choices, B blocks, K input channels."""

from __future__ import annotations

from html import escape

from workbench.ui import figures
from workbench.ui.figures import BLUE, GREY, ORANGE, RED, axis, log_axis, rounded
from workbench.ui.tables import badge, numbers, pick_table
from workbench.ui.views.layers import blocks_of, layer_labels, spans
from workbench.ui.views.quantities import QUANTITIES, by_block

ROWS = 10
CHANNELS_DRAWN = 512
CARRIED = 0.8  # share of the risk that the sentence under the map is about
WIDE = 0.55  # share of the cells from which risk counts as spread out


def _how(name: str, how: str) -> str:
    return QUANTITIES[name].block or how


def block_map(rows, layers, name: str, label: str, how: str, cell) -> dict:
    """Block x step with a strip of each step's mean below and of each block's at the right; cell is (layer or None, step)."""
    blocks, how = blocks_of(layers), _how(name, how)
    value_BT, steps = by_block(rows, blocks, how), range(len(rows))
    layer, step = cell
    selected = None if layer is None else (list(blocks).index(layers[layer].block), step)
    hover = f"%{{y}}<br>step %{{x}}<br>{how} %{{customdata:.3e}}"
    heat = figures.log_colours(value_BT, rows=blocks, x=steps, unit=f"{label}, {how} of a block's layers", hover=hover)
    if heat is None:
        return figures.empty("every value is 0")
    small = {"showticklabels": False, "showgrid": False, "zeroline": False, "fixedrange": True}
    return figures.figure(
        [heat, *_strips(rows, value_BT, list(blocks), selected, step)], f"blocks-{len(blocks)}-{len(rows)}",
        shapes=figures.frame(selected), bargap=0.12,
        xaxis=figures.step_axis(len(rows)) | {"domain": [0, 0.89], "anchor": "y2", "showgrid": False, "zeroline": False},
        yaxis=figures.row_axis(domain=[0.2, 1]), yaxis2=small | {"domain": [0, 0.17]},
        xaxis2=small | {"domain": [0.905, 1], "anchor": "y"},
        margin={"l": 58, "r": 22, "t": 40, "b": 40}, meta={"narrow": {"xaxis": figures.few_steps(len(rows))}})


def _strips(rows, value_BT, names: list[str], selected, step) -> list[dict]:
    """Bars of the mean over all layers at each step, and over all known steps of each block; those of the selected cell are red."""
    known = [t for t, row in enumerate(rows) if row is not None]
    time_T = [sum(rows[t]) / len(rows[t]) for t in known]
    depth_B = [sum(v for v in row if v is not None) / len(known) for row in value_BT]
    in_time = [RED if t == step else BLUE for t in known]
    in_depth = [RED if selected and b == selected[0] else BLUE for b in range(len(names))]
    return [{"type": "bar", "name": "time", "x": known, "y": [rounded(v) for v in time_T], "xaxis": "x", "yaxis": "y2",
             "marker": {"color": in_time}, "hovertemplate": "step %{x}: mean %{y:.3e}<extra></extra>"},
            {"type": "bar", "name": "depth", "x": [rounded(v) for v in depth_B], "y": names, "xaxis": "x2", "yaxis": "y",
             "orientation": "h", "marker": {"color": in_depth}, "hovertemplate": "%{y}: mean %{x:.3e}<extra></extra>"}]


def layer_map(rows, layers, label: str, cell) -> dict:
    """Layer x step inside the selected layer's block."""
    layer, step = cell
    if layer is None:
        return figures.empty("Click a cell of the map, or a row of the tables, to see the layers of its block")
    members = blocks_of(layers)[layers[layer].block]
    value_LT = [[None if row is None else row[i] for row in rows] for i in members]
    return figures.log_heatmap(
        value_LT,
        rows=[layer_labels(layers)[i] for i in members],
        x=range(len(rows)),
        revision=f"layers-{layers[layer].block}",
        unit=label,
        hover="%{y}<br>step %{x}<br>%{customdata:.3e}",
        selected=(members.index(layer), step),
    )


def fisher_over_time(fisher_TL, stderr_TL, layers, cell) -> dict:
    """Mean over all layers, and the selected layer with its standard error."""
    steps = [t for t, row in enumerate(fisher_TL) if row is not None]
    if not steps:
        return figures.empty("The selected layer over the denoising steps, with its standard error")
    traces = [figures.line(steps, [sum(fisher_TL[t]) / len(layers) for t in steps], "mean of all layers", GREY)]
    layer, step = cell
    shapes = []
    if layer is not None:
        value_T = [fisher_TL[t][layer] for t in steps]
        if stderr_TL is not None:
            spread_T = [stderr_TL[t][layer] for t in steps]
            low_T = [max(v - s, v / 100) for v, s in zip(value_T, spread_T)]  # a log axis has no room for zero
            traces.append(figures.band(steps, low_T, [v + s for v, s in zip(value_T, spread_T)], "± s.e.", BLUE))
        traces.append(figures.line(steps, value_T, layer_labels(layers)[layer], BLUE))
        shapes = [figures.marker_line(step)]
    return figures.figure(
        traces,
        f"time-{layer}",
        xaxis=figures.step_axis(len(fisher_TL)),
        shapes=shapes,
        yaxis=log_axis("Fisher", *(t["y"] for t in traces)),
        showlegend=True,
    )


def error_against_bits(distortion, layers, cell) -> dict:
    """The predicted increase of the final error if one layer uses fewer bits: activations at this step, or the weight."""
    layer, step = cell
    if layer is None or distortion is None:
        return figures.empty("Pick a layer and a step: what fewer bits would cost there")
    traces = []
    for bits_C, error_C, name, colour in (
        (distortion.act_bits_C, distortion.error_TLC[step, layer].tolist(), f"activations at step {step}", BLUE),
        (distortion.weight_bits_C, distortion.weight_error_LC[layer].tolist(), "weight, all steps", ORANGE),
    ):
        points = sorted((b, e) for b, e in zip(bits_C, error_C) if e > 0)
        if points:
            traces.append(figures.line(*zip(*points), name, colour))
    if not traces:
        return figures.empty("No choice of bits changes this layer's output")
    return figures.figure(
        traces,
        f"bits-{layer}-{step}",
        xaxis=axis("bits", dtick=1),
        yaxis=log_axis("predicted error", *(t["y"] for t in traces)),
        showlegend=True,
    )


def channel_ranges(inspected) -> dict:
    """Smallest and largest input of every channel, as they are and after the transform that precedes quantization."""
    if inspected is None:
        return figures.empty("Pick a layer and a step: smallest and largest value of every input channel")
    channels = len(inspected.low_K)
    width = -(-channels // CHANNELS_DRAWN)
    x = list(range(0, channels, width))
    traces = []
    for low_K, high_K, name, colour in (
        (inspected.low_K, inspected.high_K, "as it is", BLUE),
        (inspected.transformed_low_K, inspected.transformed_high_K, f"after {inspected.transform}", ORANGE),
    ):
        if inspected.transform == "none" and traces:
            break
        low = [rounded(float(low_K[i : i + width].min())) for i in x]
        high = [rounded(float(high_K[i : i + width].max())) for i in x]
        traces.append(
            figures.band(x, low, high, name, colour) | {"opacity": 0.55, "showlegend": True, "line": {"width": 0.5, "color": colour}}
        )
    return figures.figure(traces, f"channels-{inspected.layer}", xaxis=axis("input channel"), yaxis=axis("activation"), showlegend=True)


def weight_histogram(inspected) -> dict:
    """How the layer's weights are spread, as they are and transformed."""
    if inspected is None:
        return figures.empty("Pick a layer: how its weights are spread")
    centres = [rounded(float(v)) for v in (inspected.weight_edges_B[1:] + inspected.weight_edges_B[:-1]) / 2]
    traces = [figures.line(centres, inspected.weight_counts_B.tolist(), "as it is", BLUE, mode="lines", fill="tozeroy")]
    if inspected.transform != "none":
        traces.append(figures.line(centres, inspected.transformed_counts_B.tolist(), f"after {inspected.transform}", ORANGE, mode="lines"))
    return figures.figure(
        traces,
        f"weights-{inspected.layer}",
        xaxis=axis("weight"),
        showlegend=True,
        yaxis=log_axis("weights in a bin", *([v for v in t["y"] if v] for t in traces)),
    )


def cell_numbers(smap, layers, cell) -> str:
    """Everything known of one layer at one step."""
    layer, step = cell
    if layer is None or smap is None:
        return ""
    info = layers[layer]
    fisher, known = float(smap.fisher_TL[step, layer]), smap.stderr_TL is not None
    spread = (f"{fisher:.3e} ± {float(smap.stderr_TL[step, layer]):.1e}", "(standard error)") if known else (f"{fisher:.3e}", "")
    total = float(smap.fisher_TL.sum())
    rows = [
        ("noise level σ", f"{float(smap.sigma_T1[step]):.4f}", "", "exact"),
        ("Fisher", *spread, f"measured, {smap.samples} prompt{'s'[: smap.samples > 1]}"),
        ("share of all Fisher", f"{100 * fisher / total:.3g}" if total else "0", "%", "measured"),
        ("calibration weight α", f"{float(smap.alpha_TL[step, layer]):.3f}", "mean 1 over steps", "measured"),
        ("largest |activation|", f"{float(smap.act_absmax_TL[step, layer]):.3f}", "", "measured"),
        ("weight", f"{info.n_out} × {info.k_in}", "out × in", "exact"),
        ("multiply-accumulates", f"{info.macs_per_step / 1e6:.2f}", "million MACs a step", "exact"),
    ]
    return numbers(rows, f"{layer_labels(layers)[layer]}, step {step} ({info.role}: {info.name})")


def ranked(rows, limit: int, *, most: bool = True) -> list[tuple[float, int, int]]:
    """(value, step, layer) of the cells of largest or smallest value; ties go to the earlier step and layer."""
    cells = [(value, t, i) for t, row in enumerate(rows) if row is not None for i, value in enumerate(row)]
    return sorted(cells, key=lambda c: (-c[0] if most else c[0], c[1], c[2]))[:limit]


def extremes(rows, stderr_TL, layers, label: str, cell, *, most: bool, risk: bool = True) -> str:
    """The ten (step, layer) cells of largest or smallest value, for those who cannot use the map; each row can be picked.

    stderr_TL: standard errors to show beside Fisher, else None; risk: do the values say where bits are needed, and add up?"""
    labels = layer_labels(layers)
    total = sum(value for row in rows if row is not None for value in row)
    shown = []
    for value, t, i in ranked(rows, ROWS, most=most):
        spread = [f"{100 * stderr_TL[t][i] / value:.0f}" if value else ""] if stderr_TL is not None else []
        share = [f"{100 * value / total:.2g}" if total else "0"] if risk else []
        shown.append(({"layer": i, "step": t}, (i, t) == cell, [t, labels[i], f"{value:.2e}", *spread, *share]))
    headers = ["step", "layer", "value", *(["± %"] if stderr_TL is not None else []), *(["share %"] if risk else [])]
    size = "largest" if most else "smallest"
    caption = f"{'Most fragile' if most else 'Most tolerant'}: {size} {label}" if risk else f"{size.capitalize()} values: {label}"
    return pick_table(headers, shown, caption, numeric=tuple(i for i in range(len(headers)) if i != 1))


def carriers(value_BT) -> tuple[list[int], list[int], float]:
    """(steps, blocks, their share of the total): the smallest crossing of steps and blocks, found greedily, that still carries
    CARRIED of the whole. Rows or columns that give up the least per cell go first."""
    steps, blocks = list(range(len(value_BT[0]))), list(range(len(value_BT)))
    total = sum(map(sum, value_BT))
    held = total
    while total > 0:
        losses = [(sum(value_BT[b][t] for b in blocks), len(blocks), "step", t) for t in steps[: len(steps) * (len(steps) > 1)]]
        losses += [(sum(value_BT[b][t] for t in steps), len(steps), "block", b) for b in blocks[: len(blocks) * (len(blocks) > 1)]]
        if not losses:
            break
        loss, _, kind, which = min(losses, key=lambda each: (each[0] / each[1], *each[2:]))  # the loss itself: a mean may underflow
        if (held - loss) / total < CARRIED:
            break
        held -= loss
        (steps if kind == "step" else blocks).remove(which)
    return steps, blocks, held / total if total > 0 else 0.0


def insight(rows, layers, name: str, label: str) -> str:
    """What the map shows, in a sentence computed from it; empty while steps are missing or where nothing is at risk."""
    if rows is None or any(row is None for row in rows):
        return ""
    if not QUANTITIES[name].risk:
        (most, t, i), (least, u, j) = ranked(rows, 1)[0], ranked(rows, 1, most=False)[0]
        labels = layer_labels(layers)
        return f"The {label} goes from {least:.3g} ({labels[j]} at step {u}) to {most:.3g} ({labels[i]} at step {t})."
    blocks = blocks_of(layers)
    steps, kept, share = carriers(by_block(rows, blocks, "sum"))
    if not share:
        return f"The {label} is 0 everywhere."
    top, step, layer = ranked(rows, 1)[0]
    total = sum(map(sum, rows))
    cells = len(steps) * len(kept) / (len(rows) * len(blocks))
    peak = f"The most fragile cell is {layer_labels(layers)[layer]} at step {step}, {100 * top / total:.1f} % on its own."
    if cells > WIDE:
        return f"The risk is spread out: it takes {100 * cells:.0f} % of the map to hold {100 * share:.0f} % of the {label}. {peak}"
    return (
        f"{_steps_words(steps, len(rows))} in {_blocks_words(kept, list(blocks))} carry {100 * share:.0f} % of the risk ({label}) "
        f"in {100 * cells:.0f} % of the map. {peak}"
    )


def _steps_words(steps, count: int) -> str:
    if len(steps) == count:
        return "All steps"
    return f"Step{'s'[: len(steps) > 1]} {spans(steps)}"


def _blocks_words(kept, names: list[str]) -> str:
    if len(kept) == len(names):
        return "all blocks"
    if len(kept) > 1 and kept == list(range(len(names) - len(kept), len(names))):
        return f"the last {len(kept)} of {len(names)} blocks"
    if len(kept) > 1 and kept == list(range(len(kept))):
        return f"the first {len(kept)} of {len(names)} blocks"
    return f"block{'s'[: len(kept) > 1]} {', '.join(names[b] for b in kept)}"


def insight_line(rows, layers, name: str, label: str) -> str:
    """`insight` as a line of the page with how the quantity is known."""
    text = insight(rows, layers, name, label)
    return f'<p class="insight" role="status">{badge(QUANTITIES[name].known)}<span>{escape(text)}</span></p>' if text else ""
