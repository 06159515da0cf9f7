"""What is known of a model before it is loaded: from a folder, and from the hub's own answers, which are made up here."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest

from workbench import model_info
from workbench.options import BadInput


def _header(shapes):
    return SimpleNamespace(tensors={name: SimpleNamespace(shape=shape, dtype="BF16") for name, shape in shapes.items()})


FILES = {
    "transformer/a-00001-of-00002.safetensors": {"blocks.0.q.weight": [8, 4], "blocks.0.q.bias": [8]},
    "transformer/a-00002-of-00002.safetensors": {"blocks.1.q.weight": [8, 4], "out.weight": [4, 8]},
    "transformer/a.fp16.safetensors": {"blocks.0.q.weight": [8, 4]},
    "vae/b.safetensors": {"conv.weight": [3, 3, 2, 2]},
    "whole.safetensors": {"everything": [1000, 1000]},
}


class Hub:
    """Answers as the hub's API does."""

    index = True

    def model_info(self, hub_id, *, files_metadata, timeout):
        if hub_id != "maker/model":
            raise OSError("no such model")
        names = [*FILES, "README.md", *(["model_index.json"] if self.index else [])]
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=n, size=100) for n in names])

    def parse_safetensors_file_metadata(self, hub_id, filename, *, revision, timeout):
        return _header(FILES[filename])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, name, *, revision, etag_timeout: str(path))
    return Hub


def test_the_hub_tells_size_layers_and_memory_before_anything_is_downloaded(hub):
    found = model_info.on_hub("maker/model")
    assert (found.family, found.parameters, found.all_parameters) == ("FluxPipeline", 104, 140)
    assert (found.linears, found.blocks, found.disk_bytes) == (3, 2, 300), "copies in half precision and single files are not downloaded"
    assert found.load_bytes == 4 * 140 and found.search_bytes > found.load_bytes


def test_a_hub_that_says_nothing_is_no_error(hub, monkeypatch):
    assert "did not tell its size (OSError)" in model_info.on_hub("maker/other").note
    monkeypatch.setattr(hub, "index", False)
    assert "does not list it as a diffusers pipeline" in model_info.on_hub("maker/model").note


def test_a_hub_model_without_room_is_refused_before_its_download(hub, monkeypatch):
    monkeypatch.setattr(model_info, "free_bytes", lambda: 500)
    with pytest.raises(BadInput, match="maker/model needs about"):
        model_info.require_room(model_info.on_hub("maker/model"))


def test_a_folder_tells_the_same_as_its_files():
    found = model_info.of("emoji-flux")
    assert found.kind == "embedded" and found.parameters and found.linears and found.disk_bytes > 0
