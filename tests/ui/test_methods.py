"""The Methods screen: its table and plot from made-up numbers, and its actions on a made-up contest."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.ui.fakes import FakeBundle
from workbench import contest
from workbench.options import BadInput
from workbench.ui import contest_actions as actions
from workbench.ui import contest_views as views


def interval(mean, half, n=4):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def row(name, psnr, error, marks=None, paired=None):
    return {"method": name, "label": name.upper(), "description": f"what {name} is", "weight_bytes": 8_000_000, "act_bits_mean": 4.0,
            "act_bits_macs": 4.1, "weight_bits_quantized": 4.25, "weight_bits_total": 5.8, "quantize_seconds": 9.0, "search_seconds": 0.0,
            "search_evaluations": 0, "seconds_per_image": 0.5, "compute": "emulated", "reason": "<no kernel>", "plan_id": "x",
            "marks": marks or {}, "psnr_db": interval(psnr, 1), "ssim": interval(0.98, 0.01), "vif": interval(0.7, 0.1),
            "latent_nmse": interval(error, 0.002), "retrieval": interval(1.0, 0), "paired": paired}


@pytest.fixture
def found():
    lead = {"psnr_db": interval(2.0, 0.5), "latent_nmse": interval(-0.001, 0.002)}
    return {"model": "emoji-flux", "steps": 4, "seed": 0, "reference": "adatsq", "skipped": ["gptq"],
            "float": {"weight_bytes": 22_000_000, "seconds_per_image": 0.4, "retrieval": interval(1.0, 0)},
            "results": [row("rtn", 30.0, 0.02, {"psnr_db": "second"}, lead), row("adatsq", 36.0, 0.005, {"psnr_db": "best"})]}


class FakeSession(SimpleNamespace):
    """What the actions touch of a session."""

    def set(self, **values):
        self.__dict__.update(values)

    def submit(self, kind, tab, work, undo=None):
        self.job = SimpleNamespace(kind=kind)
        self.submitted = (kind, tab, work)


@pytest.fixture
def session(tmp_path):
    return FakeSession(bundle=FakeBundle(), busy=False, job=None, folder=tmp_path / "run", downloads=tmp_path, result=None)


def test_the_table_has_float_every_method_and_its_marks(found):
    html = views.table(found)
    assert html.count("<tr") == 1 + 1 + 2 and "<b>36.00 ± 1.00</b>" in html and "<u>30.00 ± 1.00</u>" in html
    assert "left out: GPTQ" in html and "4 prompts" in html
    assert "<no kernel>" not in html and "&lt;no kernel&gt;" in html, "words from a stage are escaped"
    assert "No method has been compared yet" in views.table(None)


def test_leads_are_starred_where_the_interval_excludes_zero(found):
    html = views.pairs(found)
    assert "ADATSQ minus each method" in html and "+2.00 [+1.50, +2.50]*" in html and "-1.00e-03 [-3.00e-03, +1.00e-03]<" in html
    assert views.pairs(None) == ""


def test_the_plot_shows_methods_with_intervals_and_the_front(found):
    plan = SimpleNamespace(weight_bytes=7_000_000, act_bits_mean=4.2)
    drawn = views.quality_cost(found, (SimpleNamespace(plan=plan, error=0.004),))
    names = [trace["name"] for trace in drawn["data"]]
    assert names == ["front of the search (its own prompts)", "RTN", "ADATSQ"]
    assert drawn["data"][2]["x"] == [8.0] and drawn["data"][2]["error_y"]["array"] == [pytest.approx(0.002)]
    found["results"][0]["latent_nmse"] = interval(0.02, float("inf"), n=1)
    assert views.quality_cost(found)["data"][0]["error_y"] == {"visible": False}
    assert not views.quality_cost(None)["data"]


def test_a_comparison_runs_as_a_job_and_shows_rows_as_they_come(session, found, monkeypatch):
    asked, shown = {}, []

    def run_comparison(bundle, names, settings, *, on_result, on_progress, **options):
        asked.update(names=names, settings=settings, **options)
        on_result({**found, "results": found["results"][:1]})
        shown.append(len(actions.current(session)[0]["results"]))
        actions.skip(session)
        with pytest.raises(contest.SkipMethod):
            on_progress("a report")
        on_progress("the next one")
        return None, (1,), found

    monkeypatch.setattr(contest, "run_comparison", run_comparison)
    monkeypatch.setattr(contest, "image_grid", lambda *_: np.zeros((2, 2, 3), np.uint8))
    actions.run(session, ["rtn", "adatsq"], "a\nb", 3, 4, 3, 3.0, "cached")
    kind, tab, work = session.submitted
    session.busy, seen = True, []
    work(seen.append)
    assert (kind, tab, shown, seen) == ("contest", "methods", [1], ["the next one"])
    assert asked["names"] == ("rtn", "adatsq") and asked["prompts"] == ("a", "b") and asked["seed"] == 3
    given = asked["settings"]
    assert (given.contest_config.weight_bits, given.contest_config.modulation, given.trace.steps) == (3, "cached", 4)
    assert actions.current(session)[0] is found and actions.current(session)[1].shape == (2, 2, 3)
    assert open(actions.table_file(session, "csv")).read().startswith("method,")
    assert "ADATSQ minus each method" in open(actions.table_file(session, "md")).read()


def test_a_comparison_of_another_model_is_not_shown(session, found):
    session.contest = ("another model", found, None)
    assert actions.current(session) == (None, None) and actions.table_file(session, "csv") is None


@pytest.mark.parametrize(("chosen", "prompts", "contest_config", "words"), [
    ([], "a", (4, 4.0, "stored"), "no method is chosen"), (["rtn"], "", (4, 4.0, "stored"), "0 prompts"),
    (["rtn"], "a\n" * 65, (4, 4.0, "stored"), "65 prompts"), (["rtn"], "a", (5, 4.0, "stored"), "not supported"),
    (["rtn"], "a", (4, 3.5, "stored"), "one activation width"), (["nope"], "a", (4, 4.0, "stored"), "unknown method")])
def test_what_cannot_be_compared_is_one_line(session, chosen, prompts, contest_config, words):
    with pytest.raises(BadInput, match=words):
        actions.run(session, chosen, prompts, 0, 4, *contest_config)
    session.bundle = None
    with pytest.raises(BadInput, match="no model is loaded"):
        actions.run(session, ["rtn"], "a", 0, 4, 4, 4.0, "stored")


def test_every_method_can_be_chosen_and_the_first_choice_exists():
    known = [name for _, name in actions.names()]
    assert set(actions.default_names()) < set(known) == set(contest.METHODS)


def test_building_the_screen_needs_no_torch():
    import subprocess

    code = ("import sys; from workbench.ui.session import Store; from workbench.ui import page; from workbench.jobs import Board; "
            "page.build(Store(Board())); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
