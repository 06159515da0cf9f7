"""Screen 4: how far the quantized images are from float."""

from __future__ import annotations

import math
from html import escape

from workbench.ui import figures
from workbench.ui.figures import BLUE, GREY, log_axis
from workbench.ui.tables import KNOWN, badge, megabytes, numbers, pick

METRIC_NAMES = {"psnr_db": "PSNR", "ssim": "SSIM", "vif": "VIF", "lpips": "LPIPS", "latent_nmse": "latent NMSE"}
MODES = ("slider", "flip", "beside", "difference", "blind")
_DIRECTIONS = {None: "", True: ", higher is better", False: ", lower is better"}


def _interval(value) -> str:
    return f"{value.mean:.4g}  [{value.low:.3g}, {value.high:.3g}]" if math.isfinite(value.low) else f"{value.mean:.4g}"


def comparison_numbers(comparison, *, here: bool = True) -> str:
    """Metrics with their 95 % interval over prompts, and both models' bytes and seconds; here: was it this machine that compared?"""
    rows = [
        (METRIC_NAMES.get(name, name), _interval(value), value.unit, f"measured, n = {value.n}{_DIRECTIONS[value.higher_is_better]}")
        for name, value in comparison.metrics.items()
    ]
    sizes = [
        ("transformer in memory", f"{megabytes(comparison.float_bytes)} → {megabytes(comparison.quantized_bytes)}", "MB", "exact"),
        (
            "time per image, in batches",
            f"{comparison.float_seconds_per_image:.3f} → {comparison.quantized_seconds_per_image:.3f}",
            "s",
            f"measured, {comparison.compute}",
        ),
        *_solo_timing(comparison.solo_timing, here),
    ]
    kernel = compute_badge(comparison.compute, comparison.reason, here=here)
    return kernel + numbers([*rows, *sizes], "Quantized against float (mean and 95 % interval over prompts)")


def _solo_timing(timed, here: bool) -> list[tuple]:
    if timed is None:
        return []
    expected_ms = timed.predicted_ms * timed.slower
    off = 100 * (expected_ms / timed.quantized_ms - 1)
    later = "the machine takes {:.2f} times as long now" if here else "its machine took {:.2f} times as long when it compared"
    pace = f"; {timed.predicted_ms:.0f} ms when they were, {later.format(timed.slower)}" * (timed.slower != 1)
    return [
        ("time of one image alone", f"{timed.float_ms:.0f} → {timed.quantized_ms:.0f}", "ms", "measured, quiet quarter of 9 turns"),
        ("its prediction by the cost table", f"{expected_ms:.0f} ({off:+.0f} %)", "ms", f"modelled, a sum of measured layer times{pace}"),
    ]


def pair_line(pair) -> str:
    return f"{pair.prompt} · seed {pair.seed}: PSNR {pair.psnr_db:.2f} dB, SSIM {pair.ssim:.4f}, latent NMSE {pair.latent_nmse:.3e}"


def compute_badge(compute: str, reason: str, *, here: bool = True) -> str:
    """Which kernel ran, and why no faster one did."""
    word = f"{badge(compute)} " if compute in KNOWN else ""
    why = "" if word else f", the fastest that {'this' if here else 'its'} machine has for the plan's widths"
    return f'<p class="kernel">Kernel{"" if here else " of the example run"}: {word}{escape(reason)}{why}</p>'


def error_over_steps(comparison, index: int, step: int | None = None) -> dict:
    """Latent error after each step: this prompt, the mean over all, and the step that is looked at."""
    if comparison is None:
        return figures.empty("Latent error after each step")
    chosen_T = comparison.pairs[index].latent_nmse_T
    mean_T = [sum(v) / len(comparison.pairs) for v in zip(*(p.latent_nmse_T for p in comparison.pairs))]
    steps = range(len(chosen_T))
    traces = [figures.line(steps, chosen_T, "this prompt", BLUE)]
    if len(comparison.pairs) > 1:
        traces.insert(0, figures.line(steps, mean_T, f"mean of {len(comparison.pairs)}", GREY))
    shapes = [figures.marker_line(step)] if step is not None and step < len(chosen_T) else []
    return figures.figure(
        traces,
        "latent",
        xaxis=figures.step_axis(len(chosen_T)),
        showlegend=True,
        shapes=shapes,
        yaxis=log_axis("latent NMSE", *(t["y"] for t in traces)),
    )


def grid(comparison, index: int, address, *, hidden: bool = False) -> str:
    """All prompts as pairs of small images (float, quantized), each of which can be picked; `address(image)` is where it is served.

    hidden: during a blind test the pictures would give the answer away."""
    if comparison is None:
        return ""
    if hidden:
        return '<p class="notice plain">Small pictures are hidden during the blind test: they would tell.</p>'
    cards = []
    for i, pair in enumerate(comparison.pairs):
        images = "".join(
            f'<img src="{escape(address(image))}" alt="{which}" width="96" height="96">'
            for image, which in ((pair.image_float, "float"), (pair.image_quantized, "quantized"))
        )
        cards.append(
            f'<button type="button" class="thumb" {pick({"pair": i}, tag="button")} aria-pressed="{str(i == index).lower()}">'
            f'<span class="twins">{images}</span><span>{escape(pair.prompt)}</span><small>{pair.psnr_db:.1f} dB</small></button>'
        )
    says = "compared prompts: float at the left, quantized at the right"
    return f'<div class="thumbs" data-group="1" role="group" aria-label="{says}">{"".join(cards)}</div>'


def drafts(prompts, finished: dict, address) -> str:
    """The cards of `grid` while both models draw: small pictures by stage, a blank where there is none yet."""
    cards = []
    for i, prompt in enumerate(prompts):
        sides = [(which, finished.get(f"generate {which}", ())) for which in ("float", "quantized")]
        images = "".join(f'<img src="{escape(address(done[i]))}" alt="{which}" width="96" height="96">' if i < len(done) else "<i></i>"
                         for which, done in sides)
        state = "drawing" if i >= len(sides[1][1]) else "drawn"
        words = f"<span>{escape(prompt)}</span><small>{state}</small>"
        cards.append(f'<div class="thumb draft"><span class="twins">{images}</span>{words}</div>')
    says = "prompts being drawn: float at the left, quantized at the right"
    return f'<div class="thumbs" role="group" aria-label="{says}">{"".join(cards)}</div>'


def viewer(left: str, right: str, *, mode: str, gain: float, caption: str, **more) -> dict:
    """What the comparing canvas shows: two addresses, their names and the line under them."""
    return {
        "left": left,
        "right": right,
        "labels": ["float", "quantized"],
        "mode": mode,
        "gain": gain,
        "caption": caption,
        "steps": 0,
        "at": None,
        "step_words": "",
        "tally": "",
        **more,
    }


def tally_words(wins: int, losses: int, ties: int, pairs: int) -> str:
    """The blind test so far, with the two-sided sign test over the answers that preferred one. Sides are drawn anew for every answer, so
    repeated answers on one of the `pairs` are answers of their own; but they speak of these pairs alone."""
    count = wins + losses
    if not count and not ties:
        return "No answer yet."
    text = f"float preferred {wins}, quantized preferred {losses}, no difference {ties}"
    if not count:
        return text + "."
    p = sign_test(wins, losses)
    verdict = (
        "the difference is visible"
        if p < 0.05 and wins > losses
        else "the quantized one is preferred"
        if p < 0.05
        else "no preference is shown"
        if count >= 6
        else "too few answers to tell"
    )
    judged = min(pairs, count + ties)  # they are shown in turns
    return f"{text}; p = {p:.3g} (two-sided sign test, n = {count} answers on {judged} pair{'s'[: judged > 1]}): {verdict}."


def sign_test(wins: int, losses: int) -> float:
    """Probability of a split at least this uneven if both were equally good: exact binomial with p = 1/2, two-sided."""
    count, rarer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(rarer + 1)) / 2**count)
