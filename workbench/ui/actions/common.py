"""What several screens' actions share: what must be there first, and what is selected everywhere at once."""

from __future__ import annotations

from workbench.options import BadInput
from workbench.ui import pictures
from workbench.ui.session import OF_COMPARISON, Session
from workbench.zerogpu import stages


def need(value, what: str):
    if value is None:
        raise BadInput(what)
    return value


def bundle_of(session: Session):
    return need(session.bundle, "no model is loaded yet; wait for it or load one on the Model screen")


def profile_of(session: Session):
    """The session's own profile: an example has no solved weights, so nothing can be made from it."""
    found = need(session.profile, "profile the model first, on the Sensitivity screen")
    if session.example is not None:
        raise BadInput("this is the example run, to look at; press Profile on the Sensitivity screen to make your own")
    return found


def chosen_of(session: Session):
    return need(session.chosen, "no plan is chosen; search for one, or import one on the Export screen")


def run_of(session: Session):
    """The session's own run folder: what is in it is used again, so a stopped search goes on where it was."""
    from workbench.runs import Run

    return Run(session.folder)


def stop(session: Session) -> None:
    session.cancel()


def noise_levels(session: Session) -> tuple[float, ...]:
    """Sigma of the steps that the selected step counts among: the profile's, before there is one the chosen plan's."""
    if session.profile is not None:
        return tuple(session.profile.sensitivity.sigma_T1[:-1].tolist())
    if session.fisher_TL and session.bundle is not None:
        return schedule_of(session, len(session.fisher_TL))
    return session.chosen.plan.sigma_T if session.chosen is not None else ()


def compared_levels(session: Session) -> tuple[float, ...]:
    """Sigma of the steps of the shown comparison."""
    comparison = session.comparison
    if comparison is None:
        return ()
    if comparison.trajectories is not None:
        return tuple(comparison.trajectories.sigma_T1[:-1].tolist())
    return schedule_of(session, len(comparison.pairs[0].latent_nmse_T))


def schedule_of(session: Session, steps: int) -> tuple[float, ...]:
    return tuple(session.bundle.integrator(steps).sigma_T1[:-1].tolist())


def same_noise(step: int | None, from_T, to_T) -> int | None:
    """The step of a schedule `to_T` that is nearest in noise to one of `from_T`: plans and images may have other steps than the profile."""
    if step is None or not to_T or not step < len(from_T):
        return None
    from workbench.plans import nearest_step

    return nearest_step(to_T, from_T[step])


def select_cell(session: Session, layer: int | None, step: int) -> None:
    """Select a layer and step on every screen: the look into it comes as soon as the model is free, images of that step where steps are
    looked at."""
    session.set(cell=(layer, step))
    if session.at_step is not None:
        session.set(at_step=same_noise(step, noise_levels(session), compared_levels(session)))
    look_closer(session)
    show_step(session)


def go_to_step(session: Session, step: int | None) -> None:
    """Look at both compared images as they stand after a step; None is the final image. The step is the selected one on every screen."""
    session.set(at_step=step)
    if step is not None:
        session.set(cell=(session.cell[0], same_noise(step, compared_levels(session), noise_levels(session))))
        look_closer(session)
    show_step(session)


def look_closer(session: Session) -> None:
    """Ranges and histogram of the selected cell, made off the request; a model in use is no error, only later."""
    layer, step = session.cell
    found, bundle = session.profile, session.bundle
    if layer is None or step is None or found is None:
        return
    if session.layer_inspection is not None and (session.layer_inspection.layer, session.layer_inspection.step) == (layer, step):
        return
    session.set(layer_inspection=None)
    if found.trace is None:
        return

    def work():
        try:
            layer_inspection = stages().inspect(bundle, found.trace, layer, step, found.quant)
        except BadInput as error:
            session.notify("layer_inspection", str(error), "info")
            return
        with session.lock:
            if session.cell == (layer, step) and session.profile is found:
                session.notify("layer_inspection")
                session.set(layer_inspection=layer_inspection)

    session.soon("layer_inspection", work)


def show_step(session: Session) -> None:
    """Decode the selected step of the shown pair, off the request."""
    comparison, pair, step = session.comparison, session.pair, session.at_step
    if comparison is None or step is None:
        return
    if (pair, step) in session.previews:
        session.set(preview=(pair, step))
        return
    bundle = bundle_of(session)
    if comparison.trajectories is None:
        session.set(at_step=None)
        raise BadInput("the latents of this comparison were not kept, so only its final images can be shown")

    def work():
        images = stages().preview(bundle, comparison, pair, step)
        addresses = [pictures.address(session, image) for image in images]
        with session.lock:
            if session.comparison is None or session.comparison.pairs is not comparison.pairs:
                return
            session.put("previews", (pair, step), addresses)
            if (session.pair, session.at_step) == (pair, step):
                session.set(preview=(pair, step))

    session.soon("compare", work)


def choose(session: Session, scored, edits=()) -> None:
    """Make a plan the chosen one; the search's own choice keeps its judgement on held-out prompts, and so does any that was measured on
    them by hand. `edits`: the plans that undoing leads
    back to, none unless it was painted."""
    with session.lock:
        best = session.result.chosen if session.result is not None else None
        if best is not None and best.plan.plan_id == scored.plan.plan_id:
            scored = best
        if scored.error is None:
            scored = session.measured.get(scored.plan.plan_id, scored)
        if session.chosen is None or scored.plan.plan_id != session.chosen.plan.plan_id:
            session.set(
                chosen=scored,
                edits=edits,
                exported=session.exports.get(scored.plan.plan_id),
                comparison=session.comparisons.get(scored.plan.plan_id),
                **OF_COMPARISON,
            )
