"""Screen 4: generate both, look at a pair, a step, or two images without knowing which is which."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from workbench.options import BadInput, TraceConfig
from workbench.ui import inputs, limits, pictures, widget
from workbench.ui.actions.common import (
    bundle_of,
    chosen_of,
    compared_levels,
    go_to_step,
    noise_levels,
    profile_of,
    same_noise,
    show_step,
)
from workbench.ui.session import KEPT_COMPARISONS, OF_COMPARISON, Session
from workbench.ui.views import compare as views
from workbench.zerogpu import stages

GAINS = (1, 64)


@dataclass(frozen=True, kw_only=True)
class Blind:
    """A blind test: which pair is shown, whether A is the float image, and how the answers fell."""

    pair: int
    float_is_a: bool
    wins: int = 0
    losses: int = 0
    ties: int = 0


def quantized_model(session: Session, scored, on_progress):
    """A plan as a quantized model, made once."""
    bundle, found = bundle_of(session), profile_of(session)
    if session.quantized is None or session.quantized[0] != scored.plan.plan_id:
        session.quantized = (scored.plan.plan_id, stages().quantize(bundle, found, scored.plan, on_progress=on_progress))
    return session.quantized[1]


def compare(session: Session, prompts_text, seed, steps) -> None:
    bundle = bundle_of(session)
    profile_of(session)
    scored = chosen_of(session)  # another may be chosen before its turn comes
    plan_id = scored.plan.plan_id
    config = inputs.read(TraceConfig, ("steps", "seed"), (steps, seed), prompts=inputs.prompts(prompts_text))
    most = limits.here().compared
    if not 1 <= len(config.prompts) <= most:
        raise BadInput(f"{len(config.prompts)} prompts to compare; write 1 to {most}, one per line")
    limits.here().check(steps=config.steps)

    def work(on_progress):
        model = quantized_model(session, scored, on_progress)
        result = stages().compare(bundle, model, config.prompts, config.seed, config.steps, on_progress=on_progress)
        for pair in result.pairs:  # written now, so that no click has to wait for it
            pictures.address(session, pair.image_float), pictures.address(session, pair.image_quantized)
        with session.lock:
            session.put("comparisons", plan_id, result, KEPT_COMPARISONS)
            session.set(drafts=None)
            if session.chosen is None or session.chosen.plan.plan_id != plan_id:
                session.notify("compare", f"plan {plan_id} was drawn; choose it again to see its images", "info")
                return
            session.set(comparison=result, **OF_COMPARISON, mode="slider" if session.mode == "blind" else session.mode)
        _time(session, model, plan_id, result, on_progress)

    session.require_idle()
    session.compare_form = (config.prompts, config.seed, config.steps)
    session.set(drafts={"plan": plan_id})
    session.submit("compare", "compare", work, {"drafts": None})


def _time(session: Session, model, plan_id: str, result, on_progress) -> None:
    """The images are there; the two rows that say what one of them takes by itself follow."""
    solo_timing = stages().solo_timing(bundle_of(session), model, len(result.pairs[0].latent_nmse_T), result.float_seconds_per_image,
                                       on_progress=on_progress)
    with session.lock:
        if solo_timing is None or session.comparisons.get(plan_id) is not result:
            return
        timed = replace(result, solo_timing=solo_timing)
        session.put("comparisons", plan_id, timed, KEPT_COMPARISONS)
        if session.comparison is result:
            session.set(comparison=timed)


def pick_pair(session: Session, payload) -> None:
    """A card of the grid."""
    count = len(session.comparison.pairs) if session.comparison else 0
    index = widget.picked(payload, "pair", count)
    if index is not None:
        session.set(pair=index)
        show_step(session)


def pick_or_draw(session: Session, payload) -> None:
    """On the Search screen: a card of the grid, or the button that draws the chosen plan's images."""
    if isinstance(payload, dict) and payload.get("draw") is True:
        prompts, seed, _ = session.compare_form
        compare(session, "\n".join(prompts), seed, len(chosen_of(session).plan.sigma_T))
    else:
        pick_pair(session, payload)


def look(session: Session, payload) -> None:
    """What the visitor did on the comparing canvas."""
    if session.comparison is None or not isinstance(payload, dict):
        return
    what = payload.get("what")
    if what == "mode" and payload.get("mode") in views.MODES:
        session.set(mode=payload["mode"], blind=_next_blind(session, session.blind) if payload["mode"] == "blind" else session.blind)
    elif what == "gain" and isinstance(payload.get("gain"), int | float):
        session.set(gain=float(min(max(payload["gain"], GAINS[0]), GAINS[1])))
    elif what == "step":
        steps = len(session.comparison.pairs[session.pair].latent_nmse_T)
        step = widget.picked(payload, "step", steps + 1)
        if step is not None:
            go_to_step(session, None if step == steps else step)
    elif what == "vote" and session.blind is not None and payload.get("choice") in ("a", "b", "same"):
        vote(session, payload["choice"])


def click_curve(session: Session, payload) -> None:
    """A point of the error curve is a step."""
    if session.comparison is not None:
        step = widget.picked(payload, "row", len(session.comparison.pairs[session.pair].latent_nmse_T))
        if step is not None:
            go_to_step(session, step)


def vote(session: Session, choice: str) -> None:
    """An answer of the blind test: count it and go on with another pair, in an order of its own."""
    blind = session.blind
    if choice == "same":
        blind = replace(blind, ties=blind.ties + 1)
    elif (choice == "a") == blind.float_is_a:
        blind = replace(blind, wins=blind.wins + 1)
    else:
        blind = replace(blind, losses=blind.losses + 1)
    session.set(blind=_next_blind(session, blind))


def _next_blind(session: Session, blind: Blind | None) -> Blind:
    count, order = len(session.comparison.pairs), random.SystemRandom()
    shown = order.randrange(count) if blind is None else (blind.pair + 1) % count
    return replace(blind or Blind(pair=shown, float_is_a=True), pair=shown, float_is_a=bool(order.getrandbits(1)))


def drawing(session: Session) -> bool:
    """Is the chosen plan being drawn?"""
    return session.drafts is not None and session.chosen is not None and session.drafts["plan"] == session.chosen.plan.plan_id


def missing(session: Session) -> str:
    """What has to come before the chosen plan's images can be drawn; empty where nothing has."""
    if session.chosen is None:
        return "Choose a plan on the Search screen first."
    if session.example is not None:
        return "The example run holds no solved weights: press 1 above to make your own profile, then any plan can be drawn."
    if session.profile is None:
        return "Profile the model first, on the Sensitivity screen: that solves the plan's weights."
    return f"Images can be drawn when the {session.job.kind} has ended." if session.busy else ""


def _nothing_yet(session: Session) -> str:
    """What stands where the images will be, and what brings them."""
    if drawing(session):
        return "Both models draw the same seeds; small pictures appear below as they are finished."
    return missing(session) or "Press Generate: both models draw the same seeds."


def cards(session: Session) -> str:
    """The compared prompts as small pictures; while they are being drawn, what is finished so far."""
    def address(image):
        return pictures.address(session, image)

    if drawing(session):
        return views.drafts(session.compare_form[0], session.drafts, address)
    return views.grid(session.comparison, session.pair, address, hidden=session.mode == "blind")


def shown_pair(session: Session) -> int:
    """Index of the pair on the canvas: a blind test has its own."""
    return session.blind.pair if session.mode == "blind" and session.blind is not None else session.pair


def marked_step(session: Session) -> int | None:
    """The step of the shown comparison that is selected: the one that is looked at, or the nearest in noise to that of other screens."""
    return session.at_step if session.at_step is not None else same_noise(session.cell[1], noise_levels(session), compared_levels(session))


def shown(session: Session) -> dict:
    """What the comparing canvas shows now."""
    comparison = session.comparison
    if comparison is None:
        return views.viewer(
            "",
            "",
            mode="slider",
            gain=session.gain,
            caption="",
            nothing=_nothing_yet(session),
        )
    blinded = session.blind is not None
    shared = {"mode": "slider" if session.mode == "blind" and not blinded else session.mode, "gain": session.gain}
    if session.mode == "blind" and blinded:
        blind = session.blind
        pair = comparison.pairs[shown_pair(session)]
        first, second = pictures.address(session, pair.image_float), pictures.address(session, pair.image_quantized)
        left, right = (first, second) if blind.float_is_a else (second, first)
        tally = views.tally_words(blind.wins, blind.losses, blind.ties, len(comparison.pairs))
        return views.viewer(left, right, labels=["A", "B"], caption=pair.prompt, tally=tally, **shared)
    pair = comparison.pairs[session.pair]
    steps, step = len(pair.latent_nmse_T), session.at_step
    more = {"steps": steps, "at": None, "step_words": "final image"}
    if step is not None:
        of_pair, at = session.preview or (None, None)
        ready = session.preview == (session.pair, step)
        more |= {"at": step, "step_words": f"as predicted at step {step} (0 to {steps - 1})" if ready else f"decoding step {step} …"}
        if of_pair == session.pair:  # until the step is decoded, the one before stays: nothing flashes in between
            caption = f"{pair.prompt} · seed {pair.seed} · step {at}: latent NMSE after it {pair.latent_nmse_T[at]:.3e}"
            return views.viewer(*session.previews[session.preview], caption=caption, **shared, **more)
    return views.viewer(
        pictures.address(session, pair.image_float),
        pictures.address(session, pair.image_quantized),
        caption=views.pair_line(pair),
        **shared,
        **more,
    )
