"""The shell: a journey through every verb, stable JSON keys, and one clear line with status 2 for everything that is wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench import cli, terminal
from workbench.methods import METHODS
from workbench.options import Progress

ROOT = Path(__file__).resolve().parents[1]
STEPS = "2"
CAPTIONS = ("fluent pizza", "noto grinning face")
FEW = ("--steps", STEPS, "--prompts", "prompts.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shell")
    (made / "prompts.txt").write_text("\n".join(CAPTIONS))
    (made / "empty.txt").write_text("")
    (made / "huge.txt").write_text("x" * 2_000_000)
    (made / "pickle.bin").write_bytes(b"\x80\x04N.")
    (made / "photos").mkdir()
    (made / "photos" / "a.png").write_bytes(b"x")
    return made


def shell(folder, *arguments, check=True):
    """A verb in a process of its own, in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", "workbench", *arguments], cwd=folder, capture_output=True, text=True,
                          env=environment, timeout=600, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def searched(folder):
    """A search's JSON, its run folder `run` and its plan."""
    done = shell(folder, "search", "emoji-flux", *FEW, "--budget-mb", "9", "--act-bits", "4", "--run", "run", "--json", "search.json",
                 "--beam", "2", "--samples", "2", "--finalists", "1", "--probes", "1")
    assert done.stderr == ""
    return read(folder / "search.json")


@pytest.fixture(scope="module")
def exported(folder, searched):
    shell(folder, "export", "emoji-flux", *FEW, "--probes", "1", "--plan", searched["chosen"]["plan"], "--run", "run", "--to", "checkpoint",
          "--json", "export.json")
    return read(folder / "export.json")


def test_help_is_instant_and_complete():
    code = ("import sys; from workbench import cli\n"
            "for verb in (['--help'], ['search', '--help']):\n"
            "    try: cli.main(verb)\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "print(sorted({'torch', 'numpy', 'gradio', 'diffusers', 'rich'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("[]")
    assert all(f" {verb} " in done.stdout for verb in cli.VERBS)
    assert "--max-mean-act-bits" not in done.stdout and "--act-bits" in done.stdout


def test_search_writes_its_keys_and_a_plan_within_budget(folder, searched):
    assert {"front", "chosen", "evaluations", "seconds"} <= set(searched)
    assert all({"weight_bytes", "act_bits_mean", "error"} <= set(point) for point in searched["front"])
    chosen = searched["chosen"]
    assert chosen["weight_bytes"] <= 9_000_000 and chosen["act_bits_mean"] <= 4.0
    plan = read(folder / chosen["plan"])
    assert (plan["weight_bytes"], plan["act_bits_mean"]) == (chosen["weight_bytes"], chosen["act_bits_mean"])
    assert searched["evaluations"] > 0 and searched["seconds"] > 0
    assert min(p["error"] for p in searched["front"]) < chosen["error"], "the front reaches beyond the budget"


def test_a_search_in_time_tells_the_milliseconds_of_every_plan(folder, searched):
    done = shell(folder, "search", "emoji-flux", *FEW, "--budget-ms", "1", "--target", "rtx4090", "--run", "run", "--json", "timed.json",
                 "--beam", "2", "--samples", "2", "--finalists", "1", "--probes", "1", "--rivals", "uniform")
    chosen = read(folder / "timed.json")["chosen"]
    assert 0 < chosen["latency_ms"] <= 1 and chosen["weight_bytes"] > 9_000_000, "time is plenty, and memory is not limited"
    assert "ms, modelled" in done.stdout and "rtx4090" not in done.stdout and "NVIDIA RTX 4090, INT4 (modelled)" in done.stdout
    assert f"{chosen['latency_ms']:.4g} ms, error {chosen['error']:.3e}" in done.stdout


def test_profile_writes_maps_of_one_size_and_resumes(folder, searched, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "run").glob("*.safetensors")}
    assert cli.main(["profile", "emoji-flux", *FEW, "--probes", "1", "--run", "run", "--json", "profile.json"]) == 0
    found = read(folder / "profile.json")
    layers = len(found["layers"])
    assert layers == len(set(found["layers"])) and len(found["sigma"]) == int(STEPS)
    for name in ("fisher", "alpha"):
        assert np.shape(found[name]) == (int(STEPS), layers)
    assert np.allclose(np.mean(found["alpha"], axis=0), 1, atol=1e-4)
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "run").glob("*.safetensors")} == before, "the run was not resumed"


def test_an_exported_checkpoint_draws_what_its_plan_draws(folder, searched, exported, capsys, monkeypatch):
    assert exported["verified"] and exported["weight_bytes"] == searched["chosen"]["weight_bytes"]
    shell(folder, "generate", "checkpoint", *FEW, "--to", "images-checkpoint", "--json", "images.json")
    monkeypatch.chdir(folder)
    plan = searched["chosen"]["plan"]
    assert cli.main(["generate", "emoji-flux", *FEW, "--probes", "1", "--plan", plan, "--run", "run", "--to", "images-plan"]) == 0
    assert cli.main(["generate", "emoji-flux", *FEW, "--to", "images-float"]) == 0
    made = read(folder / "images.json")
    assert [(image["prompt"], image["seed"]) for image in made["images"]] == [(CAPTIONS[0], 0), (CAPTIONS[1], 1)]
    for image in made["images"]:
        name = Path(image["image"]).name
        pixels = {kind: np.asarray(Image.open(folder / f"images-{kind}" / name)) for kind in ("checkpoint", "plan", "float")}
        assert np.array_equal(pixels["checkpoint"], pixels["plan"])
        assert not np.array_equal(pixels["float"], pixels["plan"])


def test_compare_writes_the_stable_keys(folder):
    shell(folder, "compare", "emoji-flux", "--methods", "rtn,gptq", "--weight-bits", "4", "--act-bits", "8", *FEW, "--seed", "3",
          "--json", "compare.json", "--csv", "compare.csv", "--markdown", "compare.md", "--grid", "compare.png")
    found = read(folder / "compare.json")
    assert (folder / "compare.csv").read_text().startswith("method,label,") and "**" in (folder / "compare.md").read_text()
    assert Image.open(folder / "compare.png").size == (150 + 2 * 132, 34 + 3 * 132)  # float, rtn and gptq; two prompts
    assert {"model", "steps", "seed", "device", "float", "results"} <= set(found)
    assert (found["model"], found["steps"], found["seed"]) == ("emoji-flux", int(STEPS), 3)
    assert found["float"]["weight_bytes"] > 0 and found["float"]["seconds_per_image"] > 0
    assert [result["method"] for result in found["results"]] == ["rtn", "gptq"]
    for result in found["results"]:
        assert result["compute"] in ("emulated", "kernel") and result["act_bits_mean"] == result["act_bits_macs"] == 8
        assert 4 < result["weight_bits_quantized"] < result["weight_bits_total"] < 16
        assert result["weight_bytes"] < found["float"]["weight_bytes"] and result["seconds_per_image"] > 0
        for metric in ("psnr_db", "ssim", "vif", "latent_nmse", "retrieval"):
            assert result[metric]["low"] <= result[metric]["mean"] <= result[metric]["high"] and result[metric]["n"] == len(CAPTIONS)


def test_quantize_reports_every_layer(folder, searched, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    plan = searched["chosen"]["plan"]
    assert cli.main(["quantize", "emoji-flux", *FEW, "--probes", "1", "--plan", plan, "--run", "run", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    packed = sum(choice["weight_bits"] != 16 for choice in read(folder / plan)["weight_choice_L"])
    assert len(found["layers"]) == packed and found["weight_bytes"] == searched["chosen"]["weight_bytes"]
    assert all(layer["loss_solved"] <= layer["loss_rtn"] or layer["note"] for layer in found["layers"])


def test_models_lists_the_embedded_one_and_its_layers(capsys):
    assert cli.main(["models", "--json", "-"]) == 0
    assert "emoji-flux" in [model["name"] for model in json.loads(capsys.readouterr().out)["models"]]
    assert cli.main(["models", "emoji-flux", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) > 10


BAD = [
    (["serach"], "search"),
    ([], "VERB"),
    (["profile", "no-such-model"], "emoji-flux"),
    (["profile", "photos"], "model_index.json"),
    (["profile", "pickle.bin"], "pickle"),
    (["profile", "emoji-flux", "--prompts", "empty.txt"], "1 to 256"),
    (["profile", "emoji-flux", "--prompts", "huge.txt"], "1 MB"),
    (["profile", "emoji-flux", "--prompts", "none.txt"], "no such"),
    (["profile", "emoji-flux", "--steps", "0"], "--steps 0"),
    (["profile", "emoji-flux", "--steps", "nan"], "--steps nan"),
    (["profile", "emoji-flux", "--tau", "nan"], "--tau nan"),
    (["profile", "emoji-flux", "--estimator", "magic"], "adjoint, local"),
    (["profile", "emoji-flux", "--group-size", "5"], "32, 64, 128"),
    (["profile", "emoji-flux", "--run", "photos"], "not a run folder"),
    (["profile", "emoji-flux", "--json", "nowhere/out.json"], "does not exist"),
    (["profile", "emoji-flux", "--json", "photos"], "is a folder"),
    (["profile", "emoji-flux", "--device", "tpu"], "cuda"),
    (["profile", "some-owner/some-model"], "embedded models work offline"),
    (["search", "emoji-flux", "--act-bits", "4", "--plan-out", "nowhere/plan.json"], "does not exist"),
    (["search", "emoji-flux"], "no limit"),
    (["search", "emoji-flux", "--act-bits", "nan"], "--act-bits nan"),
    (["search", "emoji-flux", "--act-bits", "2"], "--act-bits 2"),
    (["search", "emoji-flux", "--budget-mb", "inf"], "--budget-mb inf"),
    (["search", "emoji-flux", "--budget-mb", "0.5"], "smallest feasible"),
    (["quantize", "emoji-flux"], "--plan is missing"),
    (["quantize", "emoji-flux", "--plan", "none.json"], "no such file"),
    (["quantize", "emoji-flux", "--plan", "prompts.txt"], "plan"),
    (["quantize", "emoji-flux", "--plan", "pickle.bin"], "not a plan"),
    (["export", "emoji-flux", "--plan", "x.json"], "--to is missing"),
    (["export", "emoji-flux", "--plan", "x.json", "--to", "photos"], "not an earlier export"),
    (["generate", "emoji-flux"], "--to is missing"),
    (["generate", "emoji-flux", "--to", "prompts.txt"], "is a file"),
    (["serve", "--port", "70000"], "65535"),
    (["compare", "emoji-flux", "--methods", "magic"], "rtn"),
    (["compare", "emoji-flux", "--grid", "nowhere/grid.png"], "does not exist"),
    (["compare", "emoji-flux", "--modulation", "gone"], "stored, cached"),
    (["compare", "emoji-flux", "--weight-bits", "5"], "--weight-bits 5"),
    (["compare", "emoji-flux", "--methods", "rtn", "--act-bits", "3.5"], "3.5"),
    (["compare", "emoji-flux", "--methods", "rtn", "--prompts", "empty.txt"], "1 to 256"),
]


@pytest.mark.parametrize("arguments, hint", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_with_status_2_and_writes_nothing(folder, capsys, monkeypatch, arguments, hint):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: ")
    assert hint in shown.err and len(shown.err) < 400
    assert sorted(folder.rglob("*")) == before


def test_a_plan_for_another_model_or_with_bad_bits_is_refused(folder, searched, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    plan = read(folder / searched["chosen"]["plan"])
    other_bits = [[5] * len(row) for row in plan["act_bits_TL"]]
    for change, hint in (({"model_hash": "0" * 16}, "belongs to model"), ({"act_bits_TL": other_bits}, "use one of"),
                         ({"act_bits_mean": "NaN"}, "finite"), ({"sigma_T": [0.5, 1.0]}, "decreasing"), ({"extra": 1}, "extra")):
        Path("bad-plan.json").write_text(json.dumps({**plan, **change}))
        assert cli.main(["quantize", "emoji-flux", "--plan", "bad-plan.json"]) == 2
        assert hint in capsys.readouterr().err.lower()


@pytest.mark.parametrize("arguments", [["profile", "no-such-model"], ["search", "emoji-flux", "--budget-mb", "0.5"],
                                       ["profile", "pickle.bin"]])
def test_a_real_process_says_one_line_only(folder, arguments):
    done = shell(folder, *arguments, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_ctrl_c_cancels_cleanly_and_the_run_goes_on(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "workbench", "profile", "emoji-flux", "--steps", "60", "--probes", "8",
                                "--prompts", "prompts.txt", "--run", "cancelled", "--json", "cancelled.json"],
                               cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run = folder / "cancelled"
    deadline = time.monotonic() + 300
    while not list(run.glob("trace-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "no trace was recorded"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1 and "cancelled" in err and out == ""
    assert not (folder / "cancelled.json").exists() and not list(run.glob(".*.tmp"))
    assert sorted(p.name.split("-")[0] for p in run.iterdir()) == ["run.json", "trace"]


def test_serve_answers_on_its_port_and_stops_on_ctrl_c(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "workbench", "serve", "--port", str(port), "--run", "served"], cwd=folder,
                               env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline, page = time.monotonic() + 120, ""
    while "AdaTSQ" not in page:
        assert process.poll() is None and time.monotonic() < deadline, "no page was served"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as reply:
                page = reply.read().decode()
        except OSError:
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err


def test_the_methods_compared_by_default_exist():
    from workbench.commands_judging import Contest

    assert set(Contest().methods.split(",")) < set(METHODS)


def test_a_second_ctrl_c_stops_at_once():
    class Bars:
        add_task = staticmethod(lambda stage, total: 0)
        update = staticmethod(lambda *args, **kwargs: None)

    listener = terminal.Listener(Bars)
    with pytest.raises(KeyboardInterrupt):
        listener.interrupt(None, None)  # nothing has reported: nobody would hear a polite request
    listener(Progress(stage="a", done=0, total=1))
    listener.interrupt(None, None)
    with pytest.raises(terminal.Cancelled):
        listener(Progress(stage="a", done=1, total=1))
    with pytest.raises(KeyboardInterrupt):
        listener.interrupt(None, None)


def test_intervals_without_bounds_become_null():
    value = {"a": (float("inf"), [float("nan"), 1.5]), "b": float("-inf"), "c": 2}
    assert json.loads(json.dumps(terminal.finite(value), allow_nan=False)) == {"a": [None, [None, 1.5]], "b": None, "c": 2}


def test_size_and_text_length_are_flags_that_a_plan_remembers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    asked = ["--height", "32", "--width", "48", "--text-tokens", "6"]
    search = ["--budget-mb", "9", "--beam", "1", "--samples", "1", "--finalists", "1", "--probes", "1", "--refine", "0"]
    assert cli.main(["search", "emoji-flux", *FEW, *asked, *search, "--plan-out", "wide.json"]) == 0
    assert read("wide.json")["generation"] | {"height": 32, "width": 48, "text_tokens": 6} == read("wide.json")["generation"]
    assert cli.main(["generate", "emoji-flux", *FEW, "--probes", "1", "--plan", "wide.json", "--to", "wide"]) == 0
    assert {Image.open(path).size for path in Path("wide").glob("*.png")} == {(48, 32)}
    assert cli.main(["export", "emoji-flux", *FEW, "--probes", "1", "--plan", "wide.json", "--to", "wide-checkpoint"]) == 0
    assert cli.main(["generate", "wide-checkpoint", *FEW, "--to", "wide-again"]) == 0
    first, again = (sorted(Path(name).glob("*.png")) for name in ("wide", "wide-again"))
    assert all(np.array_equal(Image.open(a), Image.open(b)) for a, b in zip(first, again, strict=True)) and len(first) == len(CAPTIONS)


@pytest.mark.parametrize(("flags", "words"), [(["--height", "50"], "divisible by"), (["--frames", "5"], "has none"),
                                              (["--guidance", "3"], "has none"), (["--width", "8"], "--width 8")])
def test_what_a_model_cannot_generate_is_one_line(folder, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(folder)
    assert cli.main(["generate", "emoji-flux", *FEW, *flags, "--to", "never"]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not Path("never").exists()


LOUD = """
import ctypes, os, subprocess, sys
from workbench import cli, commands

def models(args, listener):
    libc = ctypes.CDLL(None)
    print("python's print")
    os.write(1, b"written on the descriptor\\n")
    libc.printf(b"kept in C's buffer\\n")
    subprocess.run(["echo", "of a child"], check=True)
    {then}
    return {{"a": 1}}, ["a table"]

function, *rest = cli.VERBS["models"]
cli.VERBS["models"] = (models, *rest)
models.__doc__ = "loud"
status = cli.main(["models", *sys.argv[1:]])
print("after the verb")
sys.exit(status)
"""
SAID = ("python's print", "written on the descriptor", "kept in C's buffer", "of a child")


@pytest.mark.skipif(os.name != "posix", reason="the loud verb calls the C library by its POSIX name")
@pytest.mark.parametrize("then", ["pass", "raise cli.BadInput('no')"])
def test_json_stands_alone_whatever_libraries_write_on_the_descriptor(folder, then):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # set, C would buffer nothing
    done = subprocess.run([sys.executable, "-c", LOUD.format(then=then), "--json", "-"], cwd=folder, env=environment, capture_output=True,
                          text=True, check=False)
    json_text, _, after = done.stdout.partition("after the verb")
    assert after == "\n" and (json.loads(json_text) == {"a": 1} if then == "pass" else json_text == ""), done.stdout
    assert all(words in done.stderr for words in SAID) and done.returncode == (0 if then == "pass" else 2)
    told = subprocess.run([sys.executable, "-c", LOUD.format(then="pass"), "--json", "told.json"], cwd=folder, env=environment,
                          capture_output=True, text=True, check=True)
    assert all(words in told.stdout for words in SAID) and "a table" in told.stdout and read(folder / "told.json") == {"a": 1}
