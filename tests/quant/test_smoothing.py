"""Smoothing vectors against the published formula and an exhaustive search written independently."""

import numpy as np
import torch

from workbench.plans import BitChoice
from workbench.quant import smoothing, transforms
from workbench.quant.activations import fake_quantize
from workbench.quant.grids import dequantize, quantize_nearest


def layer(rows=64, k_in=48, n_out=20, seed=0):
    """Inputs with a few outlier channels, the case that smoothing is for."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(rows, k_in, generator=generator)
    x_MK[:, [3, 17, 40]] *= 30
    return x_MK, torch.randn(n_out, k_in, generator=generator) * 0.1


def test_the_vector_is_the_published_one_up_to_a_common_factor():
    x_MK, w_NK = layer()
    x_K, w_K = x_MK.abs().amax(0), w_NK.abs().amax(0)
    for a in (0.3, 0.5, 0.8):
        ratio_K = smoothing.vector(x_K, w_K, a, 1 - a).double() * w_K.double() ** (1 - a) / x_K.double() ** a
        torch.testing.assert_close(ratio_K, ratio_K.mean().expand(48), rtol=2**-10, atol=0)  # float16 rounds each by 2^-11


def test_at_one_half_both_sides_get_the_same_largest_magnitudes():
    x_MK, w_NK = layer()
    smooth_K = smoothing.vector(x_MK.abs().amax(0), w_NK.abs().amax(0), 0.5, 0.5).double()
    ratio_K = (x_MK.double() / smooth_K).abs().amax(0) / (w_NK.double() * smooth_K).abs().amax(0)
    torch.testing.assert_close(ratio_K, ratio_K[:1].expand(48), rtol=2**-9, atol=0)


def test_dead_channels_and_columns_are_left_alone():
    x_K, w_K = torch.tensor([0.0, 1.0, 4.0, 1e9]), torch.tensor([1.0, 0.0, 1.0, 1e-9])
    smooth_K = smoothing.vector(x_K, w_K, 0.5, 0.5)
    assert smooth_K[0] == smooth_K[1] == 1 and bool(torch.isfinite(smooth_K).all()) and bool((smooth_K > 0).all())


def brute_force(x_MK, w_NK, bits):
    """Every point of the grid and no smoothing, in numpy and float64 from the definitions: (errors, the best point's vector)."""
    x, w = x_MK.double().numpy(), w_NK.double().numpy()
    top = 2 ** (bits - 1) - 1

    def rounded(m, stored=False):
        scale = np.abs(m).max(1, keepdims=True) / top
        scale = scale.astype(np.float16).astype(np.float64) if stored else scale
        return np.clip(np.round(m / scale), -(top + stored), top) * scale

    vectors = [np.ones(x.shape[1])]
    for a in np.arange(1, 11) / 10:
        for b in (0.0, 1 - a):
            s = np.abs(x).max(0) ** a / np.abs(w).max(0) ** b
            vectors.append((s / np.exp(np.log(s).mean())).astype(np.float16).astype(np.float64))
    errors = [((rounded(x / s) @ rounded(w * s, stored=True).T - x @ w.T) ** 2).sum() for s in vectors]
    return errors, vectors[int(np.argmin(errors))]


def test_the_search_finds_what_an_exhaustive_search_finds():
    for seed, bits in ((0, 4), (1, 4), (2, 8), (3, 3)):
        x_MK, w_NK = layer(seed=seed)
        choice = BitChoice(weight_bits=bits, group_size=None)
        found_K, errors = smoothing.search(
            x_MK, w_NK, x_MK.abs().amax(0), transform_of=lambda s: transforms.make("smooth", 48, 0, s),
            round_input=lambda x, bits=bits: fake_quantize(x, bits),
            round_weight=lambda w, choice=choice: dequantize(quantize_nearest(w, choice)))
        expected, best_K = brute_force(x_MK, w_NK, bits)
        # float32 against float64: a value on a rounding boundary may go the other way, one code in some thousand
        np.testing.assert_allclose(errors, expected, rtol=0.05)
        np.testing.assert_allclose(found_K.double().numpy(), best_K, rtol=2**-10)
        assert min(errors) < 0.5 * errors[0], "with outlier channels, smoothing must pay"


def test_without_outliers_no_smoothing_can_win():
    x_MK, w_NK = torch.ones(8, 16), torch.ones(4, 16)
    found_K, errors = smoothing.search(x_MK, w_NK, x_MK.abs().amax(0), transform_of=lambda s: transforms.make("smooth", 16, 0, s),
                                       round_input=lambda x: x, round_weight=lambda w: w)
    assert torch.equal(found_K, torch.ones(16).half()) and len(errors) == 21
