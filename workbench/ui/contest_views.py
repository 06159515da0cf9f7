"""The Methods screen as HTML and figures: the table of a paper, and quality against cost. Words and numbers come from the stage."""

from __future__ import annotations

import importlib
import itertools
from html import escape

from workbench.ui import figures
from workbench.ui.figures import BLUE, GREEN, axis, log_axis, rounded
from workbench.ui.views.search import RIVALS

MB = 1e6
OURS = tuple((symbol, GREEN) for symbol in ("diamond", "diamond-open", "diamond-tall", "diamond-wide", "diamond-cross"))


def _stage():
    """The numbers and their formats; imported when first needed, since the page is built without torch."""
    return importlib.import_module("workbench.contest.table")


MARKS = {"best": "<b>{}</b>", "second": "<u>{}</u>"}


def table(found: dict | None, running: bool = False) -> str:
    """Every method with every number; best bold, second best underlined, the words beside it for who cannot see either."""
    if not found or not found["results"]:
        says = ("The first method's row appears when it is done" if running
                else "No method has been compared yet; choose some and press Compare methods")
        return f'<p class="notice info" role="status">{says}</p>'
    stage = _stage()
    shown = [name for name in stage.QUALITY if any(name in row for row in found["results"])]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (
        "method", *(title for title, _ in stage.NUMBERS.values()), *(stage.QUALITY[name][0] for name in shown), "runs as"))
    side, plain = found["float"], stage.float_numbers(found["float"])
    body = _row("float", [plain.get(name, "–") for name in stage.NUMBERS], [stage.cell(side, name) for name in shown], "float",
                found["model"])
    for row in found["results"]:
        body += _row(row["label"], [stage.cell(row, name) for name in stage.NUMBERS], [_marked(row, name) for name in shown],
                     row["compute"], f"{row['description']}; {row['reason']}")
    n = next(iter(row["psnr_db"]["n"] for row in found["results"]))
    skipped = f"; left out: {', '.join(map(_label, found['skipped']))}" if found.get("skipped") else ""
    caption = (f"{found['model']}, {found['steps']} steps, {n} prompts, 95 % intervals; best bold, second best underlined; "
               f"errors and seconds measured, bytes and bits exact{skipped}")
    return (f'<div class="scroll"><table class="numbers"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _label(name: str) -> str:
    methods = importlib.import_module("workbench.methods").METHODS
    return methods[name].label if name in methods else name


def _row(label: str, plain: list[str], marked: list[str], compute: str, title: str) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in plain) + "".join(f"<td>{html}</td>" for html in marked)
    return f'<tr title="{escape(title)}"><th scope="row">{escape(label)}</th>{cells}<td>{escape(compute)}</td></tr>'


def _marked(row: dict, name: str) -> str:
    place = row["marks"].get(name)
    text = MARKS.get(place, "{}").format(escape(_stage().cell(row, name)))
    return f'<span title="{place} of all">{text}</span>' if place else text


def pairs(found: dict | None) -> str:
    """The reference's lead over each method, prompt by prompt."""
    rows = [row for row in found["results"] if row["paired"]] if found else []
    if not rows:
        return ""
    stage, label = _stage(), next(row["label"] for row in found["results"] if row["method"] == found["reference"])
    shown = [name for name in stage.QUALITY if any(name in row["paired"] for row in rows)]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("method", *(stage.QUALITY[name][0] for name in shown)))
    body = "".join(f'<tr><th scope="row">{escape(row["label"])}</th>'
                   + "".join(f"<td>{escape(stage.paired_cell(row, name))}</td>" for name in shown) + "</tr>" for row in rows)
    caption = f"{label} minus each method, prompt by prompt, with the 95 % interval; * where it excludes zero"
    return (f'<div class="scroll"><table class="numbers"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def quality_cost(found: dict | None, front=()) -> dict:
    """Latent error against resident megabytes, with intervals; `front`: the scored plans of the search, on prompts of their own."""
    rows = found["results"] if found else []
    if not rows:
        return figures.empty("Methods appear here as they finish")
    traces, ours, others = [], itertools.cycle(OURS), itertools.cycle(RIVALS.values())
    for row in rows:
        error = row["latent_nmse"]
        symbol, colour = next(ours if row["method"].startswith("adatsq") else others)
        traces.append({"type": "scatter", "mode": "markers", "name": row["label"], "x": [rounded(row["weight_bytes"] / MB, 6)],
                       "y": [rounded(error["mean"])], "marker": {"size": 11, "color": colour, "symbol": symbol, "line": {"width": 2}},
                       "error_y": _bars(error),
                       "hovertemplate": f"{row['label']}<br>%{{x}} MB, {row['act_bits_mean']:.2f} act bits<br>NMSE %{{y}}<extra></extra>"})
    if front:
        ordered = sorted(front, key=lambda scored: scored.plan.weight_bytes)
        traces.insert(0, {"type": "scatter", "mode": "markers", "name": "front of the search (its own prompts)",
                          "x": [rounded(s.plan.weight_bytes / MB, 6) for s in ordered], "y": [rounded(s.error) for s in ordered],
                          "text": [f"{s.plan.act_bits_mean:.2f} act bits" for s in ordered], "marker": {"size": 6, "color": BLUE},
                          "hovertemplate": "%{x} MB, %{text}<br>NMSE %{y}<extra>front</extra>"})
    ends = [y + sign * bar for trace in traces for y, name, sign in ((trace["y"][0], "array", 1), (trace["y"][0], "arrayminus", -1))
            for bar in trace.get("error_y", {}).get(name, ())]
    values = [y for trace in traces for y in trace["y"]] + ends
    return figures.figure(traces, f"methods-{len(rows)}", xaxis=axis("transformer, MB"), yaxis=log_axis("latent NMSE", values),
                          showlegend=True)


def _bars(error: dict) -> dict:
    """An interval over one prompt has no bounds to draw."""
    if error["n"] < 2:
        return {"visible": False}
    return {"type": "data", "symmetric": False, "array": [error["high"] - error["mean"]],
            "arrayminus": [min(error["mean"] - error["low"], error["mean"] * 0.9)]}  # a bar below 0 has no place on a log axis
