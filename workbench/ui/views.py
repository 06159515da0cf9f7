"""The one module that turns results into what the screens show: figures (plain Plotly dicts), tables and lines of text.

Pure functions; a result is only read. Letters as in `types.py`: T steps, L layers, C choices; B blocks. A megabyte is 10^6 bytes.
"""

from __future__ import annotations

import math
from html import escape

from workbench.ui import figures
from workbench.ui.figures import BLUE, GREEN, GREY, ORANGE, RED, axis, log_axis, rounded
from workbench.ui.tables import MB, megabytes, numbers, seconds, table

METRIC_NAMES = {"psnr_db": "PSNR", "ssim": "SSIM", "latent_nmse": "latent NMSE"}
ORIGINS = {"beam": "from the beam", "lagrangian": "from the Lagrangian sweep", "uniform": "uniform", "imported": "imported"}
FRAGILE_HEADERS = ["rank", "step", "layer", "Fisher", "± %", "share %"]
FADED = 0.4  # opacity of plans beyond the budget
ERROR = "error: NMSE of the final latent"


# Model

def model_summary(bundle) -> str:
    blocks = {layer.block for layer in bundle.layers}
    quantizable = sum(layer.n_out * layer.k_in for layer in bundle.layers)
    macs = sum(layer.macs_per_step for layer in bundle.layers)
    rows = [("model", bundle.name, "", ""), ("parameters of the transformer", f"{bundle.parameters:,}", "", "exact"),
            ("of these in quantizable layers", f"{quantizable:,}", "", "exact"),
            ("float size", megabytes(bundle.float_bytes), "MB, 2 bytes a parameter", "exact"),
            ("quantizable linear layers", len(bundle.layers), f"in {len(blocks)} blocks", "exact"),
            ("modulation layers (weight only)", len(bundle.modulation), "layers", "exact"),
            ("multiply-accumulates of one step", f"{macs / 1e6:,.1f}", "million MACs", "exact"),
            ("float reference", bundle.float_type, "", "")]
    return numbers(rows, "The model")


def protected(bundle) -> str:
    return table(("layer kept in float", "reason"), bundle.protected.items(), "Protected") if bundle.protected else ""


# Sensitivity. fisher_TL is a list of rows; a step that is not known yet is None.

def blocks_of(layers) -> dict[str, list[int]]:
    """Block name to the indices of its layers, in forward order."""
    blocks: dict[str, list[int]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer.index)
    return blocks


def layer_labels(layers) -> list[str]:
    """Block and what follows the path that all layers of the block share: single.1 attn.to_q."""
    labels = [""] * len(layers)
    for block, members in blocks_of(layers).items():
        paths = [layers[i].name.split(".")[:-1] for i in members]
        shared = 0
        while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        for i in members:
            labels[i] = f"{block} {'.'.join(layers[i].name.split('.')[shared:])}"
    return labels


def block_heatmap(fisher_TL, layers, how: str, cell) -> dict:
    """Block x step; `how` is mean or sum over the block's layers; cell is (layer index or None, step)."""
    blocks = blocks_of(layers)
    scale = {name: len(members) if how == "mean" else 1 for name, members in blocks.items()}
    value_BT = [[None if row is None else sum(row[i] for i in members) / scale[name] for row in fisher_TL]
                for name, members in blocks.items()]
    layer, step = cell
    selected = None if layer is None else (list(blocks).index(layers[layer].block), step)
    return figures.log_heatmap(value_BT, rows=blocks, x=range(len(fisher_TL)), revision=f"blocks-{len(blocks)}-{len(fisher_TL)}",
                               unit=f"Fisher ({how})", selected=selected,
                               hover=f"%{{y}}<br>step %{{x}}<br>{how} Fisher %{{customdata:.3e}}")


def layer_heatmap(fisher_TL, layers, cell) -> dict:
    """Layer x step inside the selected layer's block."""
    layer, step = cell
    if layer is None:
        return figures.empty("Click a cell above to see the layers of its block")
    members = blocks_of(layers)[layers[layer].block]
    value_LT = [[None if row is None else row[i] for row in fisher_TL] for i in members]
    return figures.log_heatmap(value_LT, rows=[layer_labels(layers)[i] for i in members], x=range(len(fisher_TL)),
                               revision=f"layers-{layers[layer].block}", unit="Fisher",
                               hover="%{y}<br>step %{x}<br>Fisher %{customdata:.3e}", selected=(members.index(layer), step))


def fisher_over_time(fisher_TL, stderr_TL, layers, cell) -> dict:
    """Mean over all layers, and the selected layer with its standard error."""
    steps = [t for t, row in enumerate(fisher_TL) if row is not None]
    if not steps:
        return figures.empty("No step yet")
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
        shapes = [{"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": RED, "dash": "dot"}}]
    return figures.figure(traces, f"time-{layer}", xaxis=figures.step_axis(len(fisher_TL)), shapes=shapes,
                          yaxis=log_axis("Fisher", *(t["y"] for t in traces)), showlegend=True)


def error_against_bits(distortion, layers, cell) -> dict:
    """The predicted increase of the final error if one layer uses fewer bits: activations at this step, or the weight."""
    layer, step = cell
    if layer is None or distortion is None:
        return figures.empty("Error against bits of one layer and step")
    traces = []
    for bits_C, error_C, name, colour in (
            (distortion.act_bits_C, distortion.error_TLC[step, layer].tolist(), f"activations at step {step}", BLUE),
            (distortion.weight_bits_C, distortion.weight_error_LC[layer].tolist(), "weight, all steps", ORANGE)):
        points = sorted((b, e) for b, e in zip(bits_C, error_C) if e > 0)
        if points:
            traces.append(figures.line(*zip(*points), name, colour))
    if not traces:
        return figures.empty("No choice of bits changes this layer's output")
    return figures.figure(traces, f"bits-{layer}-{step}", xaxis=axis("bits", dtick=1),
                          yaxis=log_axis("predicted error", *(t["y"] for t in traces)), showlegend=True)


def cell_numbers(smap, layers, cell) -> str:
    """Everything known of one layer at one step."""
    layer, step = cell
    if layer is None or smap is None:
        return ""
    info = layers[layer]
    fisher, stderr = float(smap.fisher_TL[step, layer]), float(smap.stderr_TL[step, layer])
    total = float(smap.fisher_TL.sum())
    rows = [("noise level σ", f"{float(smap.schedule.sigma_T1[step]):.4f}", "", "exact"),
            ("Fisher", f"{fisher:.3e} ± {stderr:.1e}", "± standard error", f"measured, {smap.samples} prompts"),
            ("share of all Fisher", f"{100 * fisher / total:.2f}" if total else "0", "%", "measured"),
            ("calibration weight α", f"{float(smap.alpha_TL[step, layer]):.3f}", "mean 1 over steps", "measured"),
            ("largest |activation|", f"{float(smap.act_absmax_TL[step, layer]):.3f}", "", "measured"),
            ("weight", f"{info.n_out} × {info.k_in}", "out × in", "exact"),
            ("multiply-accumulates", f"{info.macs_per_step / 1e6:.2f}", "million MACs a step", "exact")]
    return numbers(rows, f"{layer_labels(layers)[layer]}, step {step} ({info.role}: {info.name})")


def fragile_rows(fisher_TL, stderr_TL, layers, limit: int = 40) -> list[list]:
    """The (step, layer) cells of largest Fisher, for those who cannot use the heatmap."""
    cells = [(value, t, i) for t, row in enumerate(fisher_TL) if row is not None for i, value in enumerate(row)]
    total = sum(value for value, _, _ in cells) or 1.0
    labels = layer_labels(layers)
    return [[rank, t, labels[i], rounded(value, 3), rounded(100 * stderr_TL[t][i] / value, 2) if stderr_TL and value else None,
             rounded(100 * value / total, 3)]
            for rank, (value, t, i) in enumerate(sorted(cells, key=lambda c: (-c[0], c[1], c[2]))[:limit], 1)]


# Search

def within(point, budget_mb: float | None, budget_bits: float | None) -> bool:
    """Does (bytes, mean bits, …) keep both limits? Half a displayed digit is forgiven, as sliders have steps."""
    return ((budget_mb is None or point[0] / MB <= budget_mb + 1e-9) and (budget_bits is None or point[1] <= budget_bits + 1e-9))


def scored_point(scored) -> tuple[int, float, float]:
    return scored.plan.weight_bytes, scored.plan.act_bits_mean, scored.error


def pareto(front, references, chosen, budget_mb, budget_bits) -> dict:
    """Error against both budgets. front, references: rows (bytes, mean bits, error, label); chosen: such a row or None.

    A point's customdata is (list, index, label): the click handler finds the plan by it."""
    if not front and not references:
        return figures.empty("Plans appear here when the search has measured them")
    traces = []
    for x_axis, column, unit in (("x", 1, 1.0), ("x2", 0, MB)):
        for name, points, symbol, colour, size in (("front", front, "circle", BLUE, 8),
                                                    ("references", references, "diamond-open", ORANGE, 13)):
            traces.append({
                "type": "scatter", "mode": "markers", "name": name, "xaxis": x_axis, "legendgroup": name, "showlegend": x_axis == "x",
                "x": [rounded(p[column] / unit, 6) for p in points], "y": [rounded(p[2]) for p in points],
                "customdata": [[name, i, p[3], rounded(p[1], 4), rounded(p[0] / MB, 5)] for i, p in enumerate(points)],
                "hovertemplate": "%{customdata[2]}<br>%{customdata[4]} MB, %{customdata[3]} mean activation bits"
                                 "<br>measured error %{y:.3e} (calibration prompts)<extra></extra>",
                "marker": {"symbol": symbol, "color": colour, "size": size,
                           "opacity": [1.0 if within(p, budget_mb, budget_bits) else FADED for p in points]}})
        if chosen is not None:
            traces.append({"type": "scatter", "mode": "markers", "name": "chosen", "xaxis": x_axis, "hoverinfo": "skip",
                           "legendgroup": "chosen", "showlegend": x_axis == "x", "x": [chosen[column] / unit], "y": [rounded(chosen[2])],
                           "marker": {"symbol": "circle-open", "size": 18, "color": GREEN, "line": {"width": 3}}})
    marks = [figures.limit(x, text, name) for x, text, name in (
        (budget_bits, "bits", "x"), (budget_mb, "MB", "x2")) if x is not None]
    return figures.figure(traces, "pareto", xaxis=axis("mean act. bits", domain=[0, 0.48]),
                          xaxis2=axis("weights, MB", domain=[0.54, 1], anchor="y"),
                          yaxis=log_axis(ERROR, [p[2] for p in (*front, *references)]), showlegend=True,
                          shapes=[shape for shape, _ in marks], annotations=[label for _, label in marks])


def search_plot(events, result, chosen, budget_mb, budget_bits) -> dict:
    """The Pareto plot of a finished search, or of what a running one has measured so far."""
    if result is not None:
        front, references = ([(*scored_point(s), s.origin) for s in plans] for plans in (result.front, result.references))
    else:
        front, references = [(*p, "measured so far") for p in (events[-1].front if events else ())], []
    ring = None
    if chosen is not None and chosen.error is not None:  # judged on other prompts, it would stand beside its own point
        plans = (*result.front, *result.references) if result is not None else ()
        same = next((scored for scored in plans if scored.plan.plan_id == chosen.plan.plan_id), chosen)
        ring = (*scored_point(same), same.origin)
    return pareto(front, references, ring, budget_mb, budget_bits)


def beam(event) -> dict:
    """Where the beam is: extensions of every path after this step, and those that survived."""
    if event is None:
        return figures.empty("The beam's candidates appear here, step by step")
    traces = []
    for name, points, colour, size in (("candidates", event.candidates, GREY, 6), ("survivors", event.survivors, GREEN, 10)):
        traces.append({"type": "scatter", "mode": "markers", "name": name, "x": [rounded(p[0], 5) for p in points],
                       "y": [rounded(p[1]) for p in points], "marker": {"color": colour, "size": size},
                       "hovertemplate": "%{x:.2f} mean bits so far<br>score %{y:.3e}<extra></extra>"})
    return figures.figure(traces, "beam", xaxis=axis("mean activation bits so far"), showlegend=True,
                          yaxis=log_axis(f"score after step {event.step}", *(t["y"] for t in traces)))


def search_line(event, result) -> str:
    if result is not None:
        return (f"{len(result.front)} plans on the front, {len(result.references)} references; {result.evaluations:,} "
                f"model evaluations in {seconds(result.seconds)}.")
    if event is None:
        return ""
    return f"{event.message or f'step {event.step} of {event.steps}'}; {event.evaluations:,} model evaluations, {seconds(event.seconds)}."


def bit_map(plan, layers) -> dict:
    """Layer x step of the chosen plan, with the stored weight's bits at the left."""
    if plan is None:
        return figures.empty("The chosen plan, layer by step")
    bits_LT = [list(row) for row in zip(*plan.act_bits_TL)]
    return figures.bit_heatmap(bits_LT, rows=layer_labels(layers), x=range(len(plan.sigma_T)), revision="bits",
                               weight_bits_L=plan.weight_bits_L)


def _quantized_bits(plan, layers, costs) -> list[tuple]:
    """Bits of a parameter where a plan decides them, scales included; everything else keeps its own width."""
    if costs is None:
        return []
    parameters = sum(layer.n_out * (layer.k_in + layer.has_bias) for layer in layers)
    return [("effective weight bits, quantized layers", f"{8 * (plan.weight_bytes - costs.fixed_bytes) / parameters:.2f}",
             "bits/parameter", "exact")]


def plan_numbers(scored, bundle, costs) -> str:
    """What the chosen plan costs; every number says how it is known. `costs` is None before a profile."""
    if scored is None:
        return ""
    plan = scored.plan
    error, predicted = [], []
    if scored.error is not None:
        prompts = f"{scored.samples} {'held-out' if scored.held_out else 'calibration'} prompt{'s'[:scored.samples > 1]}"
        error = [("error (NMSE of the final latent)", f"{scored.error:.3e}", "", f"measured, {prompts}")]
    if plan.predicted_error is not None:
        predicted = [("predicted error", f"{plan.predicted_error:.3e}", "squares, summed", "modelled")]
    rows = [("transformer in memory", megabytes(plan.weight_bytes), "MB", "exact"),
            ("of the float size", f"{100 * plan.weight_bytes / bundle.float_bytes:.1f}", "%", "exact"),
            ("effective weight bits, whole transformer", f"{8 * plan.weight_bytes / bundle.parameters:.2f}", "bits/parameter", "exact"),
            *_quantized_bits(plan, bundle.layers, costs),
            ("mean activation bits, plain", f"{plan.act_bits_mean:.3f}", "bits", "exact"),
            ("mean activation bits, MAC-weighted", f"{plan.act_bits_macs:.3f}", "bits", "exact"),
            ("bit operations of one image", f"{plan.bit_ops / 1e9:,.1f}", "billion", "modelled"), *error, *predicted]
    return numbers(rows, f"Plan {plan.plan_id}: {plan.method}, {ORIGINS.get(scored.origin, scored.origin)}")


# Compare

_DIRECTIONS = {None: "", True: ", higher is better", False: ", lower is better"}


def _interval(value) -> str:
    return f"{value.mean:.4g}  [{value.low:.4g}, {value.high:.4g}]" if math.isfinite(value.low) else f"{value.mean:.4g}"


def comparison_numbers(comparison) -> str:
    """Metrics with their 95 % interval over prompts, and both models' bytes and seconds."""
    rows = [(METRIC_NAMES.get(name, name), _interval(value), value.unit, f"n = {value.n}{_DIRECTIONS[value.higher_is_better]}")
            for name, value in comparison.metrics.items()]
    sizes = [("transformer in memory", f"{megabytes(comparison.float_bytes)} → {megabytes(comparison.quantized_bytes)}", "MB", "exact"),
             ("time of one image", f"{comparison.float_seconds_per_image:.3f} → {comparison.quantized_seconds_per_image:.3f}", "s",
              f"measured, {comparison.compute}")]
    return numbers([*rows, *sizes], "Quantized against float (mean and 95 % interval over prompts)")


def pair_line(pair) -> str:
    return f"{pair.prompt} · seed {pair.seed}: PSNR {pair.psnr_db:.2f} dB, SSIM {pair.ssim:.4f}, latent NMSE {pair.latent_nmse:.3e}"


def compute_badge(compute: str, reason: str) -> str:
    return f'<p class="badge"><b>{escape(compute)}</b> {escape(reason)}</p>'


def error_over_steps(comparison, index: int) -> dict:
    """Latent error after each step: this prompt, and the mean over all."""
    if comparison is None:
        return figures.empty("Latent error after each step")
    chosen_T = comparison.pairs[index].latent_nmse_T
    mean_T = [sum(v) / len(comparison.pairs) for v in zip(*(p.latent_nmse_T for p in comparison.pairs))]
    steps = range(len(chosen_T))
    traces = [figures.line(steps, chosen_T, "this prompt", BLUE)]
    if len(comparison.pairs) > 1:
        traces.insert(0, figures.line(steps, mean_T, f"mean of {len(comparison.pairs)}", GREY))
    return figures.figure(traces, "latent", xaxis=figures.step_axis(len(chosen_T)), showlegend=True,
                          yaxis=log_axis("latent NMSE", *(t["y"] for t in traces)))


def difference(image_float, image_quantized, gain: float):
    """|difference| x gain, uint8, clipped at white."""
    import numpy as np

    gap = np.abs(image_float.astype(np.int16) - image_quantized.astype(np.int16))
    return np.clip(np.rint(gap * gain), 0, 255).astype(np.uint8)


# Export

def files(folder, paths) -> str:
    """Files of an exported folder with their sizes."""
    rows = [(path.relative_to(folder).as_posix(), f"{path.stat().st_size / 1000:,.1f}", "kB") for path in paths]
    total = sum(path.stat().st_size for path in paths)
    return table(("file", "size", ""), [*rows, ("total", f"{total / 1000:,.1f}", "kB")], f"Checkpoint folder {folder}")
