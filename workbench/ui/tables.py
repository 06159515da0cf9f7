"""Lines, badges and tables of numbers as escaped HTML: what every screen says beside its figures."""

from __future__ import annotations

import json
import re
from html import escape

MB = 1e6
# How a number is known: word, mark and what it means. The mark differs too, so that colour is never alone.
KNOWN = {
    "exact": ("=", "follows from sizes alone, without any measurement"),
    "measured": ("●", "really run, with this model; on this machine unless another is named"),
    "modelled": ("◐", "computed from a model of cost or error, not measured"),
    "emulated": ("◇", "low-bit numbers in a float product: right values, but its seconds say nothing about speed"),
}


def badge(word: str) -> str:
    """A small label that says how a number is known; unknown words are shown as they are."""
    kind = word.split()[0] if word else ""
    mark, meaning = KNOWN.get(kind, ("", ""))
    shown = f'<i aria-hidden="true">{mark}</i>{escape(word)}'
    return f'<span class="known {escape(kind)}" title="{escape(meaning)}">{shown}</span>' if word else ""


def known(text: str) -> str:
    """ "measured, 8 held-out prompts" as a badge and the rest."""
    word, comma, rest = text.partition(",")
    return f'<span class="whole">{badge(word)}{comma}</span>{escape(rest)}' if word in KNOWN else escape(text)


def notice(text: str, kind: str = "error") -> str:
    """One line where something went wrong (or well); empty text leaves no trace on the page."""
    return f'<p class="notice {kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>' if text else ""


def empty(title: str, text: str, button: str = "") -> str:
    """What will be here, and what brings it; `button` is HTML."""
    return f'<div class="empty"><b>{escape(title)}</b><span>{escape(text)}</span>{button}</div>'


def pick(payload: dict, *, tag: str = "span") -> str:
    """Attributes of an element that sends `payload` when it is picked."""
    reach = ' tabindex="0" role="button"' if tag != "button" else ""
    return f'data-pick="{escape(json.dumps(payload))}"{reach}'


def _breakable(text) -> str:
    """A name or path that a narrow screen may break after a dot, a slash or an underscore."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(str(text)))


def _value(text) -> str:
    """A number, or an interval, stays in one piece on a narrow screen."""
    whole = re.fullmatch(r"[\d+\[-]\S*|\[.*\]", str(text))
    return f'<span class="whole">{escape(str(text))}</span>' if whole else escape(str(text))


def table(headers, rows, caption: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(str(h))}</th>' for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in (_breakable(first), *map(_value, rest))) + "</tr>"
                   for first, *rest in rows)
    return framed(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", caption)


def framed(content: str, caption: str = "", kind: str = "") -> str:
    """A table's content in its scrolling frame."""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table class="numbers {kind}">{title}{content}</table></div>'


def numbers(rows, caption: str = "") -> str:
    """Rows of (what, value, unit, how it is known). Two spaces in a value are where a narrow screen may break it."""
    def row(what, value, unit, how) -> str:
        shown = "  ".join(map(_value, str(value).split("  ")))
        return f'<tr><th scope="row">{_breakable(what)}</th><td><b>{shown}</b> {escape(str(unit))}</td><td>{known(how)}</td></tr>'

    body = "".join(row(*each) for each in rows)
    head = '<thead><tr><th></th><th scope="col">value</th><th scope="col">known as</th></tr></thead>'
    return framed(f"{head}<tbody>{body}</tbody>", caption, "facts")


def pick_table(headers, rows, caption: str, *, numeric: tuple[int, ...] = ()) -> str:
    """Rows of (payload, is it the chosen one, cells): every row can be picked with the mouse or with Enter."""
    shade = [' class="num"' if i in numeric else "" for i in range(len(headers))]
    head = "".join(f'<th scope="col"{s}>{escape(str(h))}</th>' for h, s in zip(headers, shade))
    body = ""
    for payload, chosen, cells in rows:
        shown = "".join(f"<td{s}>{escape(str(cell)) if s else _breakable(cell)}</td>" for cell, s in zip(cells, shade))
        body += f'<tr {pick(payload, tag="tr")} aria-pressed="{str(bool(chosen)).lower()}">{shown}</tr>'
    return framed(f'<thead><tr>{head}</tr></thead><tbody data-group="1">{body}</tbody>', caption, "selection")


def megabytes(count: float) -> str:
    return f"{count / MB:.2f}"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


def status(title: str, model: str, job) -> str:
    """The line on top of every screen: the model, and what is running. `job` is a Snapshot or None."""
    active = job is not None and job.active
    lamp = f'<i class="lamp {"on" if active else ""}" aria-hidden="true"></i>'
    parts = [f"<h1>{escape(title)}</h1>", f'<span class="model">{lamp}{escape(model)}</span>']
    if active:
        parts.append(f'<span class="job">{escape(job_line(job))}</span>')
        if job.total:
            parts.append(f'<progress max="{job.total}" value="{job.done}" aria-label="{escape(job.stage)}"></progress>')
    elif job is not None and job.kind != "load":
        parts.append(f'<span class="job idle">{escape(job_line(job))}</span>')
    return f'<div class="status" role="status">{"".join(parts)}</div>'


def job_line(job) -> str:
    if job.state == "queued":
        return f"{job.kind}: waiting, {job.ahead} ahead" if job.ahead else f"{job.kind}: starting"
    if job.state != "running":
        return f"{job.kind}: {job.state} after {seconds(job.seconds)}"
    text = job.kind if job.stage == job.kind else f"{job.kind}: {job.stage or 'starting'}"
    if job.total:
        text += f" {job.done}/{job.total}"
    if job.eta_s is not None and job.done < job.total:
        text += f", about {seconds(job.eta_s)} left in this stage"
    return f"{text} ({job.message})" if job.message else text
