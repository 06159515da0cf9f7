"""Everything known of a plan as one HTML page that opens offline: no script, no request, images inside as PNG."""

from __future__ import annotations

import base64
import datetime
import os
import platform
from html import escape

from workbench.ui import budgets, drawings
from workbench.ui.figures import BIT_COLOURS, BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from workbench.ui.pictures import png
from workbench.ui.views import compare as compare_views
from workbench.ui.views import export as export_views
from workbench.ui.views import model as model_views
from workbench.ui.views import plans, quantities
from workbench.ui.views import sensitivity as sensitivity_views
from workbench.ui.views.layers import blocks_of, layer_labels
from workbench.ui.widget import STATIC

COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)
PAIRS = len(COLOURS)
STYLE = (STATIC / "report.css").read_text(encoding="utf-8")
MEANING = """<ul><li><b>exact</b> follows from sizes alone; <b>measured</b> was really run, on the machine named above;
<b>modelled</b> comes from a
model of cost or error; <b>emulated</b> means low-bit numbers in a float product: the values are right, the seconds say nothing about
speed.</li><li>Transformer in memory counts packed weights, scales and everything kept in float (2 bytes a parameter), to the byte. A
megabyte is 10<sup>6</sup> bytes.</li><li>Quality is against the float image of the same seed: mean and 95 % interval over prompts, with n.
NMSE is the squared error of the final latent over its squared norm.</li></ul>"""


def write(session) -> str:
    """The page, from whatever the session has."""
    from workbench.latency import cpu_name  # brings torch

    bundle = session.bundle
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    name = f"{bundle.name}, plan {session.chosen.plan.plan_id}" if session.chosen else bundle.name
    machine = "" if session.example else f"; {cpu_name()}, {os.cpu_count()} cores, {platform.system()}"  # an example names its own
    parts = [
        f"<h1>{escape(name)}</h1><p>Written by the AdaTSQ Workbench on {escape(now)}{escape(machine)}. "
        f"Model {escape(bundle.model_hash)}.</p>"
    ]
    if session.example:
        parts.append(f"<p><b>{escape(session.example)}</b></p>")
    parts.append(model_views.model_summary(bundle))
    for section in (_sensitivity, _front, _plan, _comparison):
        parts.append(section(session))
    parts.append(f"<h2>What the numbers mean</h2>{MEANING}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _sensitivity(session) -> str:
    found, layers = session.profile, session.bundle.layers
    if found is None:
        return ""
    rows = found.sensitivity.fisher_TL.tolist()
    blocks = blocks_of(layers)
    chart = drawings.log_map(
        quantities.by_block(rows, blocks, "mean"), blocks, "Fisher information, block by step, mean of a block's layers"
    )
    said = sensitivity_views.insight(rows, layers, "fisher", "Fisher information")
    return f'<h2>Where the model is fragile</h2><p>{escape(said)}</p><div class="scroll">{chart}</div>'


def _front(session) -> str:
    result = session.result
    if result is None:
        return ""
    charts = []
    for axis in budgets.AXES:
        series = [
            (label, colour, [(axis.shown(s.plan), s.error) for s in given if axis.shown(s.plan) is not None], False)
            for label, colour, given in (
                ("front", BLUE, result.front),
                ("references", ORANGE, result.references),
                ("chosen", GREEN, [s for s in result.front if session.chosen and s.plan.plan_id == session.chosen.plan.plan_id]),
            )
        ]
        charts.append(
            drawings.plot(
                series,
                f"error against {axis.label}",
                x_title=axis.label if axis.unit in axis.label else f"{axis.label}, {axis.unit}",
                y_title=plans.ERROR,
                x_limit=session.budget.get(axis.field),
            )
        )
    samples = result.front[0].samples
    says = (f"{len(result.front)} plans, {result.evaluations:,} model evaluations. Errors here are means over {samples} calibration "
            f"prompt{'s'[: samples > 1]}, the chosen plan's too. A dashed line is a budget as the sliders stand; beyond it is shaded.")
    return f"<h2>The front</h2><p>{says}</p>{''.join(charts)}"


def _plan(session) -> str:
    if session.chosen is None:
        return ""
    plan, layers = session.chosen.plan, session.bundle.layers
    chart = drawings.colour_map(
        [list(column) for column in zip(*plan.act_bits_TL)],
        layer_labels(layers),
        lambda bits: BIT_COLOURS.get(bits, "none"),
        "activation bits, layer by step",
        words=lambda bits: "float" if bits is None else f"{bits} bits",
        marks=True,
        first_Y=plan.weight_bits_L,
    )
    numbers = plans.plan_numbers(session.chosen, session.bundle, session.profile and session.profile.costs)
    return (
        f"<h2>The chosen plan</h2>{numbers}{_made_with(session)}<p>{escape(export_views.bit_sentence(plan, layers))}</p>"
        f'<div class="scroll" style="white-space:nowrap">{chart}</div>'
    )


def _made_with(session) -> str:
    """The settings that the numbers rest on."""
    plan, found = session.chosen.plan, session.profile
    quant = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.quant.model_dump(mode="json").items())
    says = f"Weights are solved with: {quant}."
    if found is not None:
        seeds = f", seeds from {found.trace.seeds[0]}" if found.trace is not None else ""
        says = f"Profile: {found.sensitivity.samples} calibration prompts{seeds}, {found.sensitivity.steps} steps. {says}"
    return f"<p>{escape(says)}</p>"


def _comparison(session) -> str:
    comparison = session.comparison
    if comparison is None:
        return ""
    pairs = comparison.pairs[:PAIRS]
    pictures = "".join(
        f'<span class="pair"><b>{escape(p.prompt)}</b>{_image(p.image_float, "float")}{_image(p.image_quantized, "quantized")}'
        f"<br>{p.psnr_db:.2f} dB, SSIM {p.ssim:.4f}, seed {p.seed}</span>"
        for p in pairs
    )
    fewer = f"<p>The first {PAIRS} of {len(comparison.pairs)} prompts; the numbers are over all.</p>" * (len(comparison.pairs) > PAIRS)
    curves = [(p.prompt, colour, list(enumerate(p.latent_nmse_T)), True) for p, colour in zip(pairs, COLOURS)]
    chart = drawings.plot(curves, "latent error after each step", x_title="step (0 = noisiest)", y_title="latent NMSE", whole=True)
    return (
        f"<h2>Float (left) against quantized (right)</h2>{fewer}{pictures}"
        f"{compare_views.comparison_numbers(comparison, here=not session.example)}"
        f"{chart}"
    )


def _image(image, which: str) -> str:
    return f'<img alt="{which}" src="data:image/png;base64,{base64.b64encode(png(image)).decode()}">'
