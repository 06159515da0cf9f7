"""A checkpoint folder: what is reopened draws the same images, bit for bit; what is damaged or foreign is refused."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

import workbench
from workbench import cli, costs, export, generate
from workbench.options import WEIGHT_BITS, BadInput, Cancelled, QuantConfig, TraceConfig
from workbench.plans import BitChoice, make_plan
from workbench.quant import quantize
from workbench.quant.bank import Calibration
from workbench.replay.trace import record
from workbench.ui.actions import export as actions

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2
PROMPTS, SEEDS = ("fluent pizza", "noto grinning face", "twemoji red heart"), (0, 1, 2)
ACT_CYCLE = (4, 8, 16, 3, 6)


def _plan(bundle, quant):
    """Every width and every activation width somewhere, float layers included."""
    schedule = bundle.integrator(STEPS)
    rows = [[ACT_CYCLE[(step + layer.index) % 5] for layer in bundle.layers] for step in range(STEPS)]
    widths = [WEIGHT_BITS[layer.index % 6] for layer in bundle.layers]
    return make_plan(layers=bundle.layers, sigma_T=schedule.sigma_T1[:-1].tolist(), act_bits_TL=rows, quant=quant,
                     weight_choice_L=[BitChoice.of(bits, quant, layer) for bits, layer in zip(widths, bundle.layers)],
                     costs=costs.tabulate(bundle, quant), model_hash=bundle.model_hash)


@pytest.fixture(scope="module")
def quantized(bundle):
    quant = QuantConfig(solver="nearest", group_size=None)
    recorded = record(bundle, TraceConfig(prompts=PROMPTS[:1], steps=STEPS))
    return quantize.quantize(bundle, Calibration(trace=recorded), _plan(bundle, quant))


@pytest.fixture(scope="module")
def exported(bundle, quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "checkpoint"
    manifest = export.write(bundle, quantized, folder, profile_summary={"PSNR": "30 dB"})
    return folder, manifest


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported[0], tmp_path / "copy")


def test_reopened_images_are_bit_identical(bundle, quantized, exported):
    schedule = bundle.integrator(STEPS)
    before = generate.run(bundle, PROMPTS, SEEDS, schedule, quantized=quantized)
    reopened, again = export.load_quantized(exported[0])
    after = generate.run(reopened, PROMPTS, SEEDS, reopened.integrator(STEPS), quantized=again)
    assert torch.equal(before.latent_ST, after.latent_ST)
    assert np.array_equal(before.images, after.images)
    as_float = generate.run(bundle, PROMPTS, SEEDS, schedule)
    assert not torch.equal(as_float.latent_ST, before.latent_ST), "the plan changes nothing, so the test shows nothing"
    assert (again.plan, again.weight_bytes, reopened.model_hash) == (quantized.plan, quantized.weight_bytes, bundle.model_hash)
    assert (reopened.float_bytes, reopened.name) == (bundle.float_bytes, bundle.name)


def test_what_is_said_of_opening_a_checkpoint_is_true(exported):
    """Its card, the Export screen and the README name what opens it; diffusers, which does not, is nowhere said to."""
    import diffusers

    with pytest.raises((OSError, ValueError, RuntimeError)):
        diffusers.DiffusionPipeline.from_pretrained(str(exported[0]), local_files_only=True, use_safetensors=True)
    card = (exported[0] / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "adatsq-workbench"
    for text in (card, actions.REOPENS):
        assert "load_quantized" in text and "adatsq generate" in text
    for path in (ROOT / "README.md", *(ROOT / "workbench").rglob("*.py")):
        assert not re.search(r"(load|open|run)s? (it )?(in|with|by) (plain )?diffusers", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("open_it", [
    lambda folder, device: workbench.load_quantized(folder, device),
    lambda folder, device: workbench.load_quantized(folder, device=device),
    lambda folder, device: cli.main(["generate", str(folder), "--device", device, "--to", "unused", "--steps", "1"]),
])
def test_an_export_is_opened_on_the_device_that_is_asked_for(exported, tmp_path, monkeypatch, open_it):
    class Opened(BadInput):
        pass

    def stop(folder, manifest, forms, tensors, device):
        found.append(str(device))
        raise Opened("enough is known")

    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where auto is another device than the one asked for
    monkeypatch.setattr(export, "_open_bundle", stop)
    with contextlib.suppress(Opened):
        open_it(exported[0], "cpu")
    assert found == ["cpu"]


def test_stored_tensors_are_the_stated_bytes_to_the_byte(quantized, exported):
    total = 0
    for path in (exported[0] / "transformer").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]
            total += sum(t.numel() * t.element_size() for t in tensors)
    assert total == quantized.weight_bytes == exported[1].weight_bytes


def test_no_file_is_too_large_and_the_manifest_lists_all(exported):
    folder, manifest = exported
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert set(files) == set(manifest.files) | {"manifest.json"}
    assert max(p.stat().st_size for p in files.values()) <= export.MAX_SHARD_BYTES
    assert manifest.disk_bytes == sum(p.stat().st_size for p in files.values())
    assert {p.suffix for p in files.values()} <= {".json", ".txt", ".safetensors", ".md", ".model", ""}
    assert "PSNR: 30 dB" in files["README.md"].read_text()


def test_small_shards_reopen_too(bundle, quantized, exported, tmp_path):
    limit = 1_000_000
    export.write(bundle, quantized, tmp_path / "small", max_shard_bytes=limit)
    shards = sorted((tmp_path / "small" / "transformer").glob("*.safetensors"))
    assert len(shards) > len(list((exported[0] / "transformer").glob("*.safetensors")))
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert shard.stat().st_size <= limit or len(list(file.keys())) == 1
    reopened, again = export.load_quantized(tmp_path / "small")
    expected = export.stored_tensors(bundle, quantized)
    found = export.stored_tensors(reopened, again)
    packed = {name: t for name, t in found.items() if name in expected}
    assert set(expected) == set(packed) and all(torch.equal(expected[n], packed[n]) for n in expected)


def test_a_reopened_checkpoint_refuses_to_pose_as_float(exported):
    reopened, _ = export.load_quantized(exported[0])
    with pytest.raises(BadInput, match="no float weights"):
        generate.run(reopened, PROMPTS[:1], [0], reopened.integrator(STEPS))


def test_writing_leaves_every_module_in_place(bundle, quantized, tmp_path):
    before = dict(bundle.transformer.named_modules())
    export.write(bundle, quantized, tmp_path / "x")
    assert dict(bundle.transformer.named_modules()) == before


def test_an_earlier_export_is_replaced_and_anything_else_is_left(bundle, quantized, copy, tmp_path):
    (copy / "extra.txt").write_text("of the earlier export")
    export.write(bundle, quantized, copy)
    assert not (copy / "extra.txt").exists() and export.is_export(copy)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    export.check_target(foreign)
    (foreign / "a.png").write_bytes(b"x")
    for target in (foreign, foreign / "a.png"):
        with pytest.raises(BadInput):
            export.write(bundle, quantized, target)
    assert [p.name for p in foreign.iterdir()] == ["a.png"]


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_cancelled_or_failed_export_leaves_no_trace(bundle, quantized, tmp_path, stop_at):
    def stop(progress):
        if progress.done == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        export.write(bundle, quantized, tmp_path / "x", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage, message", [
    (lambda f: _flip(next((f / "transformer").glob("*.safetensors"))), "missing or damaged"),
    (lambda f: (f / "vae" / "config.json").unlink(), "missing or damaged"),
    (lambda f: (f / "plan.json").write_text("{}"), "missing or damaged"),
    (lambda f: (f / "manifest.json").unlink(), "not an exported checkpoint"),
    (lambda f: (f / "manifest.json").write_text('{"format": "adatsq-'), "not an exported checkpoint"),
    (lambda f: shutil.rmtree(f), "not an exported checkpoint"),
])
def test_damage_is_refused_with_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(BadInput, match=message) as error:
        export.load_quantized(copy)
    assert "\n" not in str(error.value)


def test_a_manifest_may_not_point_outside(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy.parent / "secret").write_text("x")
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="outside the folder"):
        export.load_quantized(copy)


@pytest.mark.parametrize("change, message", [
    ({"model": "../../other"}, "which is a path"),
    ({"model": "/no-such-folder/x"}, "which is a path"),
    ({"files": None}, "is incomplete"),
    ({"files": {"plan.json": 3}}, "is incomplete"),
    ({"weight_bytes": "many"}, "is incomplete"),
])
def test_a_manifest_of_another_form_is_refused_with_one_line(copy, change, message):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(BadInput, match=message) as error:
        export.load_quantized(copy)
    assert "\n" not in str(error.value)


def _rewrite(folder, name, change):
    """Change a JSON file and the manifest with it."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": export._sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name, change, message", [
    ("transformer/layers.json", lambda c: c.update({"no.such.layer": next(iter(c.values()))}), "no linear layer"),
    ("transformer/layers.json", lambda c: c.update({"": next(iter(c.values()))}), "no linear layer"),
    ("model_index.json", lambda c: c.update({"../vae": ["diffusers", "AutoencoderKL"]}), "no plain file or folder name"),
    ("model_index.json", lambda c: c.update({"transformer": ["diffusers", "FluxPipeline"]}), "no transformer of diffusers"),
    ("model_index.json", lambda c: c.update({"transformer": ["diffusers"]}), "no transformer of diffusers"),
    ("model_index.json", lambda c: c.pop("transformer"), "no transformer of diffusers"),
])
def test_names_in_an_export_are_those_of_its_model(copy, name, change, message):
    _rewrite(copy, name, change)
    with pytest.raises(BadInput, match=message) as error:
        export.load_quantized(copy)
    assert "\n" not in str(error.value)
