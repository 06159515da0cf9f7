"""The public endpoints, called as programs call them: what they return, refuse, keep apart, and how they wait in line."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from tests.ui.fakes import FakePipeline
from workbench.plans import BitPlan
from workbench.ui import endpoints, limits, page

WAIT_S = 20
QUICK = {"steps": 4, "prompts": ["noto anchor", "fluent pizza"]}


@pytest.fixture
def demo(store):
    store.start_preload()
    return page.build(store)


@pytest.fixture
def url(demo, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    demo.queue(default_concurrency_limit=None, api_open=False)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False)
    yield address
    demo.close()


@pytest.fixture
def connect(url, tmp_path):
    """A new caller each time."""
    return lambda: Client(url, verbose=False, download_files=str(tmp_path / "client"), analytics_enabled=False)


@pytest.fixture
def client(connect):
    return connect()


@pytest.fixture
def gate(monkeypatch):
    """Stops the fake pipeline at every report until it is set."""
    event, report = threading.Event(), FakePipeline._report

    def wait_and_report(self, *args):
        assert event.wait(WAIT_S)
        report(self, *args)

    monkeypatch.setattr(FakePipeline, "_report", wait_and_report)
    yield event
    event.set()


def ask(client, name, **values):
    return client.predict(api_name=f"/{name}", **values)


def refusal(client, name, **values):
    """The one line that a call is refused with."""
    with pytest.raises(AppError) as refused:
        ask(client, name, **values)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def planned(client, **profile):
    """(profile, search) of a caller."""
    profiled = ask(client, "profile", **QUICK | profile)
    return profiled, ask(client, "search", profile_id=profiled["profile_id"])


def pixels(path):
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image)


def test_these_three_are_the_only_public_endpoints(demo):
    offered = {d["api_name"] for d in demo.config["dependencies"] if d["api_visibility"] != "private"}
    assert offered == set(endpoints.PUBLIC) == {"profile", "search", "generate"}
    assert set(demo.get_api_info()["named_endpoints"]) == {"/profile", "/search", "/generate"}
    assert demo.get_api_info()["unnamed_endpoints"] == {}


def test_the_api_page_knows_types_and_defaults_and_says_what_each_is_for(demo):
    described = demo.get_api_info()["named_endpoints"]
    for name, told in described.items():
        assert [returned["type"]["type"] for returned in told["returns"]] == ["object"], name
        for parameter in told["parameters"]:
            assert parameter["type"] and f"{parameter['parameter_name']}:" in told["description"], (name, parameter["parameter_name"])
    steps = next(p for p in described["/profile"]["parameters"] if p["parameter_name"] == "steps")
    assert (steps["type"], steps["parameter_default"]) == ({"type": "integer"}, 20)
    [required] = [p["parameter_name"] for p in described["/search"]["parameters"] if not p["parameter_has_default"]]
    assert required == "profile_id"


def test_profile_search_and_generate_lead_to_images_of_the_chosen_plan(client):
    profiled, found = planned(client, seed=3)
    assert profiled["prompts"] == QUICK["prompts"] and profiled["seed"] == 3
    assert np.shape(profiled["fisher"]) == (4, len(profiled["layers"])) == (len(profiled["sigma"]), len(profiled["layers"]))
    chosen = found["chosen"]
    plan = BitPlan.parse(chosen["plan"], "plan")
    assert plan.plan_id == chosen["plan_id"] and plan.weight_bytes == chosen["weight_bytes"]
    assert {"weight_bytes", "act_bits_mean", "error"} <= set(found["front"][0]) and len(found["front"]) == 5
    made = ask(client, "generate", plan=chosen["plan"], profile_id=profiled["profile_id"], prompts=["a", "b"], seed=7, steps=4)
    assert [(image["prompt"], image["seed"]) for image in made["images"]] == [("a", 7), ("b", 8)]
    assert made["plan_id"] == plan.plan_id
    assert (made["images"][0]["psnr_db"], made["images"][0]["latent_nmse"]) == (36.0, 0.004)
    assert made["metrics"]["PSNR"]["n"] == 2


def test_images_arrive_pixel_for_pixel(client, pipeline):
    profiled, found = planned(client)
    made = ask(client, "generate", plan=found["chosen"]["plan"], profile_id=profiled["profile_id"], prompts=["a"], seed=7, steps=4)
    plain = ask(client, "generate", prompts=["a"], seed=7, steps=4)
    model = pipeline.quantize(None, None, BitPlan.parse(found["chosen"]["plan"], "plan"))
    [pair] = pipeline.compare(pipeline.load(), model, ["a"], 7, 4).pairs
    assert np.array_equal(pixels(made["images"][0]["image"]), pair.image_quantized)
    assert np.array_equal(pixels(made["images"][0]["image_float"]), pair.image_float)
    assert np.array_equal(pixels(plain["images"][0]["image"]), pair.image_float) and plain["plan_id"] is None


def test_a_plan_without_a_profile_is_solved_at_its_own_steps(client, pipeline, monkeypatch):
    _, found = planned(client)
    asked, profile = [], pipeline.profile

    def profile_and_note(bundle, trace_config, config, quant, **more):
        asked.append((trace_config.steps, quant))
        return profile(bundle, trace_config, config, quant, **more)

    monkeypatch.setattr(pipeline, "profile", profile_and_note)
    plan = found["chosen"]["plan"]
    made = ask(client, "generate", plan=plan, prompts=["a"], steps=2)
    again = ask(client, "generate", plan=plan, prompts=["a"], steps=2, profile_id=made["profile_id"])
    assert asked == [(4, BitPlan.parse(plan, "plan").quant)]
    assert again["plan_id"] == made["plan_id"]


def test_settings_reach_the_stages_they_belong_to(client, pipeline, monkeypatch):
    seen = {}
    for name in ("profile", "search"):
        stage = getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, lambda *a, stage=stage, name=name, **k: seen.update({name: (a, k)}) or stage(*a, **k))
    profiled = ask(client, "profile", **QUICK, settings={"probes": 5, "group_size": 32, "target": "a100", "seed": 9})
    ask(client, "search", profile_id=profiled["profile_id"], budget_mb=1.3, act_bits=6, settings={"beam": 2})
    _, trace, sensitivity, quant = seen["profile"][0]
    assert (trace.seed, sensitivity.probes, sensitivity.seed, quant.group_size, quant.seed) == (0, 5, 9, 32, 9)
    assert seen["profile"][1]["target"] == "a100"
    _, _, budget, config = seen["search"][0]
    assert (budget.max_weight_bytes, budget.max_mean_act_bits, budget.max_latency_ms, config.beam) == (1_300_000, 6.0, None, 2)


@pytest.mark.parametrize("name, values, line", [
    ("profile", {"model": "nobody/knows"}, "no embedded model"),
    ("profile", {"model": 3}, "model must be a text"),
    ("profile", {"steps": 0}, "steps"),
    ("profile", {"steps": "many"}, "steps"),
    ("profile", {"prompts": "one text"}, "prompts"),
    ("profile", {"prompts": ["a\x00b"]}, "control characters"),
    ("profile", {"prompts": ["x" * 5001]}, "5001 characters"),
    ("profile", {"prompts": ["a"] * 257}, "prompts"),
    ("profile", {"settings": {"magic": 1}}, "'magic' is unknown"),
    ("profile", {"settings": ["probes"]}, "must be an object"),
    ("profile", {"settings": {"probes": 99}}, "probes"),
    ("search", {"profile_id": "guess"}, "no profile has this id"),
    ("search", {"profile_id": None}, "profile_id must be a text"),
    ("generate", {"prompts": ["a"] * 17}, "17 prompts"),
    ("generate", {"seed": -1}, "seed"),
    ("generate", {"plan": {"format": "other"}}, "plan"),
    ("generate", {"plan": 5}, "plan"),
    ("generate", {"profile_id": "guess"}, "no profile has this id"),
])
def test_what_is_wrong_is_said_in_one_line(client, name, values, line):
    assert line in refusal(client, name, **values)


@pytest.mark.parametrize("budget, line", [({"budget_mb": 0.01}, "memory"), ({"act_bits": 2}, "act_bits"), ({"budget_mb": "x"}, "budget_mb"),
                                          ({"pick": "prettiest"}, "pick"), ({"settings": {"beam": 0}}, "beam")])
def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(client, store, budget, line):
    profiled = ask(client, "profile", **QUICK)
    done = len(store.board._jobs)
    assert line in refusal(client, "search", profile_id=profiled["profile_id"], **budget)
    assert len(store.board._jobs) == done


def test_a_plan_of_another_model_is_refused(client):
    profiled, found = planned(client)
    plan = found["chosen"]["plan"] | {"model_hash": "0" * 16}
    assert "was made for model" in refusal(client, "generate", plan=plan, profile_id=profiled["profile_id"], prompts=["a"])


def test_a_fault_of_ours_is_one_line_too(client, pipeline, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(pipeline, "profile", broken)
    assert "profile failed: RuntimeError: first" in refusal(client, "profile", **QUICK)


def test_a_space_is_stricter(client, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/workbench")
    assert "can be loaded on this Space" in refusal(client, "profile", model="/etc")
    assert "31 steps" in refusal(client, "profile", steps=31)
    assert "25 prompts" in refusal(client, "profile", prompts=["a"] * 25)
    assert "9 prompts to draw" in refusal(client, "generate", prompts=["a"] * 9)


def test_callers_at_the_same_time_get_their_own(connect):
    def visit(number):
        client = connect()
        prompts = [f"caller {number} first", f"caller {number} second"]
        profiled = ask(client, "profile", prompts=prompts, steps=2 + number, seed=100 * number)
        found = ask(client, "search", profile_id=profiled["profile_id"])
        made = ask(client, "generate", plan=found["chosen"]["plan"], profile_id=profiled["profile_id"], prompts=prompts, steps=3,
                   seed=100 * number)
        assert profiled["prompts"] == [image["prompt"] for image in made["images"]] == prompts
        assert len(profiled["sigma"]) == len(found["chosen"]["plan"]["sigma_T"]) == 2 + number
        assert found["profile_id"] == made["profile_id"] == profiled["profile_id"]
        assert made["plan_id"] == found["chosen"]["plan_id"]
        assert [image["seed"] for image in made["images"]] == [100 * number, 100 * number + 1]
        return profiled["profile_id"]

    with ThreadPoolExecutor(6) as callers:
        assert len(set(callers.map(visit, range(6)))) == 6


def test_a_call_waits_in_the_page_s_line_and_says_how_many_are_ahead(client, store, session, gate):
    page_job = store.board.submit("profile", session.id, lambda on_progress: gate.wait(WAIT_S))
    call = client.submit(api_name="/profile", **QUICK)
    told = until(lambda: (call.status().progress_data or [None])[0])
    assert told.desc == "waiting, 1 ahead" and page_job.state == "running"
    gate.set()
    assert call.result(WAIT_S)["waited_s"] > 0


def test_a_cancelled_call_takes_its_job_along(client, store, gate):
    call = client.submit(api_name="/profile", **QUICK)
    job = until(lambda: next((job for job in store.board._jobs.values() if job.kind == "profile" and job.state == "running"), None))
    call.cancel()
    gate.set()
    assert job.wait(WAIT_S) and job.state == "cancelled"


def test_too_many_calls_in_line_are_refused(connect, gate, monkeypatch):
    monkeypatch.setattr(limits, "OWN_MACHINE", limits.Limits(**vars(limits.OWN_MACHINE) | {"waiting": 2}))
    calls = [connect().submit(api_name="/profile", **QUICK) for _ in range(2)]
    until(lambda: all(call.status().progress_data for call in calls))
    assert "2 calls are in line already" in refusal(connect(), "profile", **QUICK)
    gate.set()
    assert all(call.result(WAIT_S)["profile_id"] for call in calls)


def test_a_call_without_a_client_library_works(url):
    import urllib.request

    body = json.dumps({"prompts": ["a"], "seed": 5, "steps": 2}).encode()
    request = urllib.request.Request(f"{url}gradio_api/call/v2/generate", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request, timeout=WAIT_S))["event_id"]
    lines = urllib.request.urlopen(f"{url}gradio_api/call/v2/generate/{event}", timeout=WAIT_S).read().decode()
    [made] = json.loads(lines.split("event: complete\ndata: ")[1].splitlines()[0])
    assert (made["images"][0]["prompt"], made["images"][0]["seed"], made["steps"]) == ("a", 5, 2)


def until(look):
    limit = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return found
