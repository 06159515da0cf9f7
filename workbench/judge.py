"""What does an image show? A nearest-image judge that ships with an embedded model, in `assets/judges`.

Dimension letters: S samples, I source images, F numbers of a shrunken image, K features.

The file holds the feature space of the model's own evaluation (`assets/build/evaluate.py`: three opponent-colour planes of 32 x 32,
centred, projected on half-whitened principal components, cosine similarity), the features of every image the model was trained or
evaluated on, and their captions. An image is retrieved if the nearest source shows what its prompt asked for, in any style.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from workbench.options import BadInput
from workbench.resources import resource_folder

FOLDER = resource_folder("assets") / "judges"
FORMAT = "nearest-image-judge-1"
FEATURE_PX = 32


@dataclass(frozen=True, kw_only=True)
class Judge:
    """mean_F, basis_FK and the unit features source_IK, float32; what each source shows, and which caption asks for what."""

    mean_F: np.ndarray
    basis_FK: np.ndarray
    source_IK: np.ndarray
    shown_I: tuple[str, ...]
    asked: dict[str, str]

    def hits(self, images, prompts) -> list[bool | None]:
        """Does each uint8 image (S, H, W, 3) show what its prompt asks for? None where the prompt is no caption of the sources."""
        nearest_S = (project(np.asarray(images), self.mean_F, self.basis_FK) @ self.source_IK.T).argmax(1)
        return [None if prompt not in self.asked else self.shown_I[nearest] == self.asked[prompt]
                for prompt, nearest in zip(prompts, nearest_S, strict=True)]


def planes(images: np.ndarray) -> np.ndarray:
    """uint8 (S, H, W, 3), H and W multiples of 32, to float32 (S, F): shrunken luminance and two opponent colours."""
    count, height, width, _ = images.shape
    blocks = images.reshape(count, FEATURE_PX, height // FEATURE_PX, FEATURE_PX, width // FEATURE_PX, 3)
    red, green, blue = np.moveaxis(blocks.mean((2, 4)) / 255, -1, 0)
    stacked = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], axis=1)
    return stacked.reshape(count, -1).astype(np.float32)


def project(images: np.ndarray, mean_F: np.ndarray, basis_FK: np.ndarray) -> np.ndarray:
    """Unit features (S, K)."""
    features_SK = (planes(images) - mean_F) @ basis_FK
    return features_SK / np.linalg.norm(features_SK, axis=1, keepdims=True).clip(1e-12)


@functools.lru_cache(maxsize=4)
def read(path: Path) -> Judge:
    """The judge in a file; BadInput if it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            notes = json.loads((file.metadata() or {})["judge"])
            parts = {name: file.get_tensor(name).astype(np.float32) for name in ("mean_F", "basis_FK", "source_IK")}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BadInput(f"{path.name} cannot be read ({error}); build it again with assets/build/judge.py") from None
    if notes.get("format") != FORMAT or len(notes["shown"]) != len(parts["source_IK"]):
        raise BadInput(f"{path.name} is of another format; build it again with assets/build/judge.py")
    return Judge(**parts, shown_I=tuple(notes["shown"]), asked=dict(notes["asked"]))


def of(bundle) -> Judge | None:
    """The judge of a loaded model, or None where it has none."""
    path = FOLDER / f"{bundle.name}.safetensors"
    return read(path) if path.exists() else None
