"""GPU work in a forked worker: what crosses the border of the process, and that nothing changes where there is no such worker."""

import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests.ui import forking_spaces
from tests.ui.fakes import FakeBundle, FakePipeline
from tests.ui.test_actions import SEARCH_SETTINGS, profile
from workbench import zerogpu
from workbench.options import BadInput, Progress
from workbench.ui.actions import model, search
from workbench.zerogpu import stages

WAIT_S = 20


@dataclass
class LockedBundle(FakeBundle):
    """A fake with what cannot be pickled."""

    def __post_init__(self):
        self.renew_locks()

    def renew_locks(self):
        self.lock = threading.Lock()  # an RLock might take the new thread for its owner


class WorkerPipeline(FakePipeline):
    """Says where it ran, and leaves a file when it is stopped."""

    def __init__(self, folder):
        super().__init__(pause=0.01)
        self.folder, self.bundle = folder, LockedBundle()

    def load(self, source="emoji-flux", device="auto", **_):
        return self.bundle

    def profile(self, bundle, *args, **kwargs):
        with bundle.lock:
            try:
                found = super().profile(bundle, *args, **kwargs)
            except BaseException as error:
                (self.folder / "stopped").write_text(f"{type(error).__name__} {os.getpid()}")
                raise
        found.seconds = float(os.getpid())
        (self.folder / "generated").write_text(bundle.generation.words)
        return found

    def quantize(self, bundle, found, plan, *, on_progress):
        return SimpleNamespace(plan=plan, bundle=bundle, pid=os.getpid())


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    fake = WorkerPipeline(tmp_path)
    monkeypatch.setitem(sys.modules, "workbench.pipeline", fake)
    return fake


@pytest.fixture
def zero_gpu(pipeline, monkeypatch):
    """`workbench.zerogpu` as it is imported on a ZeroGPU Space."""
    monkeypatch.setitem(sys.modules, "spaces", forking_spaces)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    forking_spaces.durations.clear()
    yield importlib.reload(zerogpu)
    monkeypatch.undo()
    importlib.reload(zerogpu)


def ignore(_):
    pass


def test_without_spaces_nothing_changes(pipeline):
    def function():
        pass

    assert zerogpu.gpu(10)(function) is function
    assert stages() is pipeline


def test_two_functions_ask_for_a_gpu(zero_gpu):
    assert forking_spaces.durations == [zerogpu.PLAN_S, zerogpu.DRAW_S]
    assert {function for function, _ in zerogpu.STAGES.values()} == {zerogpu.plan_on_gpu, zerogpu.draw_on_gpu}


def test_what_lay_on_the_workers_device_comes_as_the_apps_and_goes_back(zero_gpu):
    app, worker = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(device=torch.device("meta"))
    of_worker, linear = torch.arange(6.0).view(2, 3).T, torch.nn.Linear(2, 3)
    for tensor in (of_worker, linear.weight):
        tensor._of_a_worker = True  # as `loads` leaves it
    sent = zero_gpu.dumps({"tensor": of_worker, "linear": linear, "own": torch.ones(2)}, app)
    here, there = zero_gpu.loads(sent, app), zero_gpu.loads(sent, worker)
    assert torch.equal(here["tensor"], of_worker) and torch.equal(here["linear"].weight, linear.weight)
    assert isinstance(here["linear"].weight, torch.nn.Parameter) and here["linear"].weight.requires_grad
    assert [made.device.type for made in (there["tensor"], there["linear"].weight)] == ["meta", "meta"]
    assert there["linear"].bias.device.type == there["own"].device.type == "cpu", "never was on the device"
    again = zero_gpu.loads(zero_gpu.dumps(here, app), worker)
    assert again["tensor"].device.type == again["linear"].weight.device.type == "meta"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("spaces") is None, reason="the package spaces is not installed")
def test_a_visit_with_the_real_package(root):
    """All of `spaces` but CUDA: see `on_zero_gpu.py`."""
    done = subprocess.run([sys.executable, root / "tests" / "ui" / "on_zero_gpu.py"], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["cuda_seen_by_the_app"] and seen["device"] == "cpu", "a GPU that is pretended to one thread is not used by another"
    assert seen["layers_of_another"] == [], "a model does not travel"
    assert seen["progress"] > 20 and seen["psnr_db"] > 25 and seen["same_images"] and seen["stopped"] == 2
    stages = seen["asked"].count("/schedule")
    assert stages == 6 and seen["asked"].count("/release") == stages and seen["asked"].count("/allow") == 2, "workers are used again"


def test_every_stage_that_needs_a_gpu_is_a_function_of_its_module():
    for stage, (_, module) in zerogpu.STAGES.items():
        text = (importlib.resources.files("workbench") / (module.removeprefix("workbench.").replace(".", "/") + ".py")).read_text()
        assert f"\ndef {stage}(bundle: Bundle" in text


def test_a_profile_of_the_page_runs_in_a_worker_with_its_progress(zero_gpu, session, finish):
    assert session.bundle is stages().load()
    profile(session)
    finish(session)
    assert session.job.state == "done", session.job.error
    assert session.profile.seconds not in (0.0, float(os.getpid()))
    assert [detail["step"] for stage, detail in session.job.events if stage == "sensitivity"] == [3, 2, 1, 0]
    assert torch.equal(torch.tensor(session.fisher_TL), session.profile.sensitivity.fisher_TL)
    search.search(session, 1.2, None, 5.0, *SEARCH_SETTINGS)
    finish(session)
    assert session.result.chosen.plan.plan_id == session.chosen.plan.plan_id


def test_a_worker_generates_what_the_page_was_set_to(zero_gpu, session, tmp_path, finish):
    model.generate_as(session, *[32 if name == "width" else None for name in model.GENERATION_INPUTS])
    profile(session)
    assert finish(session).profile is not None and (tmp_path / "generated").read_text() == "width 32"


def test_cancelling_stops_the_stage_in_the_worker_at_its_next_report(zero_gpu, pipeline, session, tmp_path):
    pipeline.pause = 0.3
    profile(session, steps=50)
    limit = time.monotonic() + WAIT_S
    while session.snapshot().done < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    session.cancel()
    assert session.job.wait(5) and session.job.state == "cancelled"
    name, pid = (tmp_path / "stopped").read_text().split()
    assert name == "Cancelled" and int(pid) != os.getpid()


def test_bad_input_arrives_as_the_line_that_was_said(zero_gpu, pipeline, monkeypatch, session, finish):
    def refuse(*args, **kwargs):
        raise BadInput("the budget is 3 MB; the smallest plan takes 5 MB")

    monkeypatch.setattr(pipeline, "profile", refuse)
    profile(session)
    finish(session)
    assert session.notices["sensitivity"] == ("the budget is 3 MB; the smallest plan takes 5 MB", "error")


@pytest.mark.parametrize("made, line", [(lambda: 1 / 0, "ZeroDivisionError: division by zero"), (lambda: threading.Lock(), "cannot pickle"),
                                        (lambda: sys.exit(3), "SystemExit: 3"),
                                        (lambda: os._exit(3), "GPU task aborted|did not stop")])
def test_a_fault_or_a_lost_worker_is_an_error_of_one_line(zero_gpu, pipeline, monkeypatch, made, line):
    monkeypatch.setattr(pipeline, "compare", lambda *args, on_progress: made())
    with pytest.raises((RuntimeError, AssertionError), match=line):
        stages().compare(pipeline.bundle, None, on_progress=ignore)


def test_what_comes_back_refers_to_this_process_s_model(zero_gpu, pipeline):
    back = stages().quantize(pipeline.bundle, None, "plan", on_progress=ignore)
    assert back.pid != os.getpid()
    assert back.bundle is pipeline.bundle


def test_a_lock_that_is_held_at_the_fork_does_not_hold_the_worker(zero_gpu, pipeline, session, finish):
    taken, done = threading.Event(), threading.Event()

    def hold():
        with pipeline.bundle.lock:
            taken.set()
            done.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert taken.wait(WAIT_S)
        profile(session)
        finish(session)
        assert session.job.state == "done" and not done.is_set()
    finally:
        done.set()
        holder.join()


def test_a_stage_without_progress_and_what_is_no_stage(zero_gpu, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "inspect", lambda bundle, layer: (layer, os.getpid()))
    layer, pid = stages().inspect(pipeline.bundle, 4)
    assert layer == 4 and pid != os.getpid()
    assert stages().default_budget == pipeline.default_budget


def test_a_job_runs_in_the_context_of_the_request_it_came_from(store):
    import contextvars

    visitor = contextvars.ContextVar("visitor", default="nobody")
    visitor.set("somebody")
    job = store.board.submit("look", "me", lambda on_progress: on_progress(Progress(stage="", done=1, total=1)) or visitor.get())
    assert job.wait(WAIT_S) and job.result == "somebody"


def test_a_quantized_model_crosses_and_draws_the_same_image(bundle):
    from workbench import generate
    from workbench.options import QuantConfig
    from workbench.pipeline import uniform_plan
    from workbench.quant.bank import round_bank
    from workbench.quant.quantize import build

    integrator, quant = bundle.integrator(2), QuantConfig()
    plan = uniform_plan(bundle, quant, integrator.sigma_T1[:-1].tolist(), 4, 4)
    model = build(bundle, round_bank(bundle, quant, plan.weight_bits_L), plan)
    copy = zerogpu.loads(zerogpu.dumps(model, bundle), bundle)
    model.modules  # noqa: B018 (made, but not sent: it holds the float model)
    sent = zerogpu.dumps(model, bundle)
    assert len(sent) < 2 * model.weight_bytes
    copy = zerogpu.loads(sent, bundle)
    assert copy.bundle is bundle and all(each.step_state in (None, copy.state) for each in copy.layers.values())
    first, second = (generate.run(bundle, ["a"], [1], integrator, quantized=each).latent_ST for each in (model, copy))
    assert copy is not model and torch.equal(first, second)
    assert not torch.equal(first, generate.run(bundle, ["a"], [1], integrator).latent_ST)
