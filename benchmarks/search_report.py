"""What `benchmarks/search.py` writes: Markdown tables with intervals, a plot, and where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workbench.metrics import interval, paired
from workbench.types import Interval

COLOURS = ("#1b6ca8", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666", "#00a0b0", "#c02942",
           "#542437", "#53777a", "#ecd078")
WIDTH, HEIGHT, MARGIN = 760, 460, 60


def mean(value: Interval, form: str) -> str:
    """Mean and half-width of the 95 % interval."""
    return f"{value.mean:{form}} ± {value.high - value.mean:{form}}" if value.n > 1 else f"{value.mean:{form}}"


def table(title: str, found: Mapping[str, object], judged: Mapping[str, object], ours: str) -> list[str]:
    """One Markdown table: every contender, its cost, quality with intervals, and the paired difference of `ours` to it."""
    lines = [f"### {title}", "", f"| plan | MB | mean act bits | latent NMSE | PSNR, dB | {ours} minus it, dB (paired) | model steps | s |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    reference = judged[ours].psnr_db_S if ours in judged else None
    order = sorted(found, key=lambda name: -interval(judged[name].psnr_db_S).mean)
    for name in order:
        each, plan = judged[name], found[name].plan
        gain = "" if reference is None or name == ours else mean(paired(reference, each.psnr_db_S), "+.2f").replace("± +", "± ")
        label = f"**{name}**" if name == ours else name
        lines.append(f"| {label} | {plan.weight_bytes / 1e6:.2f} | {plan.act_bits_mean:.2f} | {mean(interval(each.nmse_S), '.2e')} | "
                     f"{mean(interval(each.psnr_db_S), '.2f')} | {gain} | {found[name].evaluations} | {found[name].seconds:.1f} |")
    return [*lines, ""]


def beaten(ours: str, sections: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Where a rival within the same cost is better than `ours` beyond the interval of the paired difference; the goal is: nowhere."""
    lines = []
    for title, judged in sections.items():
        for name, each in judged.items():
            difference = paired(judged[ours].psnr_db_S, each.psnr_db_S)
            if name != ours and difference.high < 0:
                lines.append(f"- {title}: {name} is better by {mean(difference, '.2f')} dB")
    return lines or ["- nowhere"]


NOTES = ("PSNR and latent NMSE are against the float image of the same prompt and seed; ± is half of the 95 % interval over prompts. "
         "Seconds are of the search alone (profile and judgement apart), on a machine that may have been shared.",
         "The finalists of each search were chosen on 16 of the held-out prompts with other seeds; weights and tables on none.")


def plot(lines: Mapping[str, Sequence[tuple[float, Interval]]], title: str) -> str:
    """PSNR over mean activation bits with 95 % intervals, as an SVG that needs nothing to be seen."""
    points = [point for series in lines.values() for point in series]
    x_low, x_high = min(x for x, _ in points) - 0.2, max(x for x, _ in points) + 0.2
    y_low, y_high = min(y.mean for _, y in points) - 0.5, max(y.mean for _, y in points) + 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        return (MARGIN + (x - x_low) / (x_high - x_low) * (WIDTH - 4.6 * MARGIN),
                HEIGHT - MARGIN - (y - y_low) / (y_high - y_low) * (HEIGHT - 2 * MARGIN))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>', f'<text x="{MARGIN}" y="24" font-size="14">{title}</text>',
             f'<text x="{WIDTH / 2 - 2 * MARGIN}" y="{HEIGHT - 16}">mean activation bits</text>',
             f'<text transform="translate(16,{HEIGHT / 2 + 30}) rotate(-90)">PSNR to float, dB</text>']
    for tick in sorted({round(x, 1) for x, _ in points}):
        x, bottom = at(tick, y_low)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN}" y2="{bottom:.1f}" stroke="#eee"/>'
                     f'<text x="{x - 8:.1f}" y="{bottom + 14:.1f}">{tick:g}</text>')
    for level in range(int(y_low) + 1, int(y_high) + 1):
        x, y = at(x_low, level)
        parts.append(f'<line x1="{x:.1f}" x2="{at(x_high, level)[0]:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
                     f'<text x="{x - 22:.1f}" y="{y + 4:.1f}">{level}</text>')
    for number, (name, series) in enumerate(lines.items()):
        parts += _series(name, series, COLOURS[number % len(COLOURS)], at, number)
    return "\n".join([*parts, "</svg>", ""])


def _series(name: str, series, colour: str, at, number: int) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(x, y.mean) for x, y in series))
    bars = [f'<line x1="{at(x, 0)[0]:.1f}" x2="{at(x, 0)[0]:.1f}" y1="{at(x, y.low)[1]:.1f}" y2="{at(x, y.high)[1]:.1f}" '
            f'stroke="{colour}" opacity="0.35"/>' for x, y in series if y.n > 1]
    dots = [f'<circle cx="{at(x, y.mean)[0]:.1f}" cy="{at(x, y.mean)[1]:.1f}" r="3" fill="{colour}"/>' for x, y in series]
    key = (f'<rect x="{WIDTH - 3.4 * MARGIN}" y="{MARGIN + 18 * number - 8}" width="10" height="10" fill="{colour}"/>'
           f'<text x="{WIDTH - 3.4 * MARGIN + 16}" y="{MARGIN + 18 * number}">{name}</text>')
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *bars, *dots, key]
