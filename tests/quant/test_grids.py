"""Grids: nearest means nearest, scales are used as stored, bytes are what was predicted."""

from dataclasses import replace

import pytest
import torch

from workbench.options import BadInput
from workbench.plans import BitChoice
from workbench.quant import grids
from workbench.quant.grids import Widths, dequantize, predicted_bytes, quantize_nearest

BITS = (2, 3, 4, 6, 8)


def weight(n_out=7, k_in=70, seed=0):
    w_NK = torch.randn(n_out, k_in, generator=torch.Generator().manual_seed(seed))
    w_NK[0] = 0
    w_NK[1] *= 1e-4
    w_NK[2] = w_NK[2].abs()  # one-sided rows: an asymmetric grid must reach zero all the same
    w_NK[3] = -w_NK[3].abs()
    w_NK[4, 5] = 300.0
    return w_NK


def levels(stored, n, g):
    """Every value that row n can take in group g, from the stored grid, by the formula."""
    zero = 2 ** (stored.bits - 1) if stored.zero_NG is None else int(stored.zero_NG[n, g])
    return float(stored.scale_NG[n, g]) * (torch.arange(2**stored.bits).double() - zero)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_takes_the_nearest_level_of_its_group(bits, group_size, symmetric):
    w_NK = weight()
    stored = quantize_nearest(w_NK, BitChoice(weight_bits=bits, group_size=group_size, symmetric=symmetric))
    q_NK = dequantize(stored)
    for n in range(len(w_NK)):
        for g, part in enumerate(grids.groups(70, group_size)):
            distance_JC = (w_NK[n, part, None].double() - levels(stored, n, g)).abs()
            taken_J = (w_NK[n, part] - q_NK[n, part]).abs().double()
            assert bool((taken_J <= distance_JC.amin(1) + 2**-22 * w_NK[n, part].abs().max()).all()), (n, g)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_lies_outside_its_grid(bits, symmetric):
    w_NK = weight()
    stored = quantize_nearest(w_NK, BitChoice(weight_bits=bits, group_size=32, symmetric=symmetric))
    step_NK = stored.scale_NG.float().repeat_interleave(32, 1)[:, :70]
    # float16 rounds the scale by 2^-11 of itself (2^-25 where it is subnormal), times the largest code; a zero point
    # rounds by half a step
    slack_NK = step_NK * (0.5 if symmetric else 1.0) + 2**bits * (step_NK * 2**-11).clamp(min=2**-25)
    assert bool(((dequantize(stored) - w_NK).abs() <= slack_NK).all())
    assert bool((dequantize(stored)[0] == 0).all()), "an all-zero row stays zero"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k_in", [1, 63, 64, 257])
def test_stored_bytes_equal_predicted_bytes(bits, group_size, symmetric, k_in):
    choice = BitChoice(weight_bits=bits, group_size=group_size, symmetric=symmetric)
    stored = quantize_nearest(torch.randn(9, k_in), choice)
    real_bytes = sum(t.untyped_storage().nbytes() for t in (stored.packed_NP, stored.scale_NG, stored.zero_NG) if t is not None)
    assert real_bytes == stored.weight_bytes == predicted_bytes(9, k_in, choice, has_bias=False)
    assert predicted_bytes(9, k_in, choice, has_bias=True) == real_bytes + 18


def test_float_bytes_are_two_per_parameter():
    assert predicted_bytes(9, 64, BitChoice(weight_bits=16), has_bias=True) == 2 * (9 * 64 + 9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_scales_never_lose_to_the_largest_magnitude(symmetric):
    w_NJ = weight(40, 64)
    importance_J = torch.rand(64) ** 4
    widths = Widths(bits_N1=torch.tensor([2.0, 3, 4, 6]).repeat(10)[:, None], symmetric=symmetric)
    plain_N = grids.fit(w_NJ, widths).error(w_NJ, importance_J)
    searched_N = grids.search(w_NJ, widths, importance_J).error(w_NJ, importance_J)
    assert bool((searched_N <= plain_N).all())
    gaussian = widths.bits_N1[:, 0] <= 3
    assert float(searched_N[gaussian].sum()) < 0.8 * float(plain_N[gaussian].sum())


def test_two_symmetric_bits_use_three_levels_plain_and_all_four_searched():
    w_NJ = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    widths = Widths(bits_N1=torch.full((200, 1), 2.0), symmetric=True)
    assert set(grids.fit(w_NJ, widths).round(w_NJ).unique().tolist()) == {-1.0, 0.0, 1.0}
    assert set(grids.search(w_NJ, widths, torch.ones(64)).round(w_NJ).unique().tolist()) == {-2.0, -1.0, 0.0, 1.0}


def test_a_signed_scale_gives_its_lowest_code_to_the_side_that_reaches_farthest():
    w_NJ = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2))
    most_N = w_NJ.gather(1, w_NJ.abs().argmax(1, keepdim=True))[:, 0]
    for bits, gain in ((2, 0.95), (3, 0.9), (4, 0.9)):
        plain = Widths(bits_N1=torch.full((2000, 1), float(bits)), symmetric=True)
        signed = replace(plain, signed=True)
        whole, same = grids.fit(w_NJ, plain), grids.fit(w_NJ, signed)
        assert torch.equal(same.value(same.round(w_NJ)), whole.value(whole.round(w_NJ))), "over the whole range both have the same levels"
        found, best = grids.search(w_NJ, signed, torch.ones(64)), grids.search(w_NJ, plain, torch.ones(64))
        assert torch.equal(found.scale_N1[:, 0] < 0, most_N > 0)
        assert float(found.error(w_NJ, torch.ones(64)).sum()) < gain * float(best.error(w_NJ, torch.ones(64)).sum())
        low_NJ = found.round(w_NJ) == -(2 ** (bits - 1))
        assert bool((w_NJ[low_NJ].sign() == most_N.sign()[:, None].expand_as(w_NJ)[low_NJ]).all())


def test_rows_of_different_widths_are_what_they_would_be_alone():
    w_NJ = weight(8, 64)
    bits_N1 = torch.tensor([2.0, 3, 4, 6, 8, 2, 3, 4])[:, None]
    together = grids.search(w_NJ, Widths(bits_N1=bits_N1, symmetric=True), torch.ones(64))
    for n in range(8):
        alone = grids.search(w_NJ[n : n + 1], Widths(bits_N1=bits_N1[n : n + 1], symmetric=True), torch.ones(64))
        assert torch.equal(together.scale_N1[n], alone.scale_N1[0])
        assert torch.equal(together.round(w_NJ)[n], alone.round(w_NJ[n : n + 1])[0])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1e30])
def test_weights_beyond_the_range_of_float16_scales_still_store(magnitude):
    stored = quantize_nearest(torch.randn(3, 32) * magnitude, BitChoice(weight_bits=4, group_size=32))
    assert bool(torch.isfinite(dequantize(stored)).all()) and bool((stored.scale_NG > 0).all())


def test_a_weight_with_broken_sizes_is_refused():
    stored = quantize_nearest(torch.randn(3, 64), BitChoice(weight_bits=4, group_size=32))
    with pytest.raises(BadInput, match="bytes a row"):
        type(stored)(packed_NP=stored.packed_NP[:, :-1], scale_NG=stored.scale_NG, zero_NG=None, bits=4, group_size=32, k_in=64)
    with pytest.raises(BadInput, match="scales are"):
        type(stored)(packed_NP=stored.packed_NP, scale_NG=stored.scale_NG[:, :1], zero_NG=None, bits=4, group_size=32, k_in=64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_without_packing_gives_the_same_numbers(bits, group_size, symmetric):
    choice = BitChoice(weight_bits=bits, group_size=group_size, symmetric=symmetric)
    assert torch.equal(grids.rounded(weight(), choice), dequantize(quantize_nearest(weight(), choice)))
