"""The guided first visit: four steps, each with its one button, from the model that is already loaded to a checkpoint.

The tour uses small settings so that two cores finish it in under two minutes; the screens' own buttons use the visitor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from workbench.options import LatencyConfig, QuantConfig, SearchConfig, SensitivityConfig
from workbench.ui import budgets
from workbench.ui.actions import compare, export, search, sensitivity
from workbench.ui.session import Session
from workbench.ui.tables import KNOWN, badge, notice, pick

TOUR_STEPS, TOUR_PROMPTS, TOUR_COMPARED = 8, 8, 4
TOUR_SENSITIVITY = SensitivityConfig(probes=1)
TOUR_SEARCH = SearchConfig(beam=2, samples=2, finalists=1)
WORDS = (
    f"The tour uses small settings: {TOUR_STEPS} steps, {TOUR_PROMPTS} prompts, a beam of {TOUR_SEARCH.beam}. "
    "The buttons on the screens use yours."
)


@dataclass(frozen=True)
class Stop:
    """One step of the tour: the screen it happens on, the kind of its job, and what the button and the tick say."""

    screen: str
    job: str
    button: str
    done: str


GLOSSARY = {
    "latent": "the small array that a transformer denoises step by step; the image is decoded from the last one",
    "Fisher information": "the mean square of the loss's gradient at a layer's output: how far a small disturbance there moves the result",
    "NMSE": "squared error of the latent as a share of the latent's own square; 0.001 is 30 dB",
    "W4A8": "weights stored in 4 bits, activations rounded to 8 bits on their way into a product",
    "front": "the plans that no other plan beats in memory, bits and error at once; its knee is the best compromise of the three",
    "beam search": "keeps the few best of all half-made plans, step by step; candidates are what it tries, survivors what it keeps",
    "Lagrangian sweep": "the cheapest plans when an error and a bit are given a price each, for a range of prices",
    "refinement": "small changes of the best plans, kept where the measured error falls",
    "Hadamard rotation": "mixes the channels of an activation so that no single one needs a wide range",
    "PSNR, SSIM, VIF, LPIPS": "how like two images are: by pixels (dB), by structure, by information, and as a trained network sees it",
}
STOPS = (
    Stop("sensitivity", "profile", "Map what is fragile", "Mapped"),
    Stop("search", "search", "Search a plan", "Searched"),
    Stop("compare", "compare", "Compare images", "Compared"),
    Stop("export", "export", "Take it away", "Exported"),
)


def _reached(session: Session) -> list[bool]:
    own = session.profile is not None and session.example is None
    return [own, own and session.result is not None, own and session.comparison is not None, own and session.exported is not None]


def here(session: Session) -> int:
    """Index of the step that is next; 4 when the tour is done."""
    return next((i for i, done in enumerate(_reached(session)) if not done), len(STOPS))


def view(session: Session) -> str:
    """The four steps in a row: done ones lead to their screen, the next one does its work."""
    now, reached = here(session), _reached(session)
    running = session.job.kind if session.busy and session.job is not None else ""
    items = []
    for i, stop in enumerate(STOPS):
        active = running == stop.job
        enabled = reached[i] or (i == now and not running and session.bundle is not None)
        state = "running" if active else "done" if reached[i] else "next" if i == now else "later"
        words = f"{stop.button} …" if active else stop.done if reached[i] else stop.button
        mark = "✓" if reached[i] else str(i + 1)
        current = ' aria-current="step"' if i == now else ""
        items.append(
            f'<li class="{state}"><button type="button" {pick({"stop": i}, tag="button")}{"" if enabled else " disabled"}{current}>'
            f'<i aria-hidden="true">{mark}</i>{escape(words)}</button></li>'
        )
    note = f"<p>{escape(WORDS)}</p>" if now < len(STOPS) and not any(reached) else ""
    problem = notice(*session.notices.get("tour", ("", "")))
    return f'<nav class="tour" aria-label="guided visit"><ol>{"".join(items)}</ol>{note}{problem}</nav>'


def glossary() -> str:
    """What the words and marks on the screens mean, behind one line."""
    words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in GLOSSARY.items())
    marks = "".join(f"<dt>{badge(word)}</dt><dd>{escape(meaning)}</dd>" for word, (_, meaning) in KNOWN.items())
    return f'<details class="glossary"><summary>What the words and marks mean</summary><dl>{words}{marks}</dl></details>'


def follow(session: Session, payload) -> None:
    """A step was clicked: go to its screen; if it is the next one, do its work with the tour's settings."""
    index = payload.get("stop") if isinstance(payload, dict) else None
    if not isinstance(index, int) or not 0 <= index < len(STOPS):
        return
    session.set(screen=STOPS[index].screen)
    if index != here(session) or session.busy:
        return
    (_profile, _search, _compare, export.export)[index](session)


def _profile(session: Session) -> None:
    prompts = (session.prompts or session.bundle.prompts("calibration"))[:TOUR_PROMPTS]
    kept = session.prompts, session.steps
    sensitivity.profile(
        session,
        TOUR_STEPS,
        session.seed,
        "\n".join(prompts),
        *(getattr(TOUR_SENSITIVITY, name) for name in sensitivity.SENSITIVITY_INPUTS),
        *(getattr(QuantConfig(), name) for name in sensitivity.QUANT_INPUTS),
        LatencyConfig().target,
    )
    session.prompts, session.steps = kept


def _search(session: Session) -> None:
    limits = [session.budget.get(axis.field) for axis in budgets.AXES]
    search.search(session, *limits, *(getattr(TOUR_SEARCH, name) for name in search.SEARCH_INPUTS))


def _compare(session: Session) -> None:
    prompts, seed, _ = session.compare_form
    compare.compare(session, "\n".join(prompts[:TOUR_COMPARED]), seed, len(session.chosen.plan.sigma_T))
