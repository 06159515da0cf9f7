"""The C kernels against the references, compiled for each instruction set this CPU runs.

Dimension letters: M tokens, N out features, K in features, G groups along K, R rank.

Codes, scales and integer sums must equal the reference bit for bit; so must whole layers whose scales are powers of two, where
float32 rounds nothing. All instruction sets equalling one reference, they equal each other. Elsewhere the error against float64
is bounded by theory, (n roundings) x 2^-24 x (sum of magnitudes), and at most twice the fp32 reference's.
"""

import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit import act_quant as act_quant_reference
from lowbit import cpu, ops
from lowbit.act_quant.naive import ACT_BITS, MID_RISE_BITS, grid_of
from lowbit.formats import PACKED_BITS
from lowbit.hadamard import naive as hadamard_reference
from lowbit.linear_wna16 import naive as wna16_reference
from lowbit.linear_wnan import naive as wnan_reference
from lowbit.quant_linears import cpu as joint_calls
from torch.nn.functional import gelu

from tests.kernels.layers import codes_of, ends, largest_sum, layer, signed

UNIT = 2.0**-24  # a float32 rounding changes a number by at most this fraction
OUT_UNIT = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OUT_TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}  # AVX-512 flushes bfloat16 subnormals
DTYPES = tuple(OUT_UNIT)
GRIDS = [(1.0, False), (0.9, False), (1.0, True), (0.8, True)]  # clip ratio, whether mid-rise
fuzzed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _on_each_instruction_set(isa):
    assert ops.backend().is_kernel


def powers(k_in):
    """Blocks a rotation of k_in features may have."""
    return [1 << i for i in range(10) if k_in % (1 << i) == 0]


# --- rotation and activations ---

def rotation_bound(x_MK, factor_K, block):
    """(exact y_MK float64, bound of a float32 butterfly's error): log2(block) additions, the factor, three roundings of the scale."""
    scaled_MK = x_MK.double() if factor_K is None else x_MK.double() * factor_K.double()
    ones_K = torch.ones(x_MK.shape[-1], dtype=torch.float64)
    sums = scaled_MK.abs().reshape(-1, block).sum(-1, keepdim=True).expand(-1, block).reshape(x_MK.shape) / math.sqrt(block)
    return hadamard_reference.block_hadamard(scaled_MK, block, ones_K), 1.01 * (math.log2(block) + 4) * UNIT * sums


@fuzzed
@given(draw=st.data(), m=st.integers(0, 7), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_rotation_errs_no_more_than_its_butterflies_may(draw, m, dtype, seed):
    k_in = draw.draw(st.sampled_from([1, 7, 12, 96, 160, 512, 768, 1280]))
    block = draw.draw(st.sampled_from(powers(k_in)))
    x_MK = signed(m, k_in, seed, dtype)
    factor_K = torch.randn(k_in, generator=torch.Generator().manual_seed(seed))
    exact_MK, bound_MK = rotation_bound(x_MK, factor_K, block)
    y_MK = ops.block_hadamard(x_MK, block, factor_K)
    assert y_MK.dtype == dtype and y_MK.shape == x_MK.shape
    error_MK = (y_MK.double() - exact_MK).abs()
    assert bool((error_MK <= bound_MK * (1 + OUT_UNIT[dtype]) + OUT_UNIT[dtype] * exact_MK.abs() + OUT_TINY[dtype]).all())


@fuzzed
@given(draw=st.data(), m=st.integers(0, 9), bits=st.sampled_from(ACT_BITS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_unrotated_codes_and_scales_equal_the_reference_bit_for_bit(draw, m, bits, dtype, seed):
    width, groups = draw.draw(st.integers(1, 67)), draw.draw(st.integers(1, 3))
    x_MK = signed(m, width * groups, seed) * 10.0 ** draw.draw(st.integers(-44, 33))
    x_MK = x_MK.to(dtype).nan_to_num()
    factor_K = draw.draw(st.sampled_from([None, torch.randn(width * groups, generator=torch.Generator().manual_seed(seed))]))
    group_size = draw.draw(st.sampled_from([0, width]))
    grid = draw.draw(st.sampled_from(GRIDS))
    for got, expected in zip(ops.act_quant(x_MK, factor_K, 1, bits, group_size, *grid),
                             act_quant_reference.act_quant(x_MK, factor_K, 1, bits, group_size, *grid), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@fuzzed
@given(draw=st.data(), m=st.integers(0, 6), bits=st.sampled_from(ACT_BITS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_rotated_codes_are_the_nearest_except_at_ties(draw, m, bits, dtype, seed):
    k_in, top = draw.draw(st.sampled_from([32, 96, 256, 1280])), 2 ** (bits - 1) - 1
    block = hadamard_reference.block_size(k_in)
    group_size = draw.draw(st.sampled_from([0, 32]))
    x_MK = signed(m, k_in, seed, dtype)
    exact_MK, bound_MK = rotation_bound(x_MK, None, block)
    exact, bound = (t.unflatten(-1, (-1, group_size or k_in)) for t in (exact_MK, bound_MK))
    most, worst = exact.abs().amax(-1, keepdim=True), bound.amax(-1, keepdim=True)
    q, scale = ops.act_quant(x_MK, None, block, bits, group_size)
    q = q.unflatten(-1, (-1, group_size or k_in)).double()
    assert bool(((scale[..., None] - most / top).abs() <= worst / top + 2 * UNIT * most / top).all())
    # a code is round(y top / max|y|): the errors of y and of max|y|, and two roundings, move what is rounded by at most `slack`
    slack = top * (2.02 * worst / most + 4 * UNIT)
    assert bool(((q - exact * top / most).abs() <= 0.5 + slack)[most.expand_as(q) > 0].all())
    assert bool((q[most.expand_as(q) == 0] == 0).all())
    assert bool((q.abs() <= top).all())


@fuzzed
@given(draw=st.data(), m=st.integers(0, 6), bits=st.sampled_from(MID_RISE_BITS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_rotated_mid_rise_codes_are_the_odd_ones_around_them_except_at_ties(draw, m, bits, dtype, seed):
    k_in, clip = draw.draw(st.sampled_from([32, 96, 256, 1280])), draw.draw(st.sampled_from([1.0, 0.8]))
    block, grid = hadamard_reference.block_size(k_in), grid_of(bits, clip, True)
    x_MK = signed(m, k_in, seed, dtype)
    exact_MK, bound_MK = rotation_bound(x_MK, None, block)
    span_M1, worst_M1 = exact_MK.abs().amax(-1, keepdim=True) * grid.share, bound_MK.amax(-1, keepdim=True)
    q_MK, scale_M1 = ops.act_quant(x_MK, None, block, bits, 0, clip, True)
    assert bool((q_MK % 2 != 0).all() and (q_MK.int().abs() <= grid.top).all())
    assert bool(((scale_M1 - span_M1 / grid.divisor).abs() <= worst_M1 / grid.divisor + 3 * UNIT * span_M1 / grid.divisor).all())
    # in units of the scale a code is at most 1 from what it stands for, more only where the grid ends
    inside_MK = (exact_MK.abs() <= span_M1) & (span_M1 > 0)
    slack = grid.divisor * (2.02 * worst_M1 / span_M1 + 5 * UNIT)
    assert bool(((q_MK.double() - exact_MK * grid.divisor / span_M1).abs() <= 1 + slack)[inside_MK].all())
    assert bool((scale_M1[span_M1 == 0] == 0).all())


@pytest.mark.parametrize(("bits", "mid_rise"), [(8, False), (4, True)])
def test_a_token_of_nan_or_infinity_spoils_no_other(bits, mid_rise):
    x_MK = signed(5, 96, 0)
    clean = ops.act_quant(x_MK, None, 32, bits, 0, 1.0, mid_rise)
    x_MK[3, 7], x_MK[4, 9] = float("nan"), float("inf")
    q, scale = ops.act_quant(x_MK, None, 32, bits, 0, 1.0, mid_rise)
    assert torch.equal(q[:3], clean[0][:3]) and torch.equal(scale[:3], clean[1][:3])
    assert not bool(torch.isfinite(scale[3:]).any()), "what is not finite stays so"


# --- products whose every float is exact ---

@pytest.mark.parametrize("bits", PACKED_BITS)
@settings(fuzzed, max_examples=15)
@given(draw=st.data(), m=st.integers(0, 30), n_out=st.integers(0, 70), k_in=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_quantized_products_equal_the_reference_bit_for_bit(bits, draw, m, n_out, k_in, seed):
    group_size, symmetric = draw.draw(st.sampled_from([0, 4, 32, 64])), draw.draw(st.booleans())
    act_bits, dtype, rank = draw.draw(st.sampled_from(ACT_BITS)), draw.draw(st.sampled_from(DTYPES)), draw.draw(st.sampled_from([0, 1, 5]))
    weight = layer(bits, group_size, symmetric, n_out, k_in, seed, exact=True)
    whole_groups = group_size and k_in % group_size == 0 and draw.draw(st.booleans())
    columns = k_in // group_size if whole_groups else 1
    act_scale = 2.0 ** torch.randint(0, 2, (m, columns), generator=torch.Generator().manual_seed(seed))
    bias_N, low_MR, up_NR = ends(m, n_out, rank, dtype, seed)
    low = (low_MR, up_NR) if rank else (None, None)
    # all sums stay below 255 x 127 x 100 x 4 + 4 + 5 x 16 < 2^24, so float32 holds them exactly in any order
    arguments = (codes_of(m, k_in, act_bits, seed), act_scale, *weight, draw.draw(st.sampled_from([None, bias_N])), *low, False, dtype)
    y_MN, expected_MN = ops.linear_wnan(*arguments), wnan_reference.linear_wnan(*arguments)
    assert y_MN.dtype == dtype and torch.equal(y_MN, expected_MN)


@pytest.mark.parametrize("bits", PACKED_BITS)
@settings(fuzzed, max_examples=10)
@given(draw=st.data(), m=st.integers(0, 15), n_out=st.integers(0, 70), k_in=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_float_products_of_integers_equal_the_reference_bit_for_bit(bits, draw, m, n_out, k_in, seed):
    dtype = draw.draw(st.sampled_from(DTYPES))
    weight = layer(bits, draw.draw(st.sampled_from([0, 4, 32, 64])), draw.draw(st.booleans()), n_out, k_in, seed, exact=True)
    x_MK = codes_of(m, k_in, 8, seed).to(dtype)
    arguments = (x_MK, *weight, draw.draw(st.sampled_from([None, ends(m, n_out, 0, dtype, seed)[0]])), None, None, False)
    y_MN = ops.linear_wna16(*arguments)
    assert y_MN.dtype == dtype and torch.equal(y_MN, wna16_reference.linear_wna16(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 64, True), (8, 0, False), (3, 32, False)])
@pytest.mark.parametrize(("m", "n_out", "k_in"), [(8, 33, 64), (33, 64, 1000), (70, 45, 1099)])
def test_float_products_of_many_tokens_and_features_equal_the_reference_bit_for_bit(m, n_out, k_in, bits, group_size, symmetric, dtype):
    weight = layer(bits, group_size, symmetric, n_out, k_in, m, exact=True)
    arguments = (codes_of(m, k_in, 4, m).to(dtype), *weight, None, None, None, False)  # sums below 255 x 7 x 1099 x 2 < 2^24
    assert torch.equal(ops.linear_wna16(*arguments), wna16_reference.linear_wna16(*arguments))


@pytest.mark.parametrize(("m", "n_out", "k_in"), [(301, 40, 70), (1, 33, 5000), (25, 200, 1031)])
def test_long_and_tall_products_have_exact_sums(m, n_out, k_in):
    weight, q_MK = layer(8, 0, False, n_out, k_in, 0, exact=True), codes_of(m, k_in, 8, 0)
    arguments = (q_MK, torch.ones(m, 1), *weight, None, None, None, False, torch.float32)
    assert int(wnan_reference.group_sums(q_MK, weight[0], weight[2], 8, 0, k_in).abs().max()) > 255 * 100 * k_in // 2
    assert torch.equal(ops.linear_wnan(*arguments), wnan_reference.linear_wnan(*arguments))


@pytest.mark.parametrize(("m", "n_out"), [(8, 33), (17, 64), (64, 32), (150, 70), (1100, 600)])  # parts of blocks, several tiles at a time
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_groups"), [
    (4, 64, True, False), (4, 128, False, True), (8, 64, False, True), (8, 0, False, False), (6, 0, True, False), (3, 64, True, True)])
@pytest.mark.parametrize("k_in", [64, 1000, 1024])
def test_products_of_many_tokens_and_features_equal_the_reference_bit_for_bit(
        m, n_out, k_in, bits, group_size, symmetric, act_groups, threads):
    weight = layer(bits, group_size, symmetric, n_out, k_in, m, exact=True)
    columns = k_in // group_size if act_groups and k_in % group_size == 0 else 1
    act_scale = 2.0 ** torch.randint(0, 2, (m, columns), generator=torch.Generator().manual_seed(m))
    # sums stay below 255 x 15 x 1024 x 4 < 2^24
    arguments = (codes_of(m, k_in, 5, m), act_scale, *weight, None, None, None, False, torch.float32)
    expected_MN = wnan_reference.linear_wnan(*arguments)
    for count in (1, 2):  # of 1100 tokens both multiply several tiles at a time
        threads(count)
        assert torch.equal(ops.linear_wnan(*arguments), expected_MN)


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("q", [-128, 127])
def test_the_largest_products_overflow_no_partial_sum(q, bits, group_size):
    packed_NP, scale_NG, zero_NG, *rest = layer(bits, group_size, False, 33, 300, 0, exact=True)
    weight = torch.full_like(packed_NP, 255), torch.ones_like(scale_NG), torch.zeros_like(zero_NG), *rest
    arguments = (torch.full((9, 300), q, dtype=torch.int8), torch.ones(9, 1), *weight, None, None, None, False, torch.float32)
    y_MN = ops.linear_wnan(*arguments)
    assert torch.equal(y_MN, torch.full((9, 33), 300.0 * q * (2**bits - 1))) and torch.equal(y_MN, wnan_reference.linear_wnan(*arguments))


# --- products of any floats ---

def check(y_MN, reference_MN, exact_MN, magnitude_MN, roundings):
    """Bounded by theory element by element, and at most twice the reference's error, whose own output is rounded once as well."""
    dtype, error_MN = y_MN.dtype, (y_MN.double() - exact_MN).abs()
    rounding_MN = OUT_UNIT[dtype] * exact_MN.abs() + OUT_TINY[dtype]
    assert bool((error_MN <= 1.01 * roundings * UNIT * magnitude_MN + 1.01 * rounding_MN).all())
    assert error_MN.max() <= 2 * (reference_MN.double() - exact_MN).abs().max()


@pytest.mark.parametrize("gelu_after", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_products_err_at_most_twice_the_reference(dtype, rank, gelu_after):
    m, n_out, k_in, group_size = 37, 45, 320, 32
    weight = layer(4, group_size, False, n_out, k_in, 1)
    q_MK, scale_MG = ops.act_quant(signed(m, k_in, 1), None, 64, 6, group_size)
    generator = torch.Generator().manual_seed(1)
    bias_N, low_MR, up_NR = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n_out,), (m, rank), (n_out, rank)))
    arguments = (q_MK, scale_MG * 0.01, *weight, bias_N, *((low_MR, up_NR) if rank else (None, None)), gelu_after, dtype)
    x_MK = q_MK.double() * (scale_MG * 0.01).double().repeat_interleave(group_size, 1)
    w_NK = wnan_reference.dequantize(*weight, k_in).double()
    exact_MN = x_MK @ w_NK.T + bias_N.double() + low_MR.double() @ up_NR.double().T
    # one conversion, two factors and one sum a group; a product and a sum a rank; the bias
    added_MN = (bias_N.expand(m, -1), low_MR.double().abs() @ up_NR.double().abs().T)
    magnitude_MN = largest_sum(x_MK, w_NK, *added_MN)
    roundings = k_in // group_size + 3 + rank + 2
    if gelu_after:  # its slope is below 1.13; its own arithmetic errs by a few units of its argument
        magnitude_MN, roundings = 1.13 * magnitude_MN, roundings + 8
        exact_MN = gelu(exact_MN, approximate="tanh")
    check(ops.linear_wnan(*arguments), wnan_reference.linear_wnan(*arguments), exact_MN, magnitude_MN, roundings)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_products_err_at_most_twice_the_reference(dtype, bits):
    m, n_out, k_in = 31, 45, 301
    weight, x_MK = layer(bits, 64, False, n_out, k_in, 2), signed(m, k_in, 2, dtype).mul(0.01)
    bias_N, low_MR, up_NR = ends(m, n_out, 4, dtype, 2)
    arguments = (x_MK, *weight, bias_N, low_MR, up_NR, False)
    w_NK = wnan_reference.dequantize(*weight, k_in)
    exact_MN = x_MK.double() @ w_NK.double().T + bias_N.double() + low_MR.double() @ up_NR.double().T
    magnitude_MN = largest_sum(x_MK, w_NK, bias_N.expand(m, -1), low_MR.double().abs() @ up_NR.double().abs().T)
    check(ops.linear_wna16(*arguments), wna16_reference.linear_wna16(*arguments), exact_MN, magnitude_MN, k_in + 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_right_from_tail_to_tail(dtype):
    """A layer of one code and one input feature: its output is GELU of the bias."""
    bias_N = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-60.0, -1e4, 1e4, 0.0])]).to(dtype)
    packed_NP, scale_NG = torch.zeros(len(bias_N), 1, dtype=torch.uint8), torch.ones(len(bias_N), 1).half()
    y_N = ops.linear_wnan(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1), packed_NP, scale_NG, None, 8, 0, bias_N, None, None, True,
                          dtype)[0]
    exact_N = gelu(bias_N.double(), approximate="tanh")
    bound_N = 8 * UNIT * bias_N.double().abs() + OUT_UNIT[dtype] * exact_N.abs() + OUT_TINY[dtype]
    assert bool(((y_N.double() - exact_N).abs() <= bound_N).all())


# --- several layers of one input ---

@fuzzed
@given(draw=st.data(), m=st.sampled_from([0, 1, 5, 13, 80, 300]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_layers_of_one_input_give_what_each_gives_alone(draw, m, dtype, seed):
    k_in, group_size = draw.draw(st.sampled_from([(64, 0), (96, 32), (100, 64), (128, 64)]))
    block = draw.draw(st.sampled_from(powers(k_in)))
    act_group = draw.draw(st.sampled_from([0, group_size if k_in % (group_size or 1) == 0 else 0]))
    widths = draw.draw(st.lists(st.sampled_from(PACKED_BITS), min_size=1, max_size=4))
    n_out = st.integers(1, 70) | st.integers(1024, 1090)  # threads share out tokens of narrow layers, and features of wide ones
    layers = [layer(bits, group_size, draw.draw(st.booleans()), draw.draw(n_out), k_in, seed + i)
              for i, bits in enumerate(widths)]
    x_MK, factor_K = signed(m, k_in, seed, dtype), torch.randn(k_in, generator=torch.Generator().manual_seed(seed))
    bias = [draw.draw(st.sampled_from([None, ends(0, len(each[0]), 1, dtype, seed)[0]])) for each in layers]
    act_bits, last = [draw.draw(st.sampled_from(ACT_BITS)) for _ in layers], [False] * (len(layers) - 1) + [True]
    packed, scale, zero, bits, _ = zip(*layers)
    grid = draw.draw(st.sampled_from(GRIDS))
    made = ops.quant_linears((x_MK,), factor_K, block, act_bits, act_group, packed, scale, zero, bits, group_size, bias, last, None, None,
                             *grid)
    for y_MN, each, stored, bias_N, gelu_after in zip(made, act_bits, layers, bias, last, strict=True):
        quantized = ops.act_quant(x_MK, factor_K, block, each, act_group, *grid)
        assert torch.equal(y_MN, ops.linear_wnan(*quantized, *stored, bias_N, None, None, gelu_after, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(96,), (64, 32), (60, 36)])
def test_parts_side_by_side_and_a_gated_residual_are_what_they_stand_for(dtype, widths):
    weight = layer(4, 32, False, 37, 96, 0)
    x, factor_K = signed(10, 96, 1, dtype).view(2, 5, 96), torch.randn(96, generator=torch.Generator().manual_seed(2))
    residual, gates = signed(10, 37, 3, dtype).view(2, 5, 37), signed(2, 90, 4, dtype)
    gate_BN = gates[:, 40:77]  # rows of a wider tensor
    bias_N = ends(1, 37, 1, dtype, 5)[0]
    rest = (factor_K, 32, (4,), 0, (weight[0],), (weight[1],), (weight[2],), (4,), 32, (bias_N,), (False,))
    [plain] = ops.quant_linears((x,), *rest, None, None)
    [made] = ops.quant_linears([part.contiguous() for part in x.split(widths, -1)], *rest, residual, gate_BN)
    terms = residual.float().abs() + gate_BN[:, None].float().abs() * plain.float().abs()
    exact = residual.double() + gate_BN[:, None].double() * plain.double()
    assert bool(((made.double() - exact).abs() <= (2 * OUT_UNIT[dtype] + 4 * UNIT) * terms + OUT_TINY[dtype]).all())
    with pytest.raises(ValueError, match="gate of a residual"):
        ops.quant_linears((x,), *rest, residual, None)
    with pytest.raises(ValueError, match="differ in width alone"):
        ops.quant_linears((x[..., :64], x[:1, ..., 64:]), *rest, None, None)


def test_one_call_refuses_more_weights_than_it_holds_and_activation_groups_that_are_not_the_weights():
    packed_NP, scale_NG, _, bits, group_size = layer(4, 32, True, 5, 64, 0)
    x_MK = signed(3, 64, 0)

    def call(count, act_group):
        return ops.quant_linears((x_MK,), None, 1, (4,) * count, act_group, (packed_NP,) * count, (scale_NG,) * count, (None,) * count,
                                 (bits,) * count, group_size, (None,) * count, (False,) * count, None, None)
    with pytest.raises(ValueError, match="at most 8 weights"):
        call(joint_calls.MOST_WEIGHTS + 1, 0)
    with pytest.raises(ValueError, match="whole groups of the weight's size 32"):
        call(1, 16)


def test_layers_of_one_input_that_share_memory_with_the_last_ones_are_others():
    """The same addresses, fewer rows, or other numbers in them."""
    x_MK, layers = signed(5, 64, 0), [layer(4, 0, False, 40, 64, seed) for seed in range(2)]

    def call(*layers, bias=(None, None)):
        packed, scale, zero, bits, _ = zip(*layers)
        return ops.quant_linears((x_MK,), None, 1, (4, 4), 0, packed, scale, zero, bits, 0, bias, (False, False), None, None)
    first = call(*layers)
    half = [part[:20] if isinstance(part, torch.Tensor) else part for part in layers[1]]
    assert torch.equal(call(layers[0], half)[1], first[1][:, :20])
    strided = [part.T.contiguous().T if isinstance(part, torch.Tensor) else part for part in layers[1]]
    numbers = torch.ones(80)
    before = call(layers[0], strided, bias=(None, numbers[::2]))
    torch.testing.assert_close(before[1], first[1] + 1)
    strided[1].mul_(2)
    numbers.mul_(3)
    torch.testing.assert_close(call(layers[0], strided, bias=(None, numbers[::2]))[1], 2 * first[1] + 3)


# --- layouts, threads ---

def test_strided_inputs_of_any_rank_give_what_dense_ones_give():
    weight = tuple(t.T.contiguous().T if isinstance(t, torch.Tensor) else t for t in layer(3, 32, False, 37, 96, 0))
    dense = tuple(t.contiguous() if isinstance(t, torch.Tensor) else t for t in weight)
    x = signed(24, 192, 0).view(4, 6, 192).transpose(0, 1)[..., ::2]
    q, scale = ops.act_quant(x, None, 32, 8, 32)
    assert all(torch.equal(a, b) for a, b in zip((q, scale), ops.act_quant(x.contiguous(), None, 32, 8, 32), strict=True))
    assert torch.equal(ops.block_hadamard(x, 32, torch.ones(96)), ops.block_hadamard(x.contiguous(), 32, torch.ones(96)))
    q, scale = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, scale))
    bias_N, low_MR, up_NR = ends(24, 74, 4, torch.float32, 0)
    low = low_MR.view(4, 6, 4).transpose(0, 1)
    y = ops.linear_wnan(q, scale, *weight, bias_N[::2], low, up_NR[::2], False, torch.float32)
    assert y.shape == (6, 4, 37)
    assert torch.equal(y, ops.linear_wnan(q.contiguous(), scale.contiguous(), *dense, bias_N[::2].contiguous(), low.contiguous(),
                                          up_NR[::2].contiguous(), False, torch.float32))
    assert torch.equal(ops.linear_wna16(x, *weight, bias_N[::2], low, up_NR[::2], False),
                       ops.linear_wna16(x.contiguous(), *dense, bias_N[::2].contiguous(), low.contiguous(), up_NR[::2].contiguous(), False))


def run_all(seed=0):
    x_MK, weight = signed(45, 320, seed), layer(4, 64, False, 131, 320, seed)
    q_MK, scale_M1 = ops.act_quant(x_MK, None, 64, 8, 0)
    return (q_MK, scale_M1, ops.block_hadamard(x_MK, 64, torch.ones(320)), ops.linear_wna16(x_MK, *weight, None, None, None, True),
            ops.linear_wna16(x_MK.bfloat16(), *weight, None, None, None, False),
            ops.linear_wnan(q_MK, scale_M1, *weight, None, None, None, True, torch.bfloat16))


def many_tokens(group_size):
    """So many that threads share them out."""
    weight, x_MK = layer(4, group_size, True, 70, 3 * group_size, 0), signed(301, 3 * group_size, 0)
    return ops.linear_wnan(*ops.act_quant(x_MK, None, 32, 8, 0), *weight, None, None, None, False, torch.float32)


def shared_out(seed=0):
    """Products whose tokens threads share out (301 x 70, 100 x 40), whose features (45 x 1600), and whose panels as well (45 x 131)."""
    made = []
    for m, n_out in ((301, 70), (100, 40), (45, 1600), (45, 131)):
        for group_size in (32, 64):
            (packed_NP, *rest, bits, _), x_MK = layer(4, group_size, True, n_out, 3 * group_size, seed), signed(m, 3 * group_size, seed)
            made += ops.quant_linears((x_MK,), None, 32, (8,), 0, (packed_NP,), *((each,) for each in rest), (bits,), group_size, (None,),
                                      (False,), None, None)
    return made


def test_one_thread_and_two_give_the_same(threads):
    threads(1)
    one = (*run_all(), many_tokens(32), many_tokens(64), *shared_out())
    for count in (2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(one, (*run_all(), many_tokens(32), many_tokens(64), *shared_out()), strict=True))


def test_calls_from_several_threads_do_not_mix():
    def everything(seed):
        return *run_all(seed), *shared_out(seed)
    expected, got = [everything(seed) for seed in range(3)], {}
    callers = [threading.Thread(target=lambda seed=seed: got.update({seed: [everything(seed) for _ in range(3)]})) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for seed in range(3):
        assert all(torch.equal(a, b) for again in got[seed] for a, b in zip(expected[seed], again, strict=True))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_no_tokens_give_no_outputs(lead):
    weight, x = layer(4, 32, True, 5, 64, 0), torch.empty(*lead, 64)
    q, scale = ops.act_quant(x, None, 64, 4, 32)
    assert q.shape == (*lead, 64) and scale.shape == (*lead, 2)
    assert ops.linear_wnan(q, scale, *weight, None, None, None, False, torch.float32).shape == (*lead, 5)
    assert ops.linear_wna16(x, *weight, None, None, None, False).shape == (*lead, 5)
    assert ops.block_hadamard(x, 64, torch.ones(64)).shape == x.shape
    assert cpu.why_not() == ""
