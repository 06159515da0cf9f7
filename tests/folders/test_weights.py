"""Weights of a model folder: names, shapes, types, values and files are checked; save_pretrained's own pass."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file

from tests.folders.tiny import INDEX, WEIGHTS, edit_tensors, load, put, refusal, tiny_pipeline
from workbench import model_info, modelfiles
from workbench.models import checks


@pytest.mark.parametrize("which", ["tiny", "sharded"])
def test_what_save_pretrained_writes_passes_with_its_own_weights(which, request):
    folder = request.getfixturevalue(which)
    loaded = load(folder)
    expected = tiny_pipeline()
    for part in WEIGHTS:
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(tensor, getattr(loaded.pipeline, part).state_dict()[name]), f"{part}: {name}"


def test_a_snapshot_of_links_passes(model):
    assert all(path.is_symlink() for path in model.rglob("*.safetensors"))
    assert load(model).parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_and_tied_or_older_names_pass(model, dtype):
    def older(tensors):
        prefix = {f"text_model.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
        tensors.clear()
        tensors |= prefix | {"text_model.embeddings.position_ids": torch.arange(16)[None]}

    def tied(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()

    edit_tensors(model / WEIGHTS["text_encoder"], older)
    edit_tensors(model / WEIGHTS["text_encoder_2"], tied)
    edit_tensors(model / WEIGHTS["transformer"], lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))
    assert load(model).parameters


def test_a_variant_beside_the_plain_file_is_not_looked_at(model):
    put(model / "transformer/diffusion_pytorch_model.fp16.safetensors", b"not even a header")
    assert load(model).parameters and not model_info.of(str(model)).refused


TENSORS = {"transformer": "single_transformer_blocks.0.proj_mlp.weight", "vae": "decoder.conv_in.bias",
           "text_encoder": "encoder.layers.1.mlp.fc1.weight", "text_encoder_2": "encoder.block.1.layer.0.SelfAttention.k.weight"}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(("change", "words"), [
    (lambda t, name: t.pop(name), "lacks {name}"),
    (lambda t, name: t.update({"other.weight": torch.zeros(2)}), "holds other.weight"),
    (lambda t, name: t.update({name: torch.zeros(3, 5)}), "{name} is (3, 5), config.json describes {shape}"),
    (lambda t, name: t[name].view(-1)[-1].fill_(torch.nan), "{name} holds NaN or infinity"),
    (lambda t, name: t.update({name: (t[name] - torch.inf).to(torch.float16)}), "{name} holds NaN or infinity"),
    (lambda t, name: t.update({name: t[name].to(torch.int8)}), "{name} is stored as I8"),
    (lambda t, name: t.update({name: t[name].to(torch.int32)}), "{name} is stored as I32"),
    (lambda t, name: t.update({name: t[name].to(torch.float8_e4m3fn)}), "{name} is stored as F8_E4M3"),
])
def test_a_tensor_that_is_missing_foreign_misshapen_or_no_number_is_named(model, part, change, words):
    name = TENSORS[part]
    shape = tuple(load_file(model / WEIGHTS[part])[name].shape)
    edit_tensors(model / WEIGHTS[part], lambda tensors: change(tensors, name))
    line = refusal(model)
    assert words.format(name=name, shape=shape) in line and WEIGHTS[part] in line


@pytest.mark.parametrize(("names", "form"), [
    (["x_embedder.scale_weight"], "scaled FP8"), (["scaled_fp8"], "scaled FP8"), (["x_embedder.comfy_quant"], "scaled FP8"),
    (["x_embedder.weight_scale", "x_embedder.input_scale"], "scaled FP8"),
    (["x_embedder.weight.absmax", "x_embedder.weight.quant_map"], "bitsandbytes"),
    (["x_embedder.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"), (["x_embedder.SCB"], "bitsandbytes"),
    (["x_embedder.weight._data", "x_embedder.weight._scale"], "quanto"), (["x_embedder.qweight", "x_embedder.wscales"], "nunchaku"),
    (["x_embedder.qweight", "x_embedder.qzeros"], "GPTQ"), (["x_embedder._weight_qdata"], "torchao"),
])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_quantized_weights_are_named_before_anything_is_built(model, names, form, prefix):
    edit_tensors(model / WEIGHTS["transformer"], lambda t: t.update({prefix + name: torch.ones(1) for name in names}))
    line = refusal(model)
    assert form in line and "give the float model" in line and any(name in line for name in names)
    assert model_info.of(str(model)).note.endswith(line.partition(": ")[2]) and model_info.of(str(model)).refused


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv.weight", "single_blocks.3.linear1.weight",
                                  "model.diffusion_model.img_in.weight"])
def test_original_names_are_told_apart_from_missing_ones(model, name):
    def original(tensors):
        tensors.clear()
        tensors[name] = torch.zeros(2, 2)

    edit_tensors(model / WEIGHTS["transformer"], original)
    assert name in refusal(model) and "layout of diffusers" in refusal(model)
    os.rename(model / WEIGHTS["transformer"], model / "transformer/flux1-dev.safetensors")
    assert "layout of diffusers" in refusal(model)


def test_shards_that_are_missing_elsewhere_cut_or_twice_are_named(shards):
    index = json.loads((shards / INDEX).read_bytes())
    files = list(index["weight_map"].values())
    names = sorted(set(files), key=files.count, reverse=True)  # the first holds several tensors
    assert len(names) > 2 and files.count(names[0]) > 1
    first, second = (shards / "transformer" / name for name in names[:2])
    whole, moved = first.read_bytes(), next(name for name, file in index["weight_map"].items() if file == names[0])

    put(first, whole[:-4])
    assert f"{names[0]} is cut short or damaged" in refusal(shards)
    put(first, whole + b"1234")
    assert "4 bytes are of no tensor" in refusal(shards)
    first.unlink()
    assert f"{names[0]} is missing" in refusal(shards)

    for name in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "a.bin", "a\0.safetensors", ".."):
        put(shards / INDEX, {**index, "weight_map": {**index["weight_map"], moved: name}})
        said = refusal(shards)
        assert "only safetensors files beside it are read" in said or "no plain file or folder name" in said
    put(first, whole)
    put(shards / INDEX, {**index, "weight_map": {**index["weight_map"], moved: names[1]}})
    assert f"{names[1]} does not hold {moved}" in refusal(shards)
    put(shards / INDEX, {**index, "weight_map": {name: file for name, file in index["weight_map"].items() if name != moved}})
    assert f"holds {moved}, which {INDEX} does not name" in refusal(shards)
    for wrong in ([], {}, {"a": 5}, {"a": ["b"]}, "x", None):
        put(shards / INDEX, {**index, "weight_map": wrong})
        assert "has no weight_map" in refusal(shards)

    put(shards / INDEX, index)
    edit_tensors(first, lambda t: t.pop(moved))
    assert f"does not hold {moved}" in refusal(shards)
    put(first, whole)
    edit_tensors(second, lambda t: t.update({moved: torch.zeros(1)}))
    assert f"{moved} is stored twice" in refusal(shards)


def test_shards_of_a_text_encoder_without_its_metadata_are_refused_in_one_line(shards):
    path = shards / "text_encoder_2/model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    put(path, {"weight_map": index["weight_map"]})
    assert "text_encoder_2" in refusal(shards)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_header_that_lies_is_refused_before_it_is_believed(model, part):
    path = model / WEIGHTS[part]
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8:8 + length])
    name = next(name for name in header if name != "__metadata__")
    for start in (b"", b"\0" * 7, struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", len(whole)) + whole[8:], struct.pack("<Q", 0),
                  struct.pack("<Q", 2) + b"[]", struct.pack("<Q", length) + b"[" * (len(whole) - 8)):
        put(path, start)
        assert WEIGHTS[part] in refusal(model)
    entry = header[name]
    start, end = entry["data_offsets"]
    for wrong in (5, None, {}, {**entry, "shape": [2**70]}, {**entry, "shape": [-1]}, {**entry, "shape": "88"}, {**entry, "dtype": "F5"},
                  {**entry, "dtype": []}, {**entry, "data_offsets": [end, start]}, {**entry, "data_offsets": [start + 4, end + 4]},
                  {**entry, "data_offsets": [start]}, {**entry, "shape": [2] * 100_000}):
        text = json.dumps({**header, name: wrong}).encode()
        put(path, struct.pack("<Q", len(text)) + text + whole[8 + length:])
        assert f"{WEIGHTS[part]} is" in refusal(model) and "damaged" in refusal(model)


@pytest.mark.parametrize(("to", "words"), [
    ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "the variant there (fp16) lacks its index"),
    ("diffusion_pytorch_model-00001-of-00002.bf16.safetensors", "bf16.safetensors is not a name that is read"),
    ("diffusion_pytorch_model.bin", "is a pickle, which is never opened"),
    ("model.gguf", "GGUF file is already quantized"),
    ("model.safetensors", "model.safetensors is not a name that is read"),
    ("notes.txt", "diffusion_pytorch_model.safetensors is missing"),
])
def test_weights_under_another_name_are_told(model, to, words):
    os.rename(model / WEIGHTS["vae"], model / "vae" / to)
    assert words in refusal(model)
    assert words in model_info.of(str(model)).note


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_part_in_half_precision_alone_is_checked_and_loaded_like_any_other(model, tiny, part):
    path = model / WEIGHTS[part]
    half = path.with_name(f"{path.name.partition('.')[0]}.fp16.safetensors")
    os.rename(path, half)
    for plain, read in zip(*(load(folder).pipeline.components[part].parameters() for folder in (tiny, model))):
        assert torch.equal(plain, read)
    assert model_info.of(str(model)).all_parameters == model_info.of(str(tiny)).all_parameters
    edit_tensors(half, lambda t: next(iter(t.values())).view(-1)[0].fill_(torch.nan))
    assert "fp16.safetensors" in refusal(model) and "NaN" in refusal(model)


def test_a_model_of_another_device_stays_within_its_type(tiny):
    stored = modelfiles.checkpoint(tiny / "vae", "diffusers")
    checks.check_values(stored, torch.float16)
