"""Lines and tables of numbers as escaped HTML: what every screen says beside its figures."""

from __future__ import annotations

import re
from html import escape

MB = 1e6


def notice(text: str, kind: str = "error") -> str:
    """One line where something went wrong (or well); empty text leaves no trace on the page."""
    return f'<p class="notice {kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>' if text else ""


def _breakable(text) -> str:
    """A name or path that a narrow screen may break after a dot, a slash or an underscore."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(str(text)))


def table(headers, rows, caption: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(str(h))}</th>' for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in (_breakable(first), *(escape(str(cell)) for cell in rest))) + "</tr>"
                   for first, *rest in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table class="numbers">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def numbers(rows, caption: str = "") -> str:
    """Rows of (what, value, unit, how it is known)."""
    return table(("", "value", "unit", "known as"), rows, caption)


def megabytes(count: float) -> str:
    return f"{count / MB:.2f}"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


def status(model: str, job) -> str:
    """The line on top of every screen: the model, and what is running. `job` is a Snapshot or None."""
    parts = [f'<span class="model">{escape(model)}</span>']
    if job is not None and job.active:
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
