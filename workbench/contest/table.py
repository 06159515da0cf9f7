"""From measurements to what is shown: intervals, paired differences, best and second best; CSV, Markdown, the grid of images.

Letters: S samples, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from workbench import csvtable, metrics
from workbench.methods import METHODS
from workbench.types import Interval

if TYPE_CHECKING:
    from workbench.contest.compare import FloatRun, MethodResult

MB = 1_000_000
REFERENCE = "adatsq"  # whom the others are paired with by default
# title, format, higher is better
QUALITY = {"psnr_db": ("PSNR dB", ".2f", True), "ssim": ("SSIM", ".4f", True), "vif": ("VIF", ".4f", True),
           "lpips": ("LPIPS", ".4f", False), "latent_nmse": ("latent NMSE", ".2e", False), "retrieval": ("retrieval", ".1%", True)}
NUMBERS = {"weight_bits_quantized": ("bits, layers", ".2f"), "weight_bits_total": ("bits, whole", ".2f"), "weight_bytes": ("MB", ".2f"),
           "act_bits_mean": ("act bits", ".2f"), "act_bits_macs": ("act bits, by MACs", ".2f"), "quantize_seconds": ("quantize s", ".1f"),
           "search_seconds": ("search s", ".1f"), "seconds_per_image": ("s per image", ".3f")}


def table(bundle, float_run: FloatRun, results: Sequence[MethodResult], reference: str = "") -> dict:
    """{"float", "reference", "results"}: intervals over prompts; `paired`: reference minus method, prompt by prompt; `marks`: in
    which metrics a method is best or second best of all."""
    against = _reference(results, reference)
    rows = [_row(result, against) for result in results]
    for name, (_, _, higher) in QUALITY.items():
        ranked = sorted({row[name]["mean"] for row in rows if name in row}, reverse=higher)  # equals share a place
        for row in rows:
            place = ranked.index(row[name]["mean"]) if name in row else None
            row["marks"] |= {name: ("best", "second")[place]} if place in (0, 1) else {}
    side = {"weight_bytes": bundle.float_bytes, "seconds_per_image": float_run.made.seconds_per_image}
    if float_run.retrieved:
        side["retrieval"] = _plain(metrics.proportion(float_run.retrieved))
    return {"float": side, "reference": against.method if against else None, "results": rows}


def _reference(results: Sequence[MethodResult], wanted: str) -> MethodResult | None:
    by_name = {result.method: result for result in results}
    return by_name.get(wanted or REFERENCE) or (results[-1] if results else None)


def _row(result: MethodResult, against: MethodResult | None) -> dict:
    method = METHODS.get(result.method)
    row = {"method": result.method, "label": method.label if method else result.method,
           "description": method.description if method else "", "weight_bytes": result.weight_bytes,
           "act_bits_mean": result.plan.act_bits_mean, "act_bits_macs": result.plan.act_bits_macs,
           "weight_bits_quantized": result.weight_bits_quantized, "weight_bits_total": result.weight_bits_total,
           "quantize_seconds": result.quantize_seconds, "search_seconds": result.search_seconds,
           "search_evaluations": result.search_evaluations, "seconds_per_image": result.seconds_per_image,
           "compute": result.compute, "reason": result.reason, "plan_id": result.plan.plan_id, "marks": {}}
    for name, values in result.values.items():
        row[name] = _plain(metrics.interval_of(name, values))
    if result.retrieved:
        row["retrieval"] = _plain(metrics.proportion(result.retrieved))
    row["paired"] = None if against is None or against.method == result.method else {
        name: _plain(metrics.paired(against.values[name], values)) for name, values in result.values.items()} | (
        {"retrieval": _plain(metrics.cut(metrics.paired(against.retrieved, result.retrieved), -1.0, 1.0))} if result.retrieved else {})
    return row


def _plain(interval: Interval) -> dict:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}


def csv_text(found: dict) -> str:
    """One line per method; an interval takes three columns, a paired difference too."""
    shown = [name for name in QUALITY if any(name in row for row in found["results"])]
    header = ["method", "label", *NUMBERS, "compute", *(f"{name}_{part}" for name in shown for part in ("mean", "low", "high", "n")),
              *(f"{found['reference']}_minus_this_{name}_{part}" for name in shown for part in ("mean", "low", "high"))]
    rows = []
    for row in found["results"]:
        intervals = [row.get(name, {}).get(part, "") for name in shown for part in ("mean", "low", "high", "n")]
        pairs = [(row["paired"] or {}).get(name, {}).get(part, "") for name in shown for part in ("mean", "low", "high")]
        rows.append([row["method"], row["label"], *(row[name] for name in NUMBERS), row["compute"], *intervals, *pairs])
    return csvtable.write(header, rows)


def cell(row: dict, name: str) -> str:
    """A number for people: an interval as mean and half-width, or as its bounds where it is lopsided."""
    if name in NUMBERS:
        return f"{row[name] / (MB if name == 'weight_bytes' else 1):{NUMBERS[name][1]}}"
    if name not in row:
        return "–"
    value, form = row[name], QUALITY[name][1]
    if value["n"] == 1:
        return f"{value['mean']:{form}} (n = 1)"
    if name == "retrieval":
        return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}} ± {value['high'] - value['mean']:{form}}"


def paired_cell(row: dict, name: str) -> str:
    """The reference's lead over a method, with its interval; an asterisk where zero is outside."""
    value = (row["paired"] or {}).get(name)
    if value is None:
        return "–"
    form = QUALITY[name][1].replace("%", "f") if name != "retrieval" else "+.1%"
    form = form if form.startswith("+") else f"+{form}"
    apart = "*" if value["low"] > 0 or value["high"] < 0 else ""
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]{apart}"


def markdown_text(found: dict) -> str:
    """The table as in a paper: best bold, second best underlined; below it the paired differences."""
    shown = [name for name in QUALITY if any(name in row for row in found["results"])]
    titles = ["method", *(NUMBERS[name][0] for name in NUMBERS), *(QUALITY[name][0] for name in shown), "runs as"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), _float_line(found, shown)]
    for row in found["results"]:
        cells = [row["label"], *(cell(row, name) for name in NUMBERS), *(_marked(row, name) for name in shown), row["compute"]]
        lines.append("| " + " | ".join(cells) + " |")
    if len(found["results"]) > 1:
        label = next(row["label"] for row in found["results"] if row["method"] == found["reference"])
        pairs = [name for name in shown if any(name in (row["paired"] or {}) for row in found["results"])]
        lines += ["", f"{label} minus each method, prompt by prompt (95 % interval; \\* where it excludes zero):", "",
                  "| method | " + " | ".join(QUALITY[name][0] for name in pairs) + " |", "|" + "---|" * (len(pairs) + 1)]
        lines += ["| " + " | ".join([row["label"], *(paired_cell(row, name).replace("*", "\\*") for name in pairs)]) + " |"
                  for row in found["results"] if row["paired"]]
    return "\n".join(lines) + "\n"


def float_numbers(side: dict) -> dict[str, str]:
    """The float model's cells among NUMBERS; what it does not have is absent."""
    return {"weight_bytes": f"{side['weight_bytes'] / MB:.2f}", "seconds_per_image": f"{side['seconds_per_image']:.3f}",
            "weight_bits_quantized": "16", "weight_bits_total": "16", "act_bits_mean": "float", "act_bits_macs": "float"}


def _float_line(found: dict, shown: list[str]) -> str:
    side, numbers = found["float"], float_numbers(found["float"])
    cells = ["float", *(numbers.get(name, "–") for name in NUMBERS), *(cell(side, name) for name in shown), "float"]
    return "| " + " | ".join(cells) + " |"


def _marked(row: dict, name: str) -> str:
    return {"best": "**{}**", "second": "<u>{}</u>"}.get(row["marks"].get(name), "{}").format(cell(row, name))


def image_grid(float_run: FloatRun, results: Sequence[MethodResult], columns: int = 8) -> np.ndarray:
    """Rows are methods, float first; columns are prompts, spread over all of them. uint8 (H, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    made = float_run.made
    shown_S = np.linspace(0, len(made.prompts) - 1, min(columns, len(made.prompts))).round().astype(int)
    rows = [("float", made.images), *((METHODS[e.method].label if e.method in METHODS else e.method, e.images) for e in results)]
    height, width = made.images.shape[1:3]
    margin, header, gap, font = 150, 34, 4, ImageFont.load_default(size=13)
    canvas = Image.new("RGB", (margin + len(shown_S) * (width + gap), header + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, sample in enumerate(shown_S):
        words = made.prompts[sample]
        draw.text((margin + x * (width + gap) + 2, 8), words if len(words) <= width // 7 else words[: width // 7 - 1] + "…", "black", font)
    for y, (label, images) in enumerate(rows):
        top = header + y * (height + gap)
        draw.text((6, top + height // 2 - 8), label, "black", font)
        for x, sample in enumerate(shown_S):
            canvas.paste(Image.fromarray(np.ascontiguousarray(images[sample])), (margin + x * (width + gap), top))
    return np.asarray(canvas)
