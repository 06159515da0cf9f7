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
CELL, LETTER, TOP, BOTTOM = 16, 5.6, 8, 34  # pixels; LETTER is the width of one in a label


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


def colour_map(value_YX, rows, colour, title: str, *, words=lambda value: f"{value:.3g}", x_title: str = "step (0 = noisiest)",
               marks: bool = False, first_Y=None, key: str = "") -> str:
    """Cells with a title each; `colour(value)` is a CSS colour. marks: write the value into the cell. first_Y: a column W before the
    others. key: SVG of a colour scale, which goes below."""
    columns, left = len(value_YX[0]), LETTER * max(map(len, map(str, rows))) + 12
    start = left + (CELL + 6 if first_Y else 0)
    parts = []

    def cell(x: float, y: int, value, says: str) -> None:
        place = f'x="{x:g}" y="{TOP + CELL * y}" width="{CELL - 1}" height="{CELL - 1}"'
        parts.append(f'<rect {place} fill="{colour(value)}"><title>{escape(f"{says}: {words(value)}")}</title></rect>')
        if marks and value is not None:
            parts.append(f'<text x="{x + 7.5:g}" y="{TOP + CELL * y + 11}" text-anchor="middle" font-size="8" fill="#fff" '
                         f'stroke="#0008" stroke-width="1.5" paint-order="stroke">{escape(str(value))}</text>')

    for y, (name, row) in enumerate(zip(rows, value_YX)):
        parts.append(_text(left - 6, TOP + CELL * y + 12, name, "end", 10))
        if first_Y:
            cell(left, y, first_Y[y], f"{name}, weight")
        for x, value in enumerate(row):
            cell(start + CELL * x, y, value, f"{name}, {x}")
    bottom = TOP + CELL * len(value_YX)
    if first_Y:
        parts.append(_text(left + CELL / 2, bottom + 14, "W", "middle", 10))
    parts += [_text(start + CELL * x + CELL / 2, bottom + 14, x, "middle", 10) for x in _whole_steps(0, columns - 1)]
    parts.append(_text(start + CELL * columns / 2, bottom + 29, x_title, "middle"))
    if key:
        parts.append(f'<g transform="translate({left} {bottom + BOTTOM + 4})">{key}</g>')
    return _svg(start + CELL * columns + 8, bottom + BOTTOM + (26 if key else 0), "".join(parts), title)


def _whole_steps(low: int, high: int) -> range:
    """About ten whole numbers from one to the other."""
    return range(low, high + 1, max(1, math.ceil((high - low + 1) / 10)))


def log_map(value_YX, rows, title: str) -> str:
    """Colour is the logarithm of the value; 0 is blank."""
    levels = [math.log10(v) for row in value_YX for v in row if v > 0] or [0.0]
    low, span = min(levels), max(levels) - min(levels) or 1.0
    scale = "".join(f'<rect x="{56 + 12 * i}" y="0" width="12" height="10" fill="{viridis(i / 11)}"/>' for i in range(12))
    key = _text(50, 9, f"{10**low:.1e}", "end", 10) + scale + _text(206, 9, f"{10 ** (low + span):.1e}, logarithmic", size=10)
    return colour_map(value_YX, rows, lambda v: viridis((math.log10(v) - low) / span) if v > 0 else "none", title, key=key)


def _scale(values, start: float, end: float, log: bool):
    known = [math.log10(v) if log else v for v in values if not log or v > 0]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    span = high - low or 1.0

    def place(value: float) -> float:
        return start + ((math.log10(value) if log else value) - low) / span * (end - start)

    ticks = [low + span * i / 4 for i in range(5)]
    return place, [(10**t if log else t) for t in ticks]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plot(series, title: str, *, x_title: str, y_title: str, x_limit: float | None = None, whole: bool = False, width: int = 460) -> str:
    """series: (name, colour, points, joined) with points (x, y > 0) on a logarithmic y axis, each with a mark of its own; x_limit: a
    budget, its far side shaded; whole: x counts."""
    points = [p for _, _, ps, _ in series for p in ps if p[1] > 0]
    if not points:
        return ""
    left, right, top = 62, width - 12, 24 + 14 * len(series)
    bottom, height = top + 210, top + 250
    place_x, ticks_x = _scale([*(p[0] for p in points), *([x_limit] if x_limit is not None else [])], left + 8, right - 8, False)
    place_y, ticks_y = _scale([p[1] for p in points], bottom - 6, top + 6, True)
    parts = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="currentColor" opacity=".35"/>']
    if x_limit is not None:
        x = place_x(x_limit)
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{max(0, right - x):.1f}" height="{bottom - top}" fill="#d1495b" opacity=".1"/>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#d1495b" stroke-dasharray="5 4"/>'
        )
    if whole:
        ticks_x = _whole_steps(int(min(p[0] for p in points)), int(max(p[0] for p in points)))
    last = place_x(ticks_x[-1])
    parts += [_text(place_x(t), bottom + 14, _tick(t), "end" if not whole and place_x(t) == last else "middle", 10) for t in ticks_x]
    parts += [_text(left - 5, place_y(t) + 4, f"{t:.1e}", "end", 10) for t in ticks_y]
    parts += [_text((left + right) / 2, height - 8, x_title, "middle"), _text(left, 14, y_title)]
    for number, (name, colour, ps, joined) in enumerate(series):
        spots = [(place_x(x), place_y(y)) for x, y in ps if y > 0]
        if joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (value_x, value_y) in zip(spots, ps):
            parts.append(_mark(number, x, y, colour, f"{name}: {value_x:.3g}, {value_y:.3e}"))
        parts += [_mark(number, right - 8, 10 + 14 * number, colour, name), _text(right - 18, 14 + 14 * number, name, "end")]
    return _svg(width, height, "".join(parts), title)


def _mark(number: int, x: float, y: float, colour: str, says: str) -> str:
    """A spot whose shape tells its series apart, not its colour alone."""
    shapes = ("M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z", "M-3.5,-3.5h7v7h-7z", "M0,-5l5,5l-5,5l-5,-5z", "M0,-4.5l4.5,8h-9z",
              "M0,4.5l4.5,-8h-9z", "M-4,-1.5h2.5v-2.5h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5z")
    return (f'<path d="{shapes[number % len(shapes)]}" transform="translate({x:.1f} {y:.1f})" fill="{colour}"><title>{escape(says)}</title>'
            "</path>")
