"""What is refused before anything is loaded, and what a model is called."""

import json

import pytest

from workbench.models import sources
from workbench.options import BadInput, ModelSpec


@pytest.mark.parametrize(("make", "words"), [
    (lambda d: "no-such-model", "unknown model"),
    (lambda d: str(d), "no diffusers pipeline"),
    (lambda d: str(_write(d / "weights.ckpt", "x")), "pickle"),
    (lambda d: str(_write(d / "model_index.json", json.dumps({"_class_name": "MochiPipeline"})).parent), "supported are FluxPipeline"),
    (lambda d: str(_write(d / "model_index.json", json.dumps({"_class_name": "FluxFillPipeline"})).parent), "needs an image and a mask"),
    (lambda d: str(_write(d / "model_index.json", "{").parent), "cannot be read"),
    (lambda d: str(_write(d / "transformer" / "diffusion_pytorch_model.bin", "x").parents[1]), "pickle"),
    (lambda d: str(_write(d / "model_index.json", json.dumps({"_class_name": "FluxPipeline"})).parent), "names no scheduler"),
])
def test_bad_models_are_refused_in_one_line(tmp_path, make, words):
    with pytest.raises(BadInput, match=words) as error:
        sources.load(ModelSpec(source=make(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_model_from_the_hub_has_its_own_name_not_that_of_its_snapshot(tmp_path, monkeypatch):
    snapshot = tmp_path / "0123456789abcdef0123456789abcdef01234567"
    snapshot.symlink_to(sources.EMBEDDED["emoji-flux"])
    monkeypatch.setattr(sources, "_download", lambda source: snapshot)
    loaded = sources.load(ModelSpec(source="maker/model"))
    assert (loaded.name, loaded.source) == ("model", "maker/model")
    with pytest.raises(BadInput, match=r"^model is no diffusers pipeline"):
        monkeypatch.setattr(sources, "_download", lambda source: tmp_path)
        sources.load(ModelSpec(source="maker/model"))


def _write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
