"""A refusal costs little, and nothing that is damaged ends in a traceback."""

import json
import random
import resource
import struct
from pathlib import Path

import pytest
import torch

from tests.folders.tiny import WEIGHTS, edit_tensors, linked_copy, load, put, refusal, set_values
from workbench import model_info, modelfiles, weightformats
from workbench.models import sources
from workbench.options import BadInput


def test_model_info_says_what_a_load_would_say_and_stops_it(model):
    edit_tensors(model / WEIGHTS["vae"], lambda t: t.update({"decoder.conv_in.weight": torch.zeros(2).to(torch.int8)}))
    found = model_info.of(str(model))
    assert found.note == f"{model}: {refusal(model).partition(': ')[2]}" and found.parameters is None
    with pytest.raises(BadInput, match="stored as I8"):
        model_info.require_room(found)


def test_a_deep_or_huge_folder_is_not_walked(model, monkeypatch):
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("a folder may be the root of a disk"))
    sources.check_folder(model)


def test_refusing_takes_little_memory(model):
    """An absurd configuration and an absurd header: the peak of the process stays where it was."""
    set_values(model / "transformer/config.json", num_single_layers=10**9, joint_attention_dim=10**9)
    refusal(model)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(model)
    put(model / WEIGHTS["vae"], struct.pack("<Q", 7_999_990) + b" " * 7_999_990)
    refusal(model)
    set_values(model / "transformer/config.json", num_single_layers=2, joint_attention_dim=10**9)
    refusal(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


def _corrupt(folder: Path, rng: random.Random) -> str:
    """One random damage to one file of a folder; what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"))
    raw = path.read_bytes()
    kind = rng.choice(["truncate", "flip", "swap"])
    if kind == "swap" and path.suffix == ".json":
        found = json.loads(raw)
        value = rng.choice([None, [], {}, "x", -1, 0, 1e300, 10**9, True, [[1]], {"a": 1}, float("nan"), "../../x", "é\n\u2028"])
        _swap(found, value, rng)
        put(path, found)
        return f"{path}: a value becomes {value!r}"
    if kind == "truncate":
        put(path, raw[:rng.randrange(len(raw))])
        return f"{path}: cut"
    reach = len(raw) if path.suffix == ".json" else 8 + struct.unpack("<Q", raw[:8])[0] if path.suffix == ".safetensors" else len(raw)
    at = rng.randrange(reach)
    put(path, raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1:])
    return f"{path}: byte {at}"


def _swap(found, value, rng: random.Random) -> None:
    """Put `value` in the place of something in a JSON object, at any depth."""
    while True:
        key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        if not isinstance(found[key], dict | list) or not found[key] or rng.random() < 0.3:
            found[key] = value
            return
        found = found[key]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_damaged_it_loads_or_is_refused_in_one_line(sharded, tmp_path, seed):
    rng = random.Random(seed)
    refused = 0
    for number in range(25):
        folder = linked_copy(sharded, tmp_path / f"m{number}")
        done = _corrupt(folder, rng)
        try:
            load(folder)
        except BadInput as error:
            refused += 1
            assert str(error).isprintable() and str(error).startswith(f"m{number}") and len(str(error)) < 400, (done, str(error))
        except BaseException as error:  # also what a Rust library throws
            pytest.fail(f"{done}: {type(error).__name__}: {error}")
    assert refused >= 5


def test_shown_text_of_a_file_is_one_printable_line():
    assert weightformats.shown("a\nb\x1b[31m\u2028") == "a?b?[31m?"
    assert len(modelfiles.shown("x" * 10**6)) == 100


