"""A tiny Flux with everything that a comparison asks of a bundle: images and a judge of its own."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.quant.toy import make_flux
from workbench import judge, latency
from workbench.models.media import Media

PROMPTS = ("fluent red heart", "noto grinning face", "twemoji pizza")


def picture(latent):
    """uint8 (S, 128, 128, 3): the latent's 16 x 16 numbers as grey tiles, with a colour for each third of the image."""
    tiles = (latent.reshape(-1, 16, 16).numpy() * 40 + 128).clip(0, 255)
    grey = tiles.repeat(8, 1).repeat(8, 2)
    return Media.of_images(np.stack([grey, np.roll(grey, 40, 1), np.roll(grey, 40, 2)], -1).round().astype(np.uint8))


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """A table of latencies is kept as it was measured first, however busy the machine was: numbers of two comparisons can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_was_busy", lambda *_: False)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Hides the embedded model's fixture of the same name."""
    folder, made = tmp_path_factory.mktemp("judges"), make_flux()
    made.decode = picture
    rng = np.random.default_rng(0)
    source_IK = rng.standard_normal((6, 4)).astype(np.float16)
    notes = {"format": judge.FORMAT, "shown": ["red heart", "grinning face", "pizza"] * 2,
             "asked": {prompt: prompt.partition(" ")[2] for prompt in PROMPTS}}
    save_file({"mean_F": np.zeros(3072, np.float16), "basis_FK": rng.standard_normal((3072, 4)).astype(np.float16),
               "source_IK": source_IK}, folder / f"{made.name}.safetensors", {"judge": json.dumps(notes)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "FOLDER", folder)
        yield made
