"""Run folders: what goes in comes out, half a file is no file, and strangers' folders are left alone."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from tests.quant.toy import straight
from workbench import types
from workbench.options import ACT_BITS, BadInput, QuantConfig, SensitivityConfig
from workbench.plans import BitChoice, BitPlan, ScoredPlan
from workbench.replay.trace import Trace
from workbench.runs import RUN_MARKER, Run, code_version, freeze, thaw, write_atomically

STEPS, LAYERS, SAMPLES = 3, 2, 2


def _equal(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if is_dataclass(first):
        return type(first) is type(second) and all(_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    if isinstance(first, tuple | list):
        return type(first) is type(second) and len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, BaseModel):
        return type(first) is type(second) and first == second
    return type(first) is type(second) and first == second


def _trace():
    generator = torch.Generator().manual_seed(0)
    return Trace(
        integrator=straight(STEPS), tokens=5, latent_ST=torch.randn(SAMPLES, STEPS + 1, 5, 4, generator=generator),
        output_ST=torch.randn(SAMPLES, STEPS, 5, 4, generator=generator),
        conditioning=types.Conditioning(per_sample={"text.embeds": torch.randn(SAMPLES, 7).bfloat16(),
                                                    "lists": tuple(torch.randn(3 + i, 2) for i in range(SAMPLES))},
                                        shared={"ids": torch.arange(6).reshape(2, 3).T}),
        prompts=("a", "b"), seeds=(0, 1), model_hash="0123456789abcdef")


def _layers():
    return tuple(types.LayerInfo(index=i, name=f"blocks.{i}", block="0", role="q", n_out=3, k_in=5, tokens=7, has_bias=True,
                                 same_input=0, fused_with=0) for i in range(LAYERS))


def _sensitivity():
    table = torch.rand(STEPS, LAYERS)
    return types.SensitivityMap(layers=_layers(), sigma_T1=straight(STEPS).sigma_T1, fisher_TL=table, stderr_TL=table / 3,
                                alpha_TL=torch.ones(STEPS, LAYERS), act_absmax_TL=table, act_bits_C=(4, 16),
                                directional_TLC=torch.rand(STEPS, LAYERS, 2), squared_error_TLC=torch.rand(STEPS, LAYERS, 2),
                                config=SensitivityConfig(tau=0.25), samples=SAMPLES, model_hash="0123456789abcdef")


def _plan():
    rows = tuple(tuple(ACT_BITS[(t + k) % 5] for k in range(LAYERS)) for t in range(STEPS))
    mean = sum(map(sum, rows)) / (STEPS * LAYERS)
    return BitPlan(model_hash="0123456789abcdef", layer_names=("blocks.0", "blocks.1"), sigma_T=(1.0, 0.7, 0.3),
                   weight_choice_L=(BitChoice(weight_bits=4), BitChoice(weight_bits=3, group_size=None)), act_bits_TL=rows,
                   quant=QuantConfig(group_size=None), weight_bytes=99, act_bits_mean=mean, act_bits_macs=mean, bit_ops=1e9)


def _result():
    scored = ScoredPlan(plan=_plan(), error=0.01, samples=4)
    event = types.SearchEvent(step=1, steps=3, candidates=((4.0, 0.5),), survivors=(), evaluations=3, seconds=0.5,
                              front=((99, 4.0, 0.1),))
    return types.SearchResult(front=(scored,), references=(), chosen=scored, evaluations=3, seconds=1.5, events=(event,))


def _comparison():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    pair = types.Pair(prompt="a", seed=0, frames_float=image[None], frames_quantized=image[None, ::-1], psnr_db=30.0, ssim=0.9,
                      latent_nmse=0.1, latent_nmse_T=(0.1, 0.2))
    one = types.Interval(mean=1.0, low=float("-inf"), high=float("inf"), n=1)
    return types.Comparison(pairs=(pair,), metrics={"psnr_db": one}, float_seconds_per_image=1.0, quantized_seconds_per_image=2.0,
                            float_bytes=4, quantized_bytes=2, compute="emulated", reason="why", plan=_plan())


@pytest.mark.parametrize("make", [_trace, _sensitivity, _result, _comparison, _plan])
def test_results_come_back_equal(tmp_path, make):
    value = make()
    Run(tmp_path / "run").save("stage", "0123", value)
    assert _equal(Run(tmp_path / "run").load(type(value), "stage", "0123"), value)


@dataclass(frozen=True)
class Bank:
    weights: dict[str, dict[int, types.SolveReport]]
    table: torch.Tensor | None
    pair: tuple[int, BitChoice]


@dataclass(frozen=True)
class Twin:
    weights: dict[str, dict[int, types.SolveReport]]
    table: torch.Tensor | None
    pair: tuple[int, BitChoice]


def test_classes_with_the_same_fields_are_not_confused(tmp_path):
    run = Run(tmp_path)
    run.save("x", "ab", Twin(weights={}, table=None, pair=(3, BitChoice(weight_bits=8))))
    assert run.load(Bank, "x", "ab") is None and run.load(Twin, "x", "ab") is not None


def test_nested_dicts_with_integer_keys_and_mixed_tuples_survive():
    report = types.SolveReport(layer="a.b", loss_rtn=2.0, loss_solved=1.0, damping=0.01, dead_channels=0)
    bank = Bank(weights={"a.b": {4: report}, "a": {}}, table=None, pair=(3, BitChoice(weight_bits=8)))
    tensors, node = freeze(bank)
    assert _equal(thaw(Bank, tensors, json.loads(json.dumps(node))), bank)


def test_views_of_one_storage_are_stored_once_each():
    whole = torch.arange(1000.0)
    tensors, _ = freeze((whole, whole[:4], whole[2:3]))
    assert [t.untyped_storage().nbytes() for t in tensors.values()] == [4000, 16, 4]


def test_a_callable_or_unknown_object_is_refused():
    with pytest.raises(TypeError, match="cannot hold"):
        freeze({"f": print})


def test_a_truncated_file_counts_as_absent(tmp_path):
    run, trace = Run(tmp_path), _trace()
    path = run.save("trace", "ab", trace)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not run.has("trace", "ab")
        assert run.load(Trace, "trace", "ab") is None
        assert run.load_blob("trace", "ab") is None
    assert _equal(run.resume(Trace, "trace", "ab", lambda: trace), trace)
    assert run.has("trace", "ab")
    made_again = run.resume(Trace, "trace", "ab", lambda: pytest.fail("the stored trace was ignored"))
    assert _equal(made_again, trace)


def test_an_artifact_of_another_class_or_with_broken_invariants_counts_as_absent(tmp_path):
    run = Run(tmp_path)
    run.save("x", "ab", _trace())
    assert run.load(types.SensitivityMap, "x", "ab") is None
    tensors, node = freeze(_trace())
    node["fields"]["seeds"]["tuple"].append(5)
    from safetensors.torch import save_file
    save_file(tensors, run.path("x", "ab"), {"adatsq": json.dumps({"type": "Trace", "value": node})})
    assert run.load(Trace, "x", "ab") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    run = Run(tmp_path)
    path = run.save_json("note", "ab", {"a": 1})

    def fail(temporary):
        temporary.write_text("{half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    with pytest.raises(ValueError):
        run.save_json("note", "ab", {"a": float("nan")})
    assert run.load_json("note", "ab") == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note-ab.json", RUN_MARKER]


def test_a_reader_keeps_the_whole_old_file_while_a_new_one_takes_its_name(tmp_path):
    run = Run(tmp_path)
    path = run.save_json("note", "ab", "old" * 1000)
    with path.open() as reader:
        run.save_json("note", "ab", "new")
        assert json.loads(reader.read())["value"] == "old" * 1000
    assert run.load_json("note", "ab") == "new"


def test_a_process_killed_while_writing_loses_only_what_it_was_writing(tmp_path):
    code = ("import os, sys; from pathlib import Path; from workbench.runs import Run, write_atomically\n"
            "run = Run(sys.argv[1]); run.save_json('note', 'ab', {'a': 1})\n"
            "def die(temporary): temporary.write_text('half'); os.kill(os.getpid(), 9)\n"
            "write_atomically(run.path('note', 'ab', '.json'), die)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert list(tmp_path.glob(".*.tmp"))
    assert Run(tmp_path).load_json("note", "ab") == {"a": 1}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_live_writer_keeps_its_temporary_file(tmp_path):
    Run(tmp_path).save_json("note", "ab", 1)
    live = tmp_path / f".{os.getpid()}-abc.tmp"
    live.write_text("half")
    Run(tmp_path)
    assert live.exists()


def test_a_folder_that_is_no_run_is_refused_and_untouched(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(BadInput, match="not a run folder"):
        Run(tmp_path)
    with pytest.raises(BadInput, match="is a file"):
        Run(tmp_path / "photo.png")
    (tmp_path / RUN_MARKER).write_text('{"format": "something else"}')
    with pytest.raises(BadInput, match="not a run folder"):
        Run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.png", RUN_MARKER]


def test_nothing_is_created_before_something_is_saved(tmp_path):
    run = Run(tmp_path / "new" / "run")
    assert run.load_json("a", "b") is None and not run.has("a", "b")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", ["../x", "a/b", "", ".hidden"])
def test_artifact_names_stay_in_the_folder(tmp_path, stage):
    with pytest.raises(ValueError, match="artifact name"):
        Run(tmp_path).save_json(stage, "", 1)


def test_keys_depend_on_everything_that_goes_in():
    tensor = torch.arange(6)
    parts = [(), (1,), ("1",), (1.0,), (True,), ((1,),), (None,), (tensor,), (tensor.reshape(2, 3),), (tensor.int(),),
             (tensor + 1,), (SensitivityConfig(),), (SensitivityConfig(tau=2),), (QuantConfig(),), ({"a": 1},), ({"a": 2},),
             (_layers()[0],), (_layers()[1],)]
    keys = [Run.key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert Run.key({"a": 1, "b": tensor}) == Run.key({"b": tensor.clone(), "a": 1})


def test_keys_are_the_same_in_every_process():
    code = "from workbench.options import QuantConfig; from workbench.runs import Run; print(Run.key('a', QuantConfig(), 2))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == Run.key("a", QuantConfig(), 2)


def test_what_other_code_has_made_counts_as_absent(tmp_path):
    run, other, trace = Run(tmp_path), Run(tmp_path, code="another version"), _trace()
    other.save("trace", "ab", trace)
    other.save_json("note", "ab", {"a": 1})
    assert run.load(Trace, "trace", "ab") is None and run.load_json("note", "ab") is None and not run.has("trace", "ab")
    assert _equal(other.load(Trace, "trace", "ab"), trace) and other.load_json("note", "ab") == {"a": 1}
    assert run.resume(Trace, "trace", "ab", lambda: trace) is trace and run.has("trace", "ab")


def test_the_version_is_of_the_sources_that_compute(monkeypatch, tmp_path):
    before = code_version()
    read = Path.read_bytes

    def changed(name):
        code_version.cache_clear()
        monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == name else b""))
        return code_version()

    try:
        assert changed("solvers.py") != before and changed("cpu.c") != before and changed("plot.js") == before == changed("commands.py")
    finally:
        code_version.cache_clear()
