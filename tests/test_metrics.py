"""Metrics against independent formulas and theorems."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from workbench import metrics


def _image(seed, shape=(33, 47, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_agrees_with_torchmetrics():
    first, second = _image(0), _image(1)
    expected = peak_signal_noise_ratio(torch.from_numpy(first).double(), torch.from_numpy(second).double(), data_range=255.0)
    assert metrics.psnr_db(first, second) == pytest.approx(float(expected), rel=1e-6)  # theirs ends in float32


def test_psnr_does_not_wrap_around_unsigned_differences():
    dark, bright = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert metrics.psnr_db(dark, bright) == pytest.approx(0.0)
    assert metrics.psnr_db(dark, bright) == metrics.psnr_db(bright, dark)


def test_only_identical_images_reach_the_psnr_ceiling():
    image = _image(2)
    nearly = image.copy()
    nearly[0, 0, 0] ^= 1
    assert metrics.psnr_db(image, image) == metrics.PSNR_CEILING_DB
    assert metrics.psnr_db(nearly, image) == pytest.approx(10 * math.log10(255**2 * image.size))


def test_ssim_is_one_for_the_same_image_and_falls_with_noise():
    image = np.kron(_image(3, (8, 8, 3)), np.ones((8, 8, 1), np.uint8))
    noise = np.random.default_rng(0).normal(0, 1, image.shape)
    weak, strong = (np.clip(image + scale * noise, 0, 255).astype(np.uint8) for scale in (5, 60))
    assert metrics.ssim(image, image) == pytest.approx(1.0, abs=1e-9)
    assert 1 > metrics.ssim(weak, image) > metrics.ssim(strong, image)


def test_images_of_other_sizes_or_types_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.psnr_db(_image(0), _image(0, (32, 47, 3)))
    with pytest.raises(ValueError, match="uint8"):
        metrics.ssim(_image(0).astype(np.float32), _image(0))


def test_latent_nmse_is_relative_to_the_reference():
    reference = torch.tensor([[3.0, -4.0]])
    assert metrics.latent_nmse(reference * 1.1, reference) == pytest.approx(0.01, rel=1e-5)
    assert metrics.latent_nmse(reference, reference * 2) == pytest.approx(0.25)


def test_interval_has_the_coverage_it_claims():
    rng = np.random.default_rng(0)
    trials = 2000
    covered = 0
    for _ in range(trials):
        found = metrics.interval(rng.normal(7.0, 3.0, size=5))
        covered += found.low <= 7.0 <= found.high
    # Binomial: standard error of the coverage is 0.5 points, so four of them either side.
    assert covered / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


def test_interval_of_one_value_is_unbounded():
    found = metrics.interval([4.0], unit="dB")
    assert (found.mean, found.low, found.high, found.n, found.unit) == (4.0, -math.inf, math.inf, 1, "dB")
    with pytest.raises(ValueError):
        metrics.interval([])


def test_an_interval_stays_among_the_values_that_a_metric_can_take():
    """A squared error is never below 0, nor a similarity above 1; cutting the interval there leaves its coverage."""
    error = metrics.interval_of("latent_nmse", [0.001, 0.001, 0.001, 0.02])
    assert error.low == 0.0 < error.mean < error.high and not error.higher_is_better
    likeness = metrics.interval_of("ssim", [1.0, 1.0, 0.9])
    assert likeness.high == 1.0 and likeness.low < likeness.mean
    assert metrics.interval_of("psnr_db", [30.0, 32.0]) == metrics.interval([30.0, 32.0], unit="dB")
    assert metrics.interval_of("latent_nmse", [0.5]).low == -math.inf  # one value: unbounded, as everywhere


def test_pairing_removes_the_spread_between_prompts():
    prompts = np.array([20.0, 30.0, 40.0, 50.0])
    gain = np.array([1.0, 1.1, 0.9, 1.0])
    difference = metrics.paired(prompts + gain, prompts)
    assert difference.mean == pytest.approx(1.0)
    assert 0 < difference.low < difference.high < 2
    unpaired = metrics.interval(prompts)
    assert unpaired.high - unpaired.low > 20 * (difference.high - difference.low)
    with pytest.raises(ValueError, match="paired"):
        metrics.paired([1.0, 2.0], [1.0])


def test_vif_is_one_for_the_same_image_less_with_noise_and_undefined_for_tiny_ones():
    image = np.kron(_image(3, (8, 8, 3)), np.ones((8, 8, 1), np.uint8))
    noise = np.random.default_rng(0).normal(0, 1, image.shape)
    weak, strong = (np.clip(image + scale * noise, 0, 255).astype(np.uint8) for scale in (5, 60))
    assert metrics.vif(image, image) == pytest.approx(1.0, abs=1e-3)
    assert 1 > metrics.vif(weak, image) > metrics.vif(strong, image) > 0
    assert metrics.vif(_image(0, (40, 60, 3)), _image(1, (40, 60, 3))) is None
    with pytest.raises(ValueError, match="uint8"):
        metrics.vif(image / 255, image)


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (63, 64), (1, 1), (5, 11)])
def test_proportions_have_the_wilson_interval(hits, n):
    from scipy.stats import binomtest

    found = metrics.proportion([True] * hits + [False] * (n - hits))
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert (found.mean, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    with pytest.raises(ValueError):
        metrics.proportion([])
