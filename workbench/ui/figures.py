"""Plotly figures as plain dicts: the few kinds of plot that the screens share, without colours of text and grid.

The widget paints text, grid and background from the page's theme, so that one figure serves light and dark. `meta.narrow` holds what
else of the layout holds where there is room for a phone's width only, and `meta.narrow_height` the height there.
"""

from __future__ import annotations

import math

# Perceptually ordered (viridis) for continuous values; ordered steps of plasma for bits, visible on light and dark.
CONTINUOUS = "Viridis"
BIT_COLOURS = {2: "#41049d", 3: "#7201a8", 4: "#a62098", 6: "#d5546e", 8: "#f89540", 16: "#f0f921"}
BLUE, ORANGE, GREEN, GREY, RED, VIOLET = "#3f86d0", "#d9820a", "#1f9470", "#8a8f98", "#d1495b", "#8e63ce"
EMPTY_PX = 84  # height of a plot that has nothing to show yet
FRAME = "#ff4d4d"  # around what is selected


def legend(**more) -> dict:
    """Above the plot, from the left; of its own for each figure, since whoever shows one may change it."""
    return {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0} | more


def figure(data: list[dict], revision: str, **layout) -> dict:
    """`revision` names what is shown: while it stays the same, zoom and pan survive an update."""
    base = {"uirevision": revision, "margin": {"l": 58, "r": 14, "t": 30, "b": 44}, "hovermode": "closest",
            "showlegend": False, "legend": legend()}
    return {"data": data, "layout": base | layout}


def empty(message: str) -> dict:
    """A plot that says what will be here."""
    note = {"name": "note", "text": message, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False, "font": {"size": 13},
            "opacity": 0.65}
    hidden = {"visible": False}
    return figure([], "empty", xaxis=hidden, yaxis=hidden, annotations=[note], margin={"l": 8, "r": 8, "t": 8, "b": 8},
                  meta={"height": EMPTY_PX})


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Significant digits enough for the eye; None (no cell) for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def axis(title: str, **more) -> dict:
    return {"title": {"text": title}, "automargin": True} | more


def step_axis(steps: int) -> dict:
    """Denoising steps: whole numbers only, all of them from the start."""
    return axis("step (0 = noisiest)", dtick=max(1, math.ceil(steps / 10)), range=[-0.5, steps - 0.5])


def few_steps(steps: int) -> dict:
    """What `step_axis` labels on a phone."""
    return {"dtick": max(1, math.ceil(steps / 5)), "tickangle": 0}


def log_axis(title: str, *series) -> dict:
    """A logarithmic axis labelled at powers of ten, or at 1, 2 and 5 times them where it spans little."""
    values = [v for values in series for v in values if v is not None and v > 0]
    decades = math.log10(max(values) / min(values)) if values else 0
    spacing = 1 if decades == 0 else "D1" if decades < 0.7 else "D2" if decades < 2 else max(1, math.ceil(decades / 6))
    return axis(title, type="log", tickformat=".0e", dtick=spacing)


def log_heatmap(value_YX, *, rows, x, revision: str, unit: str, hover: str, selected=None) -> dict:
    """Colour is log10 of the value, hover shows the value itself; None is an empty cell. First row on top."""
    heat = log_colours(value_YX, rows=rows, x=x, unit=unit, hover=hover)
    if heat is None:
        return empty("every value is 0")
    return figure([heat], revision, xaxis=step_axis(len(x)) | {"showgrid": False, "zeroline": False}, shapes=frame(selected),
                  yaxis=row_axis(), margin={"l": 58, "r": 22, "t": 40, "b": 44},
                  meta={"narrow": {"xaxis": few_steps(len(x)), "yaxis": short_rows(rows)}})


def row_axis(**more) -> dict:
    """Named rows, the first on top."""
    return {"autorange": "reversed", "showgrid": False, "automargin": True, "type": "category", "ticksuffix": " "} | more


def short_rows(rows) -> dict:
    """Names of rows for a phone: single.1 attn.to_q -> s1 to_q; two that would be the same are kept long."""
    def short(name: str) -> str:
        block, _, layer = str(name).partition(" ")
        return f"{block[:1]}{''.join(filter(str.isdigit, block))} {layer.removeprefix('attn.').replace('ff_context', 'ffc')}"

    if len(set(map(short, rows))) < len(rows):
        return {}
    return {"tickvals": list(rows), "ticktext": list(map(short, rows)), "tickfont": {"size": 9}}


def log_colours(value_YX, *, rows, x, unit: str, hover: str) -> dict | None:
    """The heatmap of `log_heatmap` with its colour bar on top; None where no value is positive."""
    value_YX = [[rounded(v) for v in row] for row in value_YX]
    log_YX = [[rounded(math.log10(v)) if v else None for v in row] for row in value_YX]
    levels = [v for row in log_YX for v in row if v is not None]
    if not levels:
        return None
    low, high = min(levels), max(levels)
    ticks = [low + (high - low) * i / 3 for i in range(4)] if high > low else [low]
    return {"type": "heatmap", "z": log_YX, "x": list(x), "y": list(rows), "customdata": value_YX, "name": "map",
            "colorscale": CONTINUOUS, "zmin": low, "zmax": high if high > low else low + 1, "hovertemplate": hover + "<extra></extra>",
            "xgap": 1, "ygap": 1, "hoverongaps": False,
            "colorbar": {"orientation": "h", "tickangle": 0, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "len": 0.66,
                         "thickness": 8, "ticklabeloverflow": "allow", "tickvals": ticks,
                         "ticktext": [f"{10 ** t:.1e}" for t in ticks], "tickfont": {"size": 10},
                         "ypad": 4, "title": {"text": unit + ", log scale ", "side": "top", "font": {"size": 11}}}}


def frame(cell) -> list[dict]:
    """An outline around cell (row, column) of a heatmap."""
    if cell is None or None in cell:
        return []
    row, column = cell
    return [{"type": "rect", "x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5,
             "line": {"color": FRAME, "width": 3}}]


CLEAR = "rgba(0, 0, 0, 0)"
CHANGE = ((0, "rgb(5, 10, 172)"), (0.35, "rgb(106, 137, 247)"), (0.499, "rgb(170, 180, 215)"), (0.499, CLEAR), (0.501, CLEAR),
          (0.501, "rgb(214, 180, 160)"), (0.7, "rgb(230, 145, 90)"), (1, "rgb(178, 10, 28)"))


def _two_parts(left_L, right_LT, *, rows, x, revision: str, shared: dict, bar: dict, words: tuple[str, str]) -> dict:
    """A map of layers by steps with a narrow column for the stored weights at its left. Cells carry their number where there is room.

    left_L, right_LT: (colour, shown text, value) of each cell; words: what hovering says of a weight and of a step."""
    room = len(rows) <= 72 and len(x) <= 32
    shared = {"type": "heatmap", "y": list(rows), "xgap": 1, "ygap": 1} | shared

    def part(cells, **more):
        picked = {"z": [[c[0] for c in row] for row in cells], "customdata": [[c[2] for c in row] for row in cells]}
        text = {"text": [[c[1] for c in row] for row in cells], "texttemplate": "%{text}", "textfont": {"size": 9}} if room else {}
        return shared | picked | text | more

    weights = part([[cell] for cell in left_L], x=["W"], xaxis="x2", showscale=False, name="weights",
                   hovertemplate=f"%{{y}}<br>{words[0]}<extra></extra>")
    steps = part(right_LT, x=list(x), name="steps", hovertemplate=f"%{{y}}<br>step %{{x}}: {words[1]}<extra></extra>",
                 colorbar={"orientation": "h", "tickangle": 0, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
                           "len": 0.6, "thickness": 10, "ypad": 4} | bar)
    narrow = {"xaxis": {"domain": [0.14, 1], **few_steps(len(x))}, "xaxis2": {"domain": [0, 0.1]}, "yaxis": short_rows(rows)}
    return figure([weights, steps], revision, meta={"narrow": narrow},
                  xaxis=step_axis(len(x)) | {"domain": [0.07, 1], "showgrid": False, "zeroline": False},
                  xaxis2={"domain": [0, 0.05], "anchor": "y", "showgrid": False, "tickangle": 0, "fixedrange": True,
                          "type": "category", "categoryarray": ["W"], "range": [-0.5, 0.5]},
                  yaxis=row_axis(anchor="x2", nticks=60, tickfont={"size": 10}), margin={"l": 58, "r": 8, "t": 48, "b": 44})


def bit_heatmap(bits_LT, *, rows, x, revision: str, weight_bits_L) -> dict:
    """Discrete colours; the narrow column on the left is the stored weight's width. Cells without activation bits (None) are blank."""
    levels = sorted(BIT_COLOURS)
    rank = {bits: i for i, bits in enumerate(levels)}
    scale = [[(i + edge) / len(levels), BIT_COLOURS[bits]] for i, bits in enumerate(levels) for edge in (0, 1)]
    bar = {"tickvals": list(range(len(levels))), "ticktext": [str(b) for b in levels],
           "title": {"text": "bits ", "side": "top", "font": {"size": 11}}}

    def cell(bits):
        return (None, "", None) if bits is None else (rank[bits], bits, bits)

    return _two_parts([cell(b) for b in weight_bits_L], [[cell(b) for b in row] for row in bits_LT], rows=rows, x=x,
                      revision=revision, shared={"colorscale": scale, "zmin": -0.5, "zmax": len(levels) - 0.5}, bar=bar,
                      words=("weight %{customdata} bits", "activations %{customdata} bits"))


def change_heatmap(change_LT, *, rows, x, weights_L) -> dict:
    """Bits gained (red) and lost (blue) between two plans; no change is clear."""
    most = max([1, *(abs(c) for row in change_LT for c in row if c is not None), *map(abs, weights_L)])

    def cell(change):
        return (change, f"{change:+d}" if change else "", change)

    return _two_parts([cell(c) for c in weights_L], [[cell(c) for c in row] for row in change_LT], rows=rows, x=x, revision="change",
                      shared={"colorscale": CHANGE, "zmin": -most, "zmax": most},
                      bar={"title": {"text": "bits of B less bits of A ", "side": "top", "font": {"size": 11}}},
                      words=("weight %{customdata:+d} bits", "activations %{customdata:+d} bits"))


def line(x, y, name: str, colour: str, **more) -> dict:
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": list(x), "y": [rounded(v) for v in y],
            "line": {"color": colour}, "marker": {"color": colour, "size": 5}} | more


def band(x, low, high, name: str, colour: str) -> dict:
    """A shaded interval, drawn under its line."""
    return {"type": "scatter", "mode": "lines", "name": name, "x": [*x, *reversed(list(x))], "line": {"width": 0}, "hoverinfo": "skip",
            "y": [rounded(v) for v in (*high, *reversed(list(low)))], "fill": "toself", "fillcolor": colour, "opacity": 0.2,
            "showlegend": False}


def limit(x: float, span: tuple[float, float], x_axis: str = "x", y_axis: str = "y") -> tuple[list[dict], dict]:
    """A budget: a dashed vertical line, the infeasible side of it shaded, and its label, in the unit of the axis, on the side where
    the axis, which shows `span`, has more room."""
    place = {"xref": x_axis, "yref": f"{y_axis} domain", "y0": 0, "y1": 1}
    line_ = {"type": "line", "name": "limit", "x0": x, "x1": x, "line": {"color": RED, "width": 2, "dash": "dash"}} | place
    beyond = {"type": "rect", "name": "infeasible", "x0": x, "x1": x + 1e6, "line": {"width": 0}, "fillcolor": RED,
              "opacity": 0.07, "layer": "below"} | place
    label = {"xref": x_axis, "yref": f"{y_axis} domain", "x": x, "y": 1, "showarrow": False,
             "text": f"≤ {x:,.0f}" if x >= 1000 else f"≤ {x:.4g}",
             "font": {"color": RED, "size": 11}, "yanchor": "top",
             **({"xanchor": "left", "xshift": 3} if x - span[0] < span[1] - x else {"xanchor": "right", "xshift": -3})}
    return [line_, beyond], label


def marker_line(x: float, colour: str = RED) -> dict:
    """A dotted vertical line at the selected step."""
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": colour, "width": 1.5, "dash": "dot"}}
