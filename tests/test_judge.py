"""The nearest-image judge: the evaluator's feature space, what it retrieves, and what it refuses."""

import importlib
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from workbench import judge
from workbench.models.sources import EMBEDDED
from workbench.options import BadInput


def pictures(count, seed=0, side=128):
    """Smooth random images, so that shrinking keeps what tells them apart."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(side // 8, 1).repeat(side // 8, 2)


@pytest.fixture
def written(tmp_path):
    """A judge of 30 pictures made by the build script's own fit, and those pictures."""
    evaluate = evaluator()
    images, names = pictures(30), [f"thing {i // 2}" for i in range(30)]
    fitted = evaluate.fit_judge(images)
    notes = {"format": judge.FORMAT, "shown": names, "asked": {f"style{i % 2} {name}": name for i, name in enumerate(names)}}
    path = tmp_path / "judge.safetensors"
    save_file({"mean_F": fitted.mean_F.astype(np.float16), "basis_FK": np.ascontiguousarray(fitted.basis_FK, dtype=np.float16),
               "source_IK": fitted.source_IK.astype(np.float16)}, path, {"judge": json.dumps(notes)})
    return path, images


def evaluator():
    """The evaluation script of the embedded model, with its neighbours importable."""
    folder = str(EMBEDDED["emoji-flux"].parents[1] / "build")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path.remove(folder)


def test_the_features_are_the_evaluators_own():
    evaluate, images = evaluator(), pictures(5)
    assert np.array_equal(judge.planes(images), evaluate.planes(images))
    fitted = evaluate.fit_judge(pictures(20, seed=1))
    np.testing.assert_allclose(judge.project(images, fitted.mean_F, fitted.basis_FK),
                               evaluate.project(images, fitted.mean_F, fitted.basis_FK), rtol=1e-6, atol=1e-7)


def test_every_source_is_retrieved_and_another_picture_is_not(written):
    path, images = written
    found = judge.read(path)
    prompts = [caption for caption in found.asked for _ in (0,)]
    noisy = np.clip(images.astype(int) + np.random.default_rng(1).integers(-20, 21, images.shape), 0, 255).astype(np.uint8)
    asked = [f"style{i % 2} thing {i // 2}" for i in range(30)]
    assert found.hits(noisy, asked) == [True] * 30 and set(prompts) == set(asked)
    assert not any(found.hits(np.roll(noisy, 2, 0), asked)), "two further on, every picture shows another thing"


def test_a_prompt_that_is_no_caption_is_not_judged(written):
    path, images = written
    assert judge.read(path).hits(images[:2], ["style0 thing 0", "a horse"]) == [True, None]


def test_a_black_image_is_judged_without_warnings(written):
    path, _ = written
    with np.errstate(all="raise"):
        assert len(judge.read(path).hits(np.zeros((1, 128, 128, 3), np.uint8), ["style0 thing 0"])) == 1


def test_a_damaged_or_foreign_file_is_refused(written, tmp_path):
    path, _ = written
    blob = path.read_bytes()
    broken = tmp_path / "cut.safetensors"
    broken.write_bytes(blob[:-100])
    with pytest.raises(BadInput, match="cannot be read"):
        judge.read(broken)
    other = tmp_path / "other.safetensors"
    save_file({name: np.zeros((2, 2), np.float16) for name in ("mean_F", "basis_FK", "source_IK")}, other,
              {"judge": json.dumps({"format": "something", "shown": ["a", "b"], "asked": {}})})
    with pytest.raises(BadInput, match="another format"):
        judge.read(other)


def test_the_embedded_model_brings_a_judge_that_knows_its_prompts_and_float_images_pass(bundle):
    from workbench import generate

    found = judge.of(bundle)
    for kind in ("calibration", "held_out", "showcase"):
        assert set(bundle.prompts(kind)) <= set(found.asked), kind
    assert (judge.FOLDER / "emoji-flux.safetensors").stat().st_size < 9_500_000, "what a Space takes without large-file storage"
    prompts = bundle.prompts("showcase")[:8]
    made = generate.run(bundle, prompts, range(8), bundle.integrator(8))
    hits = found.hits(made.images, prompts)
    # evaluation.json: the model is retrieved for nearly every trained caption; at chance it would be one in a thousand
    assert sum(hits) >= 6


def test_a_model_without_a_judge_has_none():
    from types import SimpleNamespace

    assert judge.of(SimpleNamespace(name="no such model")) is None
