"""Small drawings as inline SVG, for pages that must open without a script: a map, a scatter of points, lines over steps.

Letters: Y rows, X columns.
"""

from __future__ import annotations

import math
from html import escape

# Viridis at nine evenly spaced places: perceptually ordered, readable in grey.
VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
CELL, LABEL, TOP, BOTTOM = 16, 150, 8, 34


def viridis(share: float) -> str:
    """The colour at a place between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1]))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _svg(width: float, height: float, content: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )


def _text(x, y, words, anchor="start", size=11) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="currentColor">{escape(str(words))}</text>'


def colour_map(
    value_YX, rows, colour, title: str, *, words=lambda value: f"{value:.3g}", x_title: str = "step (0 = noisiest)", marks: bool = False
) -> str:
    """Cells with a title each; `colour(value)` is a CSS colour. marks: write the value into the cell."""
    columns = len(value_YX[0])
    parts = []
    for y, (name, row) in enumerate(zip(rows, value_YX)):
        parts.append(_text(LABEL - 6, TOP + CELL * y + 12, name, "end", 10))
        for x, value in enumerate(row):
            place = f'x="{LABEL + CELL * x}" y="{TOP + CELL * y}" width="{CELL - 1}" height="{CELL - 1}"'
            parts.append(f'<rect {place} fill="{colour(value)}"><title>{escape(f"{name}, {x}: {words(value)}")}</title></rect>')
            if marks:
                parts.append(
                    f'<text x="{LABEL + CELL * x + 7.5}" y="{TOP + CELL * y + 11}" text-anchor="middle" font-size="8" fill="#fff" '
                    f'stroke="#0008" stroke-width="1.5" paint-order="stroke">{escape(str(value))}</text>'
                )
    bottom = TOP + CELL * len(value_YX)
    every = max(1, math.ceil(columns / 10))
    parts += [_text(LABEL + CELL * x + CELL / 2, bottom + 14, x, "middle", 10) for x in range(0, columns, every)]
    parts.append(_text(LABEL + CELL * columns / 2, bottom + 29, x_title, "middle"))
    return _svg(LABEL + CELL * columns + 8, bottom + BOTTOM, "".join(parts), title)


def log_map(value_YX, rows, title: str) -> str:
    """Colour is the logarithm of the value; 0 is blank."""
    levels = [math.log10(v) for row in value_YX for v in row if v > 0] or [0.0]
    low, span = min(levels), max(levels) - min(levels) or 1.0
    return colour_map(value_YX, rows, lambda v: viridis((math.log10(v) - low) / span) if v > 0 else "none", title)


def _scale(values, start: float, end: float, log: bool):
    known = [math.log10(v) if log else v for v in values if not log or v > 0]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    span = high - low or 1.0

    def place(value: float) -> float:
        return start + ((math.log10(value) if log else value) - low) / span * (end - start)

    ticks = [low + span * i / 4 for i in range(5)]
    return place, [(10**t if log else t) for t in ticks]


def plot(series, title: str, *, x_title: str, y_title: str, x_limit: float | None = None, width: int = 460, height: int = 280) -> str:
    """series: (name, colour, points, joined) with points (x, y > 0) on a logarithmic y axis; x_limit: a budget, its far side shaded."""
    points = [p for _, _, ps, _ in series for p in ps if p[1] > 0]
    if not points:
        return ""
    left, right, top, bottom = 62, width - 12, 26, height - 40
    place_x, ticks_x = _scale([*(p[0] for p in points), *([x_limit] if x_limit is not None else [])], left + 8, right - 8, False)
    place_y, ticks_y = _scale([p[1] for p in points], bottom - 6, top + 6, True)
    parts = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="currentColor" opacity=".35"/>']
    if x_limit is not None:
        x = place_x(x_limit)
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{max(0, right - x):.1f}" height="{bottom - top}" fill="#d1495b" opacity=".1"/>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#d1495b" stroke-dasharray="5 4"/>'
        )
    parts += [_text(place_x(t), bottom + 14, f"{t:.3g}", "middle", 10) for t in ticks_x]
    parts += [_text(left - 5, place_y(t) + 4, f"{t:.1e}", "end", 10) for t in ticks_y]
    parts += [_text((left + right) / 2, height - 8, x_title, "middle"), _text(left, 14, y_title)]
    for number, (name, colour, ps, joined) in enumerate(series):
        spots = [(place_x(x), place_y(y)) for x, y in ps if y > 0]
        if joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shape = "circle" if number % 2 == 0 else "rect"
        for (x, y), (value_x, value_y) in zip(spots, ps):
            body = (
                f'cx="{x:.1f}" cy="{y:.1f}" r="3.5"' if shape == "circle" else f'x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"'
            )
            parts.append(f'<{shape} {body} fill="{colour}"><title>{escape(f"{name}: {value_x:.3g}, {value_y:.3e}")}</title></{shape}>')
        parts.append(
            f'<text x="{right - 6}" y="{top + 15 + 14 * number}" text-anchor="end" font-size="11" fill="{colour}">{escape(name)}</text>'
        )
    return _svg(width, height, "".join(parts), title)
