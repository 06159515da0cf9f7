"""What the buttons do to a session: the whole journey, what is linked, what is refused, and what a cancelled job leaves."""

import dataclasses
import json
import math
import re
import threading
import time
import zipfile

import pytest
import torch

from tests.ui import fakes
from workbench.options import ACT_BITS, WEIGHT_BITS, BadInput, LatencyConfig, QuantConfig, SearchConfig, SensitivityConfig
from workbench.plans import LatencyTable
from workbench.ui import budgets, contest_actions, tour
from workbench.ui.actions import common, compare, export, model, search, sensitivity
from workbench.ui.session import OF_MODEL, Drafted
from workbench.ui.views.layers import blocks_of

PROFILE_SETTINGS = [*(getattr(SensitivityConfig(), n) for n in sensitivity.SENSITIVITY_INPUTS),
                    *(getattr(QuantConfig(), n) for n in sensitivity.QUANT_INPUTS), LatencyConfig().target]
SEARCH_SETTINGS = [getattr(SearchConfig(), n) for n in search.SEARCH_INPUTS]


def profile(session, steps=4, text="noto anchor\nfluent pizza"):
    sensitivity.profile(session, steps, 0, text, *PROFILE_SETTINGS)


def wait_for(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_the_embedded_model_is_there_without_a_click(session):
    assert session.bundle.name == "emoji-flux"
    assert session.prompts == session.bundle.prompts("calibration")


def test_an_embedded_model_that_cannot_be_loaded_is_said(store, pipeline, monkeypatch):
    def broken(*args, **kwargs):
        raise BadInput("emoji-flux: a file is missing")

    monkeypatch.setattr(pipeline, "load", broken)
    store.start_preload()
    session = store.open("")
    assert session.job.wait(20)
    session.sync()
    assert session.bundle is None and session.notices["model"] == ("emoji-flux: a file is missing", "error")


def test_prompts_typed_while_the_model_loads_are_kept(store, gate):
    store.start_preload()
    early = store.open("")
    model.keep_prompts(early, "my own prompt")
    gate.set()
    assert early.job.wait(20)
    early.sync()
    assert early.bundle is not None and early.prompts == ("my own prompt",)


def test_journey(searched, finish, tmp_path):
    assert searched.notices.get("search", ("", ""))[0] == ""
    assert searched.chosen is searched.result.chosen
    compare.compare(searched, "noto anchor\nfluent pizza", 3, 4)
    finish(searched)
    assert [p.prompt for p in searched.comparison.pairs] == ["noto anchor", "fluent pizza"]
    assert searched.comparison.plan == searched.chosen.plan
    export.export(searched)
    finish(searched)
    folder, archive = searched.exported
    with zipfile.ZipFile(archive) as file:
        assert set(file.namelist()) >= {"plan.json", "model.safetensors"}
        assert json.loads(file.read("plan.json"))["layer_names"] == list(searched.chosen.plan.layer_names)
    assert folder.is_relative_to(tmp_path)


def test_columns_arrive_one_by_one(session, gate, finish):
    profile(session)
    session.sync()
    assert session.fisher_TL == (None,) * 4
    gate.set()
    finish(session)
    events = [detail["step"] for stage, detail in session.job.events if stage == "sensitivity"]
    assert events == [3, 2, 1, 0]
    assert all(row is not None for row in session.fisher_TL) and session.stderr_TL is not None


def test_a_click_on_a_block_selects_its_most_fragile_layer_at_that_step(profiled):
    sensitivity.click_block(profiled, {"row": 2, "column": 1})
    members = blocks_of(profiled.bundle.layers)["blocks.2"]
    row = profiled.fisher_TL[1]
    assert profiled.cell == (max(members, key=row.__getitem__), 1)
    sensitivity.click_layer(profiled, {"row": 4, "column": 3})
    assert profiled.cell == (members[4], 3)


@pytest.mark.parametrize("payload", [{}, {"row": 99, "column": 0}, {"row": 0, "column": 99}, "x"])
def test_a_click_beside_the_map_changes_nothing(profiled, payload):
    before = profiled.cell, profiled.rev["cell"]
    sensitivity.click_block(profiled, payload)
    sensitivity.click_layer(profiled, payload)
    search.click_point(profiled, payload)
    assert (profiled.cell, profiled.rev["cell"]) == before


def test_how_a_block_is_put_together_is_kept_while_a_quantity_fixes_it(profiled):
    sensitivity.show_quantity(profiled, "fisher", "sum", 4)
    sensitivity.show_quantity(profiled, "range", "sum", 4)
    for late in ("max", "mean", "sum"):  # the browser may not have drawn the fixed choice yet
        sensitivity.show_quantity(profiled, "stderr", late, 4)
    sensitivity.show_quantity(profiled, "fisher", "mean", 4)
    assert (profiled.quantity, profiled.how) == ("fisher", "sum")


def test_a_row_of_the_table_selects_its_cell(profiled):
    sensitivity.pick_row(profiled, {"layer": 7, "step": 2})
    assert profiled.cell == (7, 2)
    sensitivity.pick_row(profiled, {"layer": 700, "step": 2})
    assert profiled.cell == (7, 2)


def test_moving_a_slider_picks_the_best_plan_within_at_once(searched):
    job = searched.job
    search.move_budget(searched, 0.8, None, 4.0)
    small = searched.chosen
    assert small.plan.weight_bytes <= 0.8e6 and small.plan.act_bits_mean <= 4.0
    search.move_budget(searched, 4.0, None, 16)
    assert searched.chosen.error == min(s.error for s in searched.result.front) < small.error
    assert searched.job is job, "no new search was started"


def test_the_search_s_choice_keeps_its_held_out_error(searched):
    judged = searched.result.chosen
    searched.set(result=dataclasses.replace(searched.result, chosen=judged.model_copy(update={"error": 0.7})), chosen=None)
    common.choose(searched, judged)
    assert searched.chosen.error == 0.7


def test_a_budget_that_nothing_fits_says_what_would_and_keeps_the_plan(searched):
    chosen = searched.chosen
    with pytest.raises(BadInput, match=r"smallest takes 0\.76 MB"):
        search.move_budget(searched, 0.1, None, 3)
    assert searched.chosen is chosen


def test_another_plan_forgets_what_was_made_of_the_last(searched, finish):
    compare.compare(searched, "noto anchor", 0, 4)
    finish(searched)
    other = next(s for s in searched.result.front if s.plan.plan_id != searched.chosen.plan.plan_id)
    search.click_point(searched, {"plan": other.plan.plan_id})
    assert searched.chosen is other
    assert searched.comparison is None and searched.exported is None
    search.click_point(searched, {"plan": searched.result.references[0].plan.plan_id})
    assert searched.chosen.origin == "uniform"


@pytest.mark.parametrize(("act", "line"), [
    (lambda s: search.search(s, 1.0, None, 4.0, *SEARCH_SETTINGS), "profile the model first"),
    (lambda s: compare.compare(s, "a", 0, 4), "profile the model first"),
    (lambda s: export.export(s), "profile the model first"),
    (lambda s: model.load_model(s, "   "), "a model is named by"),
    (lambda s: model.load_model(s, "x" * 3000), "not 3000"),
    (lambda s: profile(s, text="x" * 6000), "6000 characters"),
    (lambda s: profile(s, text="a\n" * 300), "at most 256"),
    (lambda s: profile(s, steps=0), "steps"),
    (lambda s: profile(s, steps=float("nan")), "steps"),
])
def test_bad_input_is_one_line_and_starts_nothing(session, act, line):
    before = session.job
    with pytest.raises(BadInput) as error:
        act(session)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert session.job is before


@pytest.mark.parametrize("budget", [(float("nan"), 4.0), (1.0, float("inf")), (None, 4.0), (-1.0, 4.0), (1.0, 2.0), (1.0, 17.0)])
def test_bad_budgets_are_refused(profiled, budget):
    with pytest.raises(BadInput, match=r"the budget (in|of [-\d.]+) (MB|bits) must be (a number|greater than 0|from 3 to 16)"):
        search.search(profiled, budget[0], None, budget[1], *SEARCH_SETTINGS)


def test_a_budget_below_the_smallest_feasible_is_refused_before_it_starts(profiled):
    before = profiled.job
    with pytest.raises(BadInput, match=r"0\.40 MB is below the smallest feasible, 0\.51 MB"):
        search.search(profiled, 0.4, None, 4.0, *SEARCH_SETTINGS)
    assert profiled.job is before


def test_a_step_selected_on_another_screen_is_decoded_where_steps_are_looked_at(searched, finish):
    compare.compare(searched, "noto anchor", 0, 4)
    finish(searched)
    common.go_to_step(searched, 2)
    wait_for(lambda: searched.preview is not None and searched.preview[:2] == (0, 2))
    sensitivity.pick_row(searched, {"layer": 0, "step": 1})
    wait_for(lambda: searched.preview[:2] == (0, 1))
    assert compare.shown(searched)["step_words"] == "as predicted at step 1 (0 to 3)"


def test_screens_with_other_steps_select_the_step_of_the_same_noise(searched, finish):
    compare.compare(searched, "noto anchor", 0, 8)  # twice as many steps as the profile and its plans have
    finish(searched)
    compare.look(searched, {"what": "step", "step": 7})
    wait_for(lambda: searched.preview == (0, 7))
    assert searched.cell[1] == 3 and compare.marked_step(searched) == 7
    assert compare.shown(searched)["step_words"] == "as predicted at step 7 (0 to 7)"
    sensitivity.pick_row(searched, {"layer": 2, "step": 1})
    wait_for(lambda: searched.preview == (0, 2))
    assert searched.cell == (2, 1) and search.cell_of_plan(searched) == (2, 1)
    compare.look(searched, {"what": "step", "step": 8})
    assert searched.at_step is None and compare.marked_step(searched) == 2, "still marked on the curve"

    every_other = searched.chosen.plan.model_copy(update={
        "sigma_T": searched.chosen.plan.sigma_T[::2], "act_bits_TL": searched.chosen.plan.act_bits_TL[::2]})
    searched.set(chosen=Drafted(plan=every_other))
    search.click_bits(searched, {"row": 5, "column": 1})
    assert searched.cell == (5, 2) and search.cell_of_plan(searched) == (5, 1)


def test_a_checkpoint_is_there_again_with_its_plan(searched, finish):
    first = searched.chosen
    export.export(searched)
    finish(searched)
    written = searched.exported
    other = next(s for s in searched.result.front if s.plan.plan_id != first.plan.plan_id)
    common.choose(searched, other)
    assert searched.exported is None
    common.choose(searched, first)
    assert searched.exported == written


def test_the_tour_leaves_the_steps_of_the_form_alone(session, finish):
    session.steps = 17
    tour.follow(session, {"stop": 0})
    finish(session)
    assert session.steps == 17 and session.profile.sensitivity.steps == tour.TOUR_STEPS


def test_too_many_prompts_to_compare(searched):
    with pytest.raises(BadInput, match="17 prompts to compare; write 1 to 16"):
        compare.compare(searched, "a\n" * 17, 0, 4)


def test_an_unknown_model_is_said_where_it_was_asked_for_and_loses_nothing(searched, finish):
    chosen = searched.chosen
    model.load_model(searched, "no/such-model")
    finish(searched)
    text, kind = searched.notices["model"]
    assert kind == "error" and "no/such-model" in text
    assert searched.chosen is chosen and searched.bundle is not None


def test_a_new_model_starts_afresh(searched, finish):
    model.load_model(searched, "emoji-flux")
    finish(searched)
    assert {name: getattr(searched, name) for name in OF_MODEL} == OF_MODEL


def test_a_plan_file_comes_back_as_the_chosen_plan(searched):
    path = export.plan_file(searched)
    plan = searched.chosen.plan
    searched.set(chosen=None, result=None)
    export.import_plan(searched, path)
    assert searched.chosen.plan == plan and searched.chosen.error is None


@pytest.mark.parametrize(("spoil", "line"), [
    (lambda text: text.replace("fake0123", "other456"), "other456"),
    (lambda text: text[: len(text) // 2], "plan"),
    (lambda text: "not json", "plan"),
    (lambda text: json.dumps(json.loads(text) | {"act_bits_mean": 99}), "act_bits_mean"),
    (lambda text: json.dumps(json.loads(text) | {"surprise": 1}), "surprise"),
    (lambda text: text.replace('"weight_bits": 4', '"weight_bits": 5').replace('"weight_bits":4', '"weight_bits":5'), "5 weight bits"),
    (lambda text: "[" * 100_000, "plan"),
    (lambda text: " " * 9_000_000, "9.0 MB"),
])
def test_a_bad_plan_file_is_refused_in_one_line(searched, tmp_path, spoil, line):
    path = tmp_path / "plan.json"
    path.write_text(spoil(open(export.plan_file(searched)).read()))
    chosen = searched.chosen
    with pytest.raises(BadInput) as error:
        export.import_plan(searched, str(path))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert searched.chosen is chosen


def test_a_cancelled_profile_puts_the_last_one_back(searched, gate, finish):
    kept = searched.profile, searched.fisher_TL, searched.result, searched.chosen
    profile(searched, steps=6)
    assert searched.profile is None
    common.stop(searched)
    gate.set()
    finish(searched)
    assert (searched.profile, searched.fisher_TL, searched.result, searched.chosen) == kept
    assert searched.notices["sensitivity"][1] == "info"


def test_a_comparison_shows_what_is_finished_while_it_runs(searched, pipeline, monkeypatch, finish):
    seen, report = [], type(pipeline)._report

    def report_and_look(self, *args):
        report(self, *args)
        searched.sync()
        seen.append(re.findall(r'alt="(\w+)"|<i></i>', compare.cards(searched)))

    monkeypatch.setattr(type(pipeline), "_report", report_and_look)
    compare.compare(searched, "a\nb", 0, 4)
    finish(searched)
    assert seen[1:] == [["float", "", "", ""], ["float", "", "float", ""], ["float", "quantized", "float", ""],
                        ["float", "quantized", "float", "quantized"], ["float", "quantized", "float", "quantized"]]  # the last: being timed
    assert searched.comparison.solo_timing.float_ms == 400 and searched.comparisons[searched.chosen.plan.plan_id] is searched.comparison
    assert searched.drafts is None and 'data-pick' in compare.cards(searched)


def test_a_cancelled_comparison_leaves_no_drafts(searched, gate, finish):
    compare.compare(searched, "a", 0, 4)
    assert "drawing" in compare.cards(searched) and "as they are finished" in compare.shown(searched)["nothing"]
    common.stop(searched)
    gate.set()
    finish(searched)
    assert searched.drafts is None and "Generate" in compare.shown(searched)["nothing"]


def test_a_profile_selects_its_most_fragile_cell_unless_one_was_picked_meanwhile(session, gate, finish):
    profile(session, steps=6)
    gate.set()
    finish(session)
    assert session.cell == session.profile.sensitivity.most_fragile
    gate.clear()
    profile(session, steps=6)
    session.set(cell=(2, 1))
    gate.set()
    finish(session)
    assert session.cell == (2, 1)


def test_images_that_arrive_after_another_plan_was_chosen_are_kept_for_their_own(searched, gate, finish):
    first, other = searched.chosen, searched.result.front[0]
    compare.compare(searched, "a", 0, 4)
    common.choose(searched, other)
    assert not compare.drawing(searched)
    gate.set()
    finish(searched)
    assert searched.chosen is other and searched.comparison is None and "was drawn" in searched.notices["compare"][0]
    common.choose(searched, first)
    assert searched.comparison.plan.plan_id == first.plan.plan_id


def test_a_plan_that_was_brought_outlives_a_profile_and_one_of_the_front_does_not(searched, finish):
    profile(searched, steps=6)
    finish(searched)
    assert searched.chosen is None
    brought = Drafted(fakes.make_scored(searched.profile, 4, 4).plan, origin="link")
    common.choose(searched, brought)
    profile(searched, steps=6)
    finish(searched)
    assert searched.chosen is brought


def test_undo_knows_only_the_strokes_on_the_chosen_plan(searched):
    searched.set(brush=8)
    search.paint(searched, {"part": "steps", "row": 0, "last_row": 1, "column": 0, "last_column": 1})
    assert len(searched.edits) == 1
    common.choose(searched, searched.result.front[0])
    with pytest.raises(BadInput, match="nothing has been painted"):
        search.undo(searched)


@pytest.mark.parametrize("floor", [-1, 121, 1e308, float("nan"), None, "30"])
def test_a_floor_that_means_nothing_leaves_no_line(searched, floor):
    search.pick_floor(searched, 1)
    assert searched.floor_db == 1
    with pytest.raises(BadInput, match="from 0 to 120 dB"):
        search.pick_floor(searched, floor)
    assert searched.floor_db is None
    with pytest.raises(BadInput):
        search.pick_floor(searched, 90)  # no plan reaches it: no line either
    assert searched.floor_db is None


def test_what_is_typed_into_a_budget_is_answered_in_words(searched):
    before = searched.chosen
    for typed, says in ((0.01, "no plan of the front"), (None, "must be a number"), (-3, "of -3 MB must be greater than 0")):
        with pytest.raises(BadInput, match=says):
            search.move_budget(searched, typed, None, 5.0)
    assert searched.chosen is before
    for step, shown in ((2, 2), (99, 99), (None, None), ("x", None)):
        search.replay(searched, step)
        assert searched.replay == shown


def test_the_methods_screen_keeps_the_limits_of_a_space(session, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/something")
    with pytest.raises(BadInput, match="write 1 to 24"):
        contest_actions.run(session, ["rtn"], "a\n" * 25, 0, 4, 4, 4.0, "stored")
    with pytest.raises(BadInput, match="31 steps are more than the 30"):
        contest_actions.run(session, ["rtn"], "a", 0, 31, 4, 4.0, "stored")


def test_a_plan_can_be_chosen_while_the_search_goes_on(profiled, pipeline, monkeypatch, finish):
    report, reports, go_on = type(pipeline)._report, iter(range(3)), threading.Event()

    def three_at_once(self, *args):
        if next(reports, None) is None:
            assert go_on.wait(20)
        report(self, *args)

    monkeypatch.setattr(type(pipeline), "_report", three_at_once)
    search.search(profiled, 1.2, None, 5.0, *SEARCH_SETTINGS)
    wait_for(lambda: len(profiled.job.events) == 3)
    profiled.sync()
    found = profiled.found
    assert profiled.busy and profiled.result is None and len(found.front) > 2 and {s.origin for s in found.references} == {"uniform"}
    search.click_point(profiled, {"plan": found.front[1].plan.plan_id})
    assert profiled.chosen is found.front[1]
    search.pick_knee(profiled)
    assert profiled.chosen in found.front
    with pytest.raises(BadInput, match="replaced by a better one"):
        search.click_point(profiled, {"plan": "not there any more"})
    go_on.set()
    finish(profiled)
    assert profiled.so_far is None and profiled.chosen is profiled.result.chosen


def test_a_second_search_that_is_stopped_shows_the_first_again_and_says_so(searched, gate, finish):
    first = searched.result
    search.search(searched, 1.2, None, 5.0, *SEARCH_SETTINGS)
    common.stop(searched)
    gate.set()
    finish(searched)
    assert searched.result is first and searched.so_far is None
    said, kind = searched.notices["search"]
    assert "search before it is shown again" in said and kind == "info"


def test_a_stopped_search_keeps_its_events(profiled, gate, finish):
    search.search(profiled, 1.2, None, 5.0, *SEARCH_SETTINGS)
    common.stop(profiled)
    gate.set()
    finish(profiled)
    assert profiled.result is None and profiled.profile is not None
    assert profiled.job.state == "cancelled"


def test_one_job_at_a_time_per_visitor(session, gate, finish):
    profile(session)
    with pytest.raises(BadInput, match="profile is still running"):
        profile(session)
    gate.set()
    finish(session)


def test_sessions_are_apart(store, searched):
    other = store.open("")
    other.sync()
    assert other.id != searched.id and other.folder != searched.folder and other.downloads != searched.downloads
    assert other.chosen is None and other.result is None and other.comparison is None
    assert store.open(searched.id) is searched


def test_a_browser_cannot_choose_its_id(store):
    assert store.open("guess-me").id != "guess-me"


def test_the_oldest_profiles_are_forgotten_but_not_what_was_exported(store, searched, finish, monkeypatch):
    export.export(searched)
    finish(searched)
    folder, archive = searched.exported
    kept_run = searched.folder / "trace.safetensors"
    kept_run.write_bytes(b"x")
    monkeypatch.setattr("workbench.ui.session.KEPT_PROFILES", 1)
    newer = store.open("")
    newer.sync()
    profile(newer)
    finish(newer)
    store.open(newer.id)
    assert store.open(searched.id) is not searched
    assert folder.is_dir() and not kept_run.exists() and not archive.exists()
    assert store.open(newer.id) is newer


def test_the_id_is_in_no_file_name(session):
    assert session.id not in str(session.folder) and session.id not in str(session.downloads)


# By hand

def stroke(part, rows, columns):
    return {"part": part, "row": rows[0], "last_row": rows[1], "column": columns[0], "last_column": columns[1]}


def test_a_painted_plan_has_the_costs_and_the_error_of_its_tables(searched):
    before = searched.chosen.plan
    search.set_brush(searched, 8)
    search.paint(searched, stroke("steps", (2, 3), (1, 2)))
    search.paint(searched, stroke("weights", (5, 5), (0, 0)))
    plan, table = searched.chosen.plan, searched.profile.table
    assert [plan.act_bits_TL[t][i] for t in (1, 2) for i in (2, 3)] == [8] * 4 and plan.weight_bits_L[5] == 8
    assert plan.weight_bytes == searched.profile.costs.total_bytes(plan.weight_bits_L) > before.weight_bytes
    acts = sum(float(table.error_TLC[t, i, table.act_bits_C.index(b)]) for t, row in enumerate(plan.act_bits_TL) for i, b in enumerate(row))
    weights = sum(float(table.weight_error_LC[i, table.weight_bits_C.index(b)]) for i, b in enumerate(plan.weight_bits_L))
    was = search.predicted_error(table, before.weight_bits_L, before.act_bits_TL, before.sigma_T)
    assert plan.predicted_error == pytest.approx(before.predicted_error * (acts + weights) / was), "on the scale of the plan before"
    assert searched.chosen.error is None, "nothing about it has been measured"
    assert len(searched.edits) == 2
    search.undo(searched)
    search.undo(searched)
    assert searched.chosen.plan == before
    with pytest.raises(BadInput, match="nothing has been painted"):
        search.undo(searched)


def test_without_a_brush_nothing_is_painted_and_a_click_selects(searched):
    chosen = searched.chosen
    search.paint(searched, stroke("steps", (0, 3), (0, 2)))
    search.click_bits(searched, {"row": 4, "column": 2})
    assert searched.chosen is chosen and searched.cell == (4, 2)


def test_the_floor_picks_the_smallest_plan_that_reaches_it(searched):
    errors = sorted(scored.error for scored in searched.result.front)
    for error in errors:
        search.pick_floor(searched, -10 * math.log10(error) - 1e-6)
        good = [scored for scored in searched.result.front if scored.error <= error * 1.0001]
        assert searched.chosen.error <= error * 1.0001
        assert searched.chosen.plan.bit_ops == min(scored.plan.bit_ops for scored in good)
    with pytest.raises(BadInput, match="no plan of the front reaches"):
        search.pick_floor(searched, -10 * math.log10(errors[0]) + 1)


def test_a_blind_vote_is_counted_for_what_it_was_given_to(searched, finish):
    compare.compare(searched, "a\nb\nc", 0, 4)
    finish(searched)
    compare.look(searched, {"what": "mode", "mode": "blind"})
    for n in range(1, 9):
        compare.look(searched, {"what": "vote", "choice": "a" if searched.blind.float_is_a else "b"})
        assert (searched.blind.wins, searched.blind.losses) == (n, 0)
    compare.look(searched, {"what": "vote", "choice": "b" if searched.blind.float_is_a else "a"})
    compare.look(searched, {"what": "vote", "choice": "same"})
    assert (searched.blind.wins, searched.blind.losses, searched.blind.ties) == (8, 1, 1)
    compare.look(searched, {"what": "vote", "choice": "nonsense"})
    assert searched.blind.wins == 8


def timed(costs):
    """The same costs with times: more bits take longer."""
    us_LWA = torch.outer(torch.tensor(WEIGHT_BITS), torch.tensor(ACT_BITS)).double().expand(len(costs.weight_bytes_LC), -1, -1)
    table = LatencyTable(target="a clock", measured=True, provenance="made up", weight_bits_W=WEIGHT_BITS, act_bits_A=ACT_BITS,
                         us_LWA=us_LWA, fixed_us=5.0)
    return dataclasses.replace(costs, latency=table)


def test_the_tour_goes_on_where_the_machine_s_times_are_known(session, finish, monkeypatch):
    """Every slider stands somewhere after a profile: on the default, or where its axis limits nothing."""
    monkeypatch.setattr(fakes, "make_costs", lambda layers, make=fakes.make_costs: timed(make(layers)))
    tour.follow(session, {"stop": 0})
    finish(session)
    spans = {axis.field: axis.span(session.profile) for axis in budgets.offered(session.profile)}
    assert set(session.budget) == set(spans) == {axis.field for axis in budgets.AXES}
    assert session.budget["max_latency_ms"] >= spans["max_latency_ms"][1] > session.budget["max_latency_ms"] - 0.1
    tour.follow(session, {"stop": 1})
    finish(session)
    assert session.job.state == "done" and session.result is not None and tour.here(session) == 2


def test_what_the_tour_cannot_do_is_said_below_its_buttons(session, finish):
    tour.follow(session, {"stop": 0})
    finish(session)
    session.budget = {}
    with pytest.raises(BadInput, match="budget in MB must be a number"):
        tour.follow(session, {"stop": 1})
    session.notify("tour", "the budget in MB must be a number")  # as the page does
    assert 'role="alert">the budget in MB must be a number' in tour.view(session)
