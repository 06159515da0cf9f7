"""LPIPS (Zhang et al. 2018, arXiv 1801.03924, version 0.1 on AlexNet), where its weights are present.

Letters: C channels, H height, W width.

The distance of two images is the squared difference of their unit-normalised features after each of five convolutions, weighted by
a learned head per channel, averaged over places and summed over layers. The weights are not part of this project and are published
as pickles, which are never opened: put them into one safetensors file, the convolutions as `features.{0,3,6,8,10}.weight` and
`.bias`, the heads as `lin{0..4}.weight`, and name it in the environment variable ADATSQ_LPIPS. Without it the metric is left out.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.options import BadInput

VARIABLE = "ADATSQ_LPIPS"
LEAST_PX = 64  # smaller images leave nothing for the last layer
# (index in AlexNet, stride, padding, is there a max-pool before it)
LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def path() -> Path | None:
    """The weights' file, if one is named and there."""
    named = os.environ.get(VARIABLE, "")
    return Path(named) if named and Path(named).is_file() else None


def distance(image, reference) -> float | None:
    """LPIPS of two uint8 images (H, W, 3), 0 for equal ones; None without weights or for images under 64 pixels."""
    found = path()
    if found is None or min(np.shape(image)[:2]) < LEAST_PX:
        return None
    weights = _weights(str(found), found.stat().st_mtime_ns)
    return distance_of(_as_input(image), _as_input(reference), weights)


@torch.no_grad()
def distance_of(first_1CHW: Tensor, second_1CHW: Tensor, weights: dict[str, Tensor]) -> float:
    """The formula, on images in [-1, 1]."""
    total = 0.0
    for number, (a, b) in enumerate(zip(_features(first_1CHW, weights), _features(second_1CHW, weights))):
        head_C = weights[f"lin{number}.weight"].flatten()
        total += float((head_C[:, None, None] * (a - b).square()[0]).sum(0).mean())
    return total


def _features(image_1CHW: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """Unit-normalised features after each convolution."""
    x = (image_1CHW - torch.tensor(_SHIFT).view(1, 3, 1, 1)) / torch.tensor(_SCALE).view(1, 3, 1, 1)
    found = []
    for index, stride, padding, pooled in LAYERS:
        x = F.max_pool2d(x, 3, 2) if pooled else x
        x = F.relu(F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], stride, padding))
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


def _as_input(image) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


@functools.lru_cache(maxsize=1)
def _weights(file: str, _changed_ns: int) -> dict[str, Tensor]:
    try:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{VARIABLE}: {file} is no safetensors file ({error})") from None
    wanted = {f"features.{index}.{part}" for index, *_ in LAYERS for part in ("weight", "bias")} | {f"lin{i}.weight" for i in range(5)}
    if missing := sorted(wanted - set(weights)):
        raise BadInput(f"{VARIABLE}: {file} lacks {missing[0]}; it must hold AlexNet's five convolutions and the five heads")
    return weights
