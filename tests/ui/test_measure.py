"""A plan made by hand is measured by a job: what its card shows before, while and after, and what is refused."""

import re

import pytest

from tests.ui.fakes import make_scored
from tests.ui.test_actions import profile, stroke
from tests.ui.test_zerogpu import zero_gpu  # noqa: F401
from workbench.options import BadInput
from workbench.ui.actions import common, measure, search, sensitivity
from workbench.ui.session import Drafted
from workbench.ui.views import plans
from workbench.ui.views import search as views

START, STOP = {"measure": "start"}, {"measure": "stop"}


def paint(session, bits=8):
    search.set_brush(session, bits)
    search.paint(session, stroke("steps", (0, 3), (0, 2)))
    return session.chosen


@pytest.fixture
def painted(searched):
    paint(searched)
    return searched


def rows(session):
    """What, value and how it is known, of every row of the plan's card."""
    card = plans.plan_numbers(session.chosen, session.bundle, session.profile.costs, session.edits)
    cells = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in card.split("<tr>")[1:]]
    return {what: (value, how) for what, value, how in (row for row in cells if len(row) == 3)}


def box(session):
    active = measure.running(session) and session.measuring == session.chosen.plan.plan_id
    return plans.measuring(session.chosen, active, measure.missing(session))


def test_the_measured_error_stands_beside_the_predicted_one(painted, pipeline, finish):
    before, plan = painted.edits[0], painted.chosen.plan
    assert "error (NMSE of the final latent)" not in rows(painted)
    predicted = f"{before.error * plan.predicted_error / before.plan.predicted_error:.3e}"
    of_before = ("predicted error (NMSE of the final latent)", (f"{predicted} ", "◐modelled, from the error before painting"))
    assert of_before in rows(painted).items()
    assert "Measure its error" in box(painted) and "disabled" not in box(painted)
    measure.pick(painted, START)
    finish(painted)
    assert painted.job.kind == "measurement" and painted.job.state == "done", painted.job.error
    truth = pipeline.evaluate_plan(painted.bundle, painted.profile, plan)
    assert (painted.chosen.plan, painted.chosen.error, painted.chosen.origin) == (plan, truth.error, "painted")
    value, how = rows(painted)["error (NMSE of the final latent)"]
    assert value == f"{truth.error:.3e}  [{truth.low:.2e},  {truth.high:.2e}] "
    assert how == "●measured, mean and 95 % interval over 16 held-out prompts"
    assert of_before in rows(painted).items(), "the prediction stays, to be held against it"
    assert box(painted) == "" and len(painted.edits) == 1


def test_the_front_rings_it_where_it_was_measured_and_says_on_what(painted, finish):
    before = views.painted_place(painted.chosen, painted.edits, painted.found)
    measure.pick(painted, START)
    finish(painted)
    place = views.place_of(painted.chosen, painted.found)
    assert place.error == painted.chosen.error != before.error
    names = [trace["name"] for trace in views.front(views.points(painted.found), place, None, {})["data"]]
    assert "chosen, measured on held-out prompts" in names and not {"painted, error modelled", "chosen"} & set(names)
    ring = views.place_of(painted.result.front[0], painted.found)
    assert "chosen" in [trace["name"] for trace in views.front(views.points(painted.found), ring, None, {})["data"]]


def test_the_error_comes_back_with_the_plan_by_undo_by_painting_and_as_plan_a(painted, finish):
    plan_id = painted.chosen.plan.plan_id
    search.pin(painted)
    measure.pick(painted, START)
    finish(painted)
    measured = painted.chosen
    assert painted.pinned is measured
    paint(painted, 3)
    assert painted.chosen.error is None
    search.undo(painted)
    assert painted.chosen is measured
    search.undo(painted)
    assert painted.chosen.plan.plan_id != plan_id
    assert paint(painted) is measured


def test_one_that_ends_when_another_plan_is_chosen_says_so(painted, gate, finish):
    plan_id = painted.chosen.plan.plan_id
    measure.pick(painted, START)
    assert "Stop measuring" in box(painted)
    paint(painted, 3)
    assert "It can be measured when the measurement has ended." in box(painted) and "disabled" in box(painted)
    gate.set()
    finish(painted)
    assert painted.chosen.error is None and painted.measured[plan_id].error > 0
    assert painted.notices["plan"] == (f"plan {plan_id} was measured; choose it again to see its error", "info")


def test_it_stops_within_a_step_and_leaves_nothing(painted, pipeline, finish):
    pipeline.pause, chosen = 30.0, painted.chosen
    measure.pick(painted, START)
    while painted.job.state == "queued":
        pipeline._clock.wait(0.01)
    measure.pick(painted, STOP)
    pipeline._clock.set()  # the step that is running ends
    finish(painted)
    assert painted.job.state == "cancelled" and painted.job.snapshot().done == 0
    assert painted.chosen is chosen and not painted.measured
    assert painted.notices["plan"] == ("measurement was stopped", "info")


def test_its_stop_stops_nothing_else(painted, gate, finish):
    profile(painted)
    measure.pick(painted, STOP)
    gate.set()
    assert finish(painted).job.state == "done"


@pytest.mark.parametrize("payload", [None, {}, {"measure": True}, {"measure": ["start"]}, {"draw": True}])
def test_what_is_no_button_does_nothing(painted, payload):
    job = painted.job
    measure.pick(painted, payload)
    assert painted.job is job


def test_what_is_missing_is_said_and_refused(session, searched, monkeypatch):
    assert box(searched) == "", "the search's own plans have been measured"
    with pytest.raises(BadInput, match="has been measured"):
        measure.measure(searched)
    paint(searched)
    searched.set(example="elsewhere")
    assert "The example run holds no solved weights" in box(searched) and "disabled" in box(searched)
    with pytest.raises(BadInput, match="example run"):
        measure.measure(searched)
    searched.set(example=None, profile=None)
    assert "Profile the model first" in box(searched)
    with pytest.raises(BadInput, match="profile the model first"):
        measure.measure(searched)


def test_a_plan_that_does_not_fit_the_profile_is_one_line(searched, finish):
    plan = make_scored(searched.profile, 4, 4).plan
    other = plan.model_copy(update={"quant": plan.quant.model_copy(update={"group_size": 32})})
    common.choose(searched, Drafted(other, origin="link"))
    measure.pick(searched, START)
    finish(searched)
    assert searched.notices["plan"][0].startswith("the plan's weights are solved with other settings") and not searched.measured


def test_a_plan_that_was_brought_keeps_no_error_of_a_profile_that_is_gone(searched, finish):
    brought = Drafted(make_scored(searched.profile, 4, 3, "link").plan, origin="link")
    common.choose(searched, brought)
    measure.pick(searched, START)
    finish(searched)
    assert searched.chosen.error is not None and searched.chosen.origin == "link" in sensitivity.BROUGHT
    profile(searched)
    finish(searched)
    assert searched.chosen == brought and not searched.measured


def test_on_a_zero_gpu_space_a_worker_measures(zero_gpu, pipeline, session, finish):  # noqa: F811
    asked = []  # by this process: what a worker does to its copy is not seen here
    pipeline._report = lambda on_progress, stage, *args: asked.append(stage) or type(pipeline)._report(pipeline, on_progress, stage, *args)
    profile(session)
    finish(session)
    scored = make_scored(session.profile, 4, 3, "link")
    common.choose(session, Drafted(scored.plan, origin="painted"))
    measure.pick(session, START)
    finish(session)
    assert session.job.state == "done", session.job.error
    assert session.chosen.error is not None and asked == [] and session.job.snapshot().stage == "rollout"
