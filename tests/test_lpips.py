"""LPIPS on made-up weights: the formula against an independent one, and what happens without weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from workbench import lpips
from workbench.options import BadInput

CHANNELS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))  # of AlexNet's convolutions


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    made = {}
    for number, ((index, *_), (c_in, c_out, size)) in enumerate(zip(lpips.LAYERS, CHANNELS)):
        made[f"features.{index}.weight"] = torch.randn(c_out, c_in, size, size, generator=generator) / (c_in * size * size) ** 0.5
        made[f"features.{index}.bias"] = 0.1 * torch.randn(c_out, generator=generator)
        made[f"lin{number}.weight"] = torch.rand(1, c_out, 1, 1, generator=generator)
    return made


@pytest.fixture
def named(weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "lpips.safetensors")
    monkeypatch.setenv(lpips.VARIABLE, str(tmp_path / "lpips.safetensors"))


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (70, 80, 3), dtype=np.uint8)


def test_without_weights_or_for_tiny_images_there_is_no_distance(monkeypatch, named):
    assert lpips.distance(image(0)[:40], image(1)[:40]) is None
    monkeypatch.setenv(lpips.VARIABLE, "/nowhere")
    assert lpips.distance(image(0), image(1)) is None


def test_it_is_zero_for_equal_images_symmetric_and_grows_with_noise(named):
    noise = np.random.default_rng(5).normal(0, 1, image(0).shape)
    weak, strong = (np.clip(image(0) + size * noise, 0, 255).astype(np.uint8) for size in (4, 60))
    assert lpips.distance(image(0), image(0)) == 0
    assert lpips.distance(image(0), strong) == pytest.approx(lpips.distance(strong, image(0)), rel=1e-6)
    assert 0 < lpips.distance(weak, image(0)) < lpips.distance(strong, image(0))


def test_the_first_layer_is_the_published_formula(weights):
    only_first = {name: t if not name.startswith("lin") or name.startswith("lin0") else t * 0 for name, t in weights.items()}
    first, second = (torch.from_numpy(image(seed)).permute(2, 0, 1)[None].float() / 127.5 - 1 for seed in (0, 1))
    kernel, bias = weights["features.0.weight"].double().flatten(1), weights["features.0.bias"].double()

    def columns(x):
        """Convolution by hand: patches of 11 x 11 every 4 pixels of the scaled image, padded by 2."""
        scaled = (x.double() - torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
        patches = torch.nn.functional.unfold(scaled, 11, padding=2, stride=4)[0]
        out = (kernel @ patches + bias[:, None]).clamp(min=0)
        return out / out.norm(dim=0)

    by_hand = (weights["lin0.weight"].double().flatten()[:, None] * (columns(first) - columns(second)) ** 2).sum(0).mean()
    assert lpips.distance_of(first, second, only_first) == pytest.approx(float(by_hand), rel=1e-4)


def test_a_file_that_is_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(lpips.VARIABLE, str(tmp_path / "x.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(BadInput, match="no safetensors file"):
        lpips.distance(image(0), image(1))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=r"lacks features\.0\.bias"):
        lpips.distance(image(0), image(1))
