"""A checkpoint folder: what is reopened draws the same images, bit for bit; what is damaged or foreign is refused."""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import workbench
from workbench import cli, costs, export, generate
from workbench import exported as exported_module
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

    def stop(folder, manifest, generation, layer_formats, tensors, device):
        found.append(str(device))
        raise Opened("enough is known")

    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where auto is another device than the one asked for
    monkeypatch.setattr(exported_module, "_open_bundle", stop)
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


def _reseal(folder):
    """Make the manifest agree with the files, as a careful hand would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _edit_json(path, change):
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found)))


def _edit_tensors(folder, name, change):
    """Write the shard that holds a tensor again, with `change` applied to its tensors."""
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        tensors = load_file(path)
        if name in tensors:
            change(tensors)
            save_file(tensors, path)
            return
    raise KeyError(name)


def _first(found):
    return next(iter(found))


def _with(found, name, **values):
    return {**found, name: {**found[name], **values}}


@pytest.mark.parametrize(("file", "change", "words"), [
    ("manifest.json", lambda m: [m], "not an exported checkpoint"),
    ("manifest.json", lambda m: {**m, "files": list(m["files"])}, "files"),
    ("manifest.json", lambda m: {**m, "files": {name: None for name in m["files"]}}, "files"),
    ("manifest.json", lambda m: {**m, "files": {name: {**entry, "bytes": "x"} for name, entry in m["files"].items()}}, "bytes"),
    ("manifest.json", lambda m: {key: value for key, value in m.items() if key != "weight_bytes"}, "weight_bytes"),
    ("manifest.json", lambda m: {**m, "weight_bytes": None}, "weight_bytes"),
    ("manifest.json", lambda m: {**m, "model_hash": "0" * 16}, "of another model"),
    ("plan.json", lambda p: [p], "plan.json"),
    ("plan.json", lambda p: {**p, "layer_names": [f"x{n}" for n in range(len(p["layer_names"]))]}, "names other layers"),
    ("plan.json", lambda p: {**p, "weight_choice_L": [{**c, "weight_bits": 16} for c in p["weight_choice_L"]]}, "disagree"),
    ("transformer/layers.json", lambda f: [f], "layers.json is a list"),
    ("transformer/layers.json", lambda f: {**f, _first(f): 5}, "layers.json: "),
    ("transformer/layers.json", lambda f: {**f, "no.such": f[_first(f)]}, "no.such is no"),
    ("transformer/layers.json", lambda f: {**f, "x_embedder": {**f[_first(f)], "k_in": 64}}, "x_embedder"),
    ("transformer/layers.json", lambda f: _with(f, _first(f), n_out=64), "linear of the transformer"),
    ("transformer/layers.json", lambda f: {**f, "": f[_first(f)]}, "linear of the transformer"),
    ("transformer/layers.json", lambda f: _with(f, _first(f), input_group="elsewhere", transform="smooth"), "stored layer has"),
    ("transformer/config.json", lambda c: {**c, "num_layers": "2"}, "num_layers"),
    ("transformer/config.json", lambda c: {**c, "num_layers": 10**9}, "describes more than"),
    ("manifest.json", lambda m: {**m, "model": "../../other"}, "which is a path"),
    ("manifest.json", lambda m: {**m, "model": "/no-such-folder/x"}, "which is a path"),
    ("model_index.json", lambda i: {**i, "../vae": ["diffusers", "AutoencoderKL"]}, "no plain file or folder name"),
    ("model_index.json", lambda i: {**i, "transformer": ["diffusers"]}, "[library, class] is needed"),
    ("model_index.json", lambda i: {key: value for key, value in i.items() if key != "transformer"}, "names no transformer"),
    ("model_index.json", lambda i: {**i, "transformer": ["antigravity", "fly"]}, "comes from antigravity"),
    ("model_index.json", lambda i: {**i, "transformer": ["diffusers", "AutoencoderKL"]}, "FluxTransformer2DModel"),
    ("vae/config.json", lambda c: {**c, "latent_channels": [16]}, "latent_channels"),
])
def test_a_malformed_file_of_a_checkpoint_is_named_even_under_a_matching_manifest(copy, file, change, words):
    _edit_json(copy / file, change)
    if file != "manifest.json":
        _reseal(copy)
    with pytest.raises(BadInput) as error:
        export.load_quantized(copy)
    assert words in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("x_embedder.bias"), "x_embedder.bias is missing"),
    (lambda t: t.update({"x_embedder.bias": torch.zeros(3)}), "x_embedder.bias is torch.float32 (3,), not (256,)"),
    (lambda t: t["x_embedder.bias"][0].fill_(torch.nan), "x_embedder.bias is not finite"),
    (lambda t: t.update({"x_embedder.bias": t["x_embedder.bias"].to(torch.int32)}), "x_embedder.bias is torch.int32"),
    (lambda t: t.update({"foreign.weight": torch.zeros(3)}), "foreign.weight is not of the model"),
])
def test_tensors_of_a_checkpoint_are_exactly_those_of_the_model(copy, change, words):
    _edit_tensors(copy, "x_embedder.bias", change)
    _reseal(copy)
    with pytest.raises(BadInput) as error:
        export.load_quantized(copy)
    assert words in str(error.value)


def test_a_checkpoint_of_links_reopens_as_a_snapshot_from_the_hub(exported, tmp_path):
    for path in exported[0].rglob("*"):
        to = tmp_path / "snapshot" / path.relative_to(exported[0])
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            to.symlink_to(path)
    reopened, again = export.load_quantized(tmp_path / "snapshot")
    assert reopened.name == "emoji-flux" and again.weight_bytes == exported[1].weight_bytes
