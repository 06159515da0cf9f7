"""Activation quantizers against the formulas of their module, level by level."""

import pytest
import torch
from lowbit.act_quant import naive

from workbench.options import BadInput, QuantConfig
from workbench.quant.activations import PLAIN, ActFormat, fake_quantize, format_of, quantize

FORMATS = [ActFormat(scale=scale, group_size=32 if scale == "group" else None, grid=grid, clip=clip)
           for scale in ("token", "group", "tensor") for grid in ("symmetric", "mid_rise", "asymmetric") for clip in (1.0, 0.9)]


def tokens(rows=6, k_in=70):
    x = torch.randn(2, rows, k_in, generator=torch.Generator().manual_seed(3))
    x[0, 0] = 0
    x[0, 1] = x[0, 1].abs() + 1  # one-sided: zero lies outside the values
    x[0, 2] = -x[0, 2].abs()
    x[1, 0, 5] = 300.0
    return x


def pieces(x, act_format):
    """Every set of numbers that shares a scale, as (indices, values)."""
    flat, k_in = x.reshape(-1, x.shape[-1]), x.shape[-1]
    if act_format.scale == "tensor":
        return [((slice(None), slice(None)), flat)]
    width = act_format.group_size or k_in
    return [((m, slice(start, start + width)), flat[m, start:start + width]) for m in range(len(flat)) for start in range(0, k_in, width)]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("act_format", FORMATS, ids=lambda f: f.describe())
def test_every_value_takes_the_nearest_level_of_the_grid_its_set_shares(act_format, bits):
    x = tokens()
    range_2 = torch.stack([x.min(), x.max()]) if act_format.scale == "tensor" else None
    y = fake_quantize(x, bits, act_format, range_2).reshape(-1, x.shape[-1])
    for where, values in pieces(x, act_format):
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        if act_format.grid == "mid_rise" and bits < 8:
            step = act_format.clip * (0.9 if bits == 3 else 1.0) * max(high, -low) / 2 ** (bits - 1)
            levels_C = (torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + 0.5).double() * step
        elif act_format.grid != "asymmetric":
            top = 2 ** (bits - 1) - 1
            step = act_format.clip * max(high, -low) / top
            levels_C = torch.arange(-top, top + 1).double() * step
        else:
            step = act_format.clip * (high - low) / (2**bits - 1)
            zero = round(-act_format.clip * low / step) if step else 0
            levels_C = (torch.arange(2**bits).double() - zero) * step
        assert len(levels_C) <= 2**bits
        nearest = (values.double()[..., None] - levels_C).abs().amin(-1)
        taken = (values - y[where]).double().abs()
        assert bool((taken <= nearest + 1e-5 * max(high, -low)).all())


@pytest.mark.parametrize("act_format", FORMATS, ids=lambda f: f.describe())
def test_codes_never_exceed_their_bits(act_format):
    x = tokens() * 1e3
    for bits in (3, 4, 6, 8):
        codes, scale, zero = quantize(x, bits, act_format, torch.tensor([-1.0, 2.0]))
        assert len(codes.unique()) <= 2**bits
        top = 2**bits - 1 if act_format.grid == "mid_rise" and bits < 8 else 2 ** (bits - 1) - 1
        span = (0, 2**bits - 1) if act_format.grid == "asymmetric" else (-top, top)
        assert float(codes.min()) >= span[0] and float(codes.max()) <= span[1]
        assert bool((scale >= 0).all()) and bool(torch.isfinite(scale).all()) and torch.equal(zero, zero.round())


@pytest.mark.parametrize("act_format", FORMATS, ids=lambda f: f.describe())
def test_sixteen_bits_are_the_input_itself_and_zero_stays_zero(act_format):
    x = tokens()
    assert fake_quantize(x, 16, act_format) is x
    assert not fake_quantize(torch.zeros(3, 40), 4, act_format, torch.zeros(2)).any()


def test_the_plain_format_is_the_kernels_own():
    assert PLAIN.is_plain and torch.equal(fake_quantize(tokens(), 4), naive.fake_quantize(tokens(), 4))
    for act_format in (ActFormat(clip=0.9), ActFormat(grid="mid_rise"), ActFormat(grid="mid_rise", clip=0.8)):
        for bits in naive.ACT_BITS:
            codes, scale, _ = quantize(tokens(), bits, act_format)
            torch.testing.assert_close(fake_quantize(tokens(), bits, act_format), codes * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("act_format", FORMATS, ids=lambda f: f.describe())
def test_what_is_next_to_nothing_stays_so(act_format):
    x = tokens()
    x[0, 0, :40] = 1e-40
    y = fake_quantize(x[:1, :1], 4, act_format, torch.stack([x[0, 0].min(), x[0, 0].max()]))
    assert float(y.abs().max()) < 1e-37


def test_a_format_exported_before_grids_had_names_is_read():
    old = {"scale": "token", "group_size": None, "clip": 0.9}
    assert ActFormat.parse({**old, "symmetric": True}) == ActFormat(clip=0.9)
    assert ActFormat.parse({**old, "symmetric": False}) == ActFormat(clip=0.9, grid="asymmetric")
    with pytest.raises(BadInput):
        ActFormat.parse({**old, "symmetric": "x"})


def test_mid_rise_grids_use_every_code_and_err_less_on_rotated_inputs():
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))  # what a rotation makes of nearly any input
    def error(bits, grid):
        return float((fake_quantize(x, bits, ActFormat(grid=grid)) - x).square().mean())
    assert error(3, "mid_rise") < 0.5 * error(3, "symmetric") and error(4, "mid_rise") < 0.8 * error(4, "symmetric")
    for bits in (5, 6, 7):
        assert error(bits, "mid_rise") < error(bits, "symmetric")
    assert error(8, "mid_rise") == error(8, "symmetric")  # an int8 has no room for 256 odd codes
    for bits in (3, 4, 6):
        assert len(quantize(x, bits, ActFormat(grid="mid_rise"))[0].unique()) == 2**bits
        assert len(quantize(x, bits, ActFormat())[0].unique()) == 2**bits - 1


def test_smaller_groups_and_asymmetric_grids_follow_the_numbers_more_closely():
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).abs()  # one-sided: half of a symmetric grid is idle
    def error(**act_format):
        return float((fake_quantize(x, 4, ActFormat(**act_format)) - x).square().mean())
    assert error(scale="group", group_size=32) < error(scale="group", group_size=128) < error()
    assert error(grid="asymmetric") < 0.5 * error()


def test_a_static_range_clips_what_lies_outside():
    act_format, range_2 = ActFormat(scale="tensor"), torch.tensor([-1.0, 1.0])
    assert float(fake_quantize(torch.tensor([[5.0, 0.5]]), 8, act_format, range_2).max()) == 1.0
    with pytest.raises(ValueError, match="calibration trace"):
        fake_quantize(torch.ones(1, 2), 8, act_format)


def test_layers_that_read_one_tensor_at_one_format_share_the_result():
    x, act_format = tokens(), ActFormat(grid="asymmetric")
    assert fake_quantize(x, 4, act_format) is fake_quantize(x, 4, act_format)
    assert not torch.equal(fake_quantize(x, 4, act_format), fake_quantize(x, 4, ActFormat(grid="asymmetric", clip=0.9)))


def test_a_layers_group_size_is_its_weights():
    grouped = QuantConfig(act_scale="group")
    assert (format_of(grouped, 64).group_size, format_of(grouped, None).scale) == (64, "token")
    assert format_of(QuantConfig(), 64).is_plain
    for wrong in ({"scale": "group"}, {"group_size": 64}, {"scale": "group", "group_size": 48}, {"clip": 0.0}):
        with pytest.raises(BadInput):
            ActFormat.parse(wrong)
