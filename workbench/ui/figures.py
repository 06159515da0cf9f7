"""Plotly figures as plain dicts: the few kinds of plot that the screens share, without colours of text and grid.

The widget paints text, grid and background from the page's theme, so that one figure serves light and dark.
"""

from __future__ import annotations

import math

# Perceptually ordered (viridis) for continuous values; ordered steps of plasma for bits, visible on light and dark.
CONTINUOUS = "Viridis"
BIT_COLOURS = {2: "#41049d", 3: "#7201a8", 4: "#a62098", 6: "#d5546e", 8: "#f89540", 16: "#f0f921"}
BLUE, ORANGE, GREEN, GREY, RED = "#4a90d9", "#e08e0b", "#2a9d76", "#8a8f98", "#d1495b"


def figure(data: list[dict], revision: str, **layout) -> dict:
    """`revision` names what is shown: while it stays the same, zoom and pan survive an update."""
    base = {"uirevision": revision, "margin": {"l": 58, "r": 14, "t": 30, "b": 44}, "hovermode": "closest",
            "showlegend": False, "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}}
    return {"data": data, "layout": base | layout}


def empty(message: str) -> dict:
    """A plot that says what will be here."""
    note = {"text": message, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
    return figure([], "empty", xaxis={"visible": False}, yaxis={"visible": False}, annotations=[note])


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Significant digits enough for the eye; None (no cell) for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def axis(title: str, **more) -> dict:
    return {"title": {"text": title}, "automargin": True} | more


def step_axis(steps: int) -> dict:
    """Denoising steps: whole numbers only, all of them from the start."""
    return axis("step (0 = noisiest)", dtick=max(1, math.ceil(steps / 10)), range=[-0.5, steps - 0.5])


def log_axis(title: str, *series) -> dict:
    """A logarithmic axis labelled at powers of ten, or at 1, 2 and 5 times them where it spans little."""
    values = [v for values in series for v in values if v is not None and v > 0]
    decades = math.log10(max(values) / min(values)) if values else 0
    spacing = 1 if decades == 0 else "D1" if decades < 0.7 else "D2" if decades < 2 else max(1, math.ceil(decades / 6))
    return axis(title, type="log", tickformat=".0e", dtick=spacing)


def log_heatmap(value_YX, *, rows, x, revision: str, unit: str, hover: str, selected=None) -> dict:
    """Colour is log10 of the value, hover shows the value itself; None is an empty cell. First row on top."""
    value_YX = [[rounded(v) for v in row] for row in value_YX]
    log_YX = [[rounded(math.log10(v)) if v else None for v in row] for row in value_YX]
    levels = [v for row in log_YX for v in row if v is not None]
    if not levels:
        return empty("every value is 0")
    low, high = min(levels), max(levels)
    ticks = [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
    heat = {"type": "heatmap", "z": log_YX, "x": list(x), "y": list(rows), "customdata": value_YX,
            "colorscale": CONTINUOUS, "zmin": low, "zmax": high if high > low else low + 1, "hovertemplate": hover + "<extra></extra>",
            "xgap": 1, "ygap": 1, "hoverongaps": False,
            "colorbar": {"tickvals": ticks, "ticktext": [f"{10 ** t:.1e}" for t in ticks], "thickness": 12,
                         "title": {"text": unit, "side": "right"}}}
    return figure([heat], revision, xaxis=step_axis(len(x)) | {"showgrid": False, "zeroline": False}, shapes=frame(selected),
                  yaxis={"autorange": "reversed", "showgrid": False, "automargin": True, "type": "category"},
                  margin={"l": 58, "r": 4, "t": 26, "b": 44})


def frame(cell) -> list[dict]:
    """An outline around cell (row, column) of a heatmap."""
    if cell is None or None in cell:
        return []
    row, column = cell
    return [{"type": "rect", "x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5,
             "line": {"color": "#ff5d5d", "width": 3}}]


def bit_heatmap(bits_LT, *, rows, x, revision: str, weight_bits_L) -> dict:
    """Discrete colours; the narrow column on the left is the stored weight's width."""
    levels = sorted(BIT_COLOURS)
    rank = {bits: i for i, bits in enumerate(levels)}
    scale = [[(i + edge) / len(levels), BIT_COLOURS[bits]] for i, bits in enumerate(levels) for edge in (0, 1)]
    shared = {"type": "heatmap", "y": list(rows), "colorscale": scale, "zmin": -0.5, "zmax": len(levels) - 0.5, "xgap": 1, "ygap": 1}
    weights = shared | {"z": [[rank[b]] for b in weight_bits_L], "x": ["W"], "xaxis": "x2", "showscale": False,
                        "customdata": [[b] for b in weight_bits_L], "hovertemplate": "%{y}<br>weight %{customdata} bits<extra></extra>"}
    steps = shared | {"z": [[rank[b] for b in row] for row in bits_LT], "x": list(x), "customdata": [list(r) for r in bits_LT],
                      "hovertemplate": "%{y}<br>step %{x}: activations %{customdata} bits<extra></extra>",
                      "colorbar": {"tickvals": list(range(len(levels))), "ticktext": [str(b) for b in levels], "thickness": 12,
                                   "title": {"text": "bits", "side": "right"}}}
    return figure([weights, steps], revision, xaxis=step_axis(len(x)) | {"domain": [0.09, 1], "showgrid": False, "zeroline": False},
                  xaxis2={"domain": [0, 0.06], "anchor": "y", "showgrid": False, "tickangle": 0},
                  yaxis={"anchor": "x2", "autorange": "reversed", "automargin": True, "showgrid": False, "type": "category", "nticks": 60,
                         "tickfont": {"size": 10}},
                  margin={"l": 58, "r": 4, "t": 26, "b": 44})


def line(x, y, name: str, colour: str, **more) -> dict:
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": list(x), "y": [rounded(v) for v in y],
            "line": {"color": colour}, "marker": {"color": colour, "size": 5}} | more


def band(x, low, high, name: str, colour: str) -> dict:
    """A shaded interval, drawn under its line."""
    return {"type": "scatter", "mode": "lines", "name": name, "x": [*x, *reversed(list(x))], "line": {"width": 0}, "hoverinfo": "skip",
            "y": [rounded(v) for v in (*high, *reversed(list(low)))], "fill": "toself", "fillcolor": colour, "opacity": 0.2,
            "showlegend": False}


def limit(x: float, text: str, x_axis: str = "x") -> tuple[dict, dict]:
    """A budget: a dashed vertical line and its label."""
    shape = {"type": "line", "xref": x_axis, "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1,
             "line": {"color": RED, "width": 2, "dash": "dash"}}
    label = {"xref": x_axis, "yref": "paper", "x": x, "y": 1, "text": text, "showarrow": False, "font": {"color": RED},
             "xanchor": "right", "yanchor": "top", "xshift": -4}
    return shape, label
