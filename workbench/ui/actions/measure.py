"""On screen 3: a plan painted by hand or brought in, really run on held-out prompts."""

from __future__ import annotations

from workbench.options import BadInput
from workbench.ui.actions import common
from workbench.ui.session import KEPT_MEASURED, Session
from workbench.zerogpu import stages

KIND = "measurement"


def pick(session: Session, payload) -> None:
    """The button that measures the chosen plan, or the one that stops it."""
    wanted = payload.get("measure") if isinstance(payload, dict) else None
    if wanted == "start":
        measure(session)
    elif wanted == "stop" and running(session):
        common.stop(session)


def measure(session: Session) -> None:
    """Run the chosen plan on prompts that neither calibration nor search has seen; its card then shows the error with an interval."""
    bundle, found, scored = common.bundle_of(session), common.profile_of(session), common.chosen_of(session)
    if scored.error is not None:
        raise BadInput(f"plan {scored.plan.plan_id} has been measured; paint another to measure that one")

    def work(on_progress):
        measured = stages().evaluate_plan(bundle, found, scored.plan, on_progress=on_progress)
        _keep(session, measured.model_copy(update={"origin": scored.origin}))

    session.require_idle()
    session.set(measuring=scored.plan.plan_id)
    session.submit(KIND, "plan", work)


def _keep(session: Session, measured) -> None:
    """The error belongs to the plan wherever it is shown, whatever has been chosen or painted since."""
    plan_id = measured.plan.plan_id
    with session.lock:
        session.put("measured", plan_id, measured, KEPT_MEASURED)
        if session.pinned is not None and session.pinned.plan.plan_id == plan_id:
            session.set(pinned=measured)
        if session.chosen is not None and session.chosen.plan.plan_id == plan_id:
            session.set(chosen=measured)
        else:
            session.notify("plan", f"plan {plan_id} was measured; choose it again to see its error", "info")


def running(session: Session) -> bool:
    return session.busy and session.job.kind == KIND


def missing(session: Session) -> str:
    """What has to come before the chosen plan can be measured; empty where nothing has."""
    if session.example is not None:
        return "The example run holds no solved weights: press 1 above to make your own profile, then any plan can be measured."
    if session.profile is None:
        return "Profile the model first, on the Sensitivity screen: that solves the plan's weights."
    return f"It can be measured when the {session.job.kind} has ended." if session.busy else ""
