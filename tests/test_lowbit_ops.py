"""Each operation against its definition, and each fast version against its reference.

A fast version may err, against float64, at most twice as much as the fp32 reference does.
"""

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit import act_quant, ops
from lowbit.act_quant.naive import ACT_BITS, MID_RISE_BITS
from lowbit.formats import PACKED_BITS, pack
from lowbit.hadamard.naive import block_hadamard, block_size, inverse, matrix
from lowbit.linear_wnan import naive
from lowbit.tensor_cache import LastInputCache


def signed(*shape, seed=0, spread=3.0):
    """Signed, with channels of different size, one all-zero row and one with a single outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.rand(shape[-1], generator=generator).mul(spread).exp()
    x.view(-1, shape[-1])[0] = 0
    x.view(-1, shape[-1])[-1, 1] = -100.0
    return x


def signs(k_in, seed=0):
    return torch.randint(0, 2, (k_in,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


# --- Hadamard ---

@pytest.mark.parametrize("block", [1, 2, 16, 256])
def test_hadamard_matrix_is_the_sylvester_matrix(block):
    entry = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    torch.testing.assert_close(matrix(block, torch.float64) * block**0.5, torch.tensor(entry, dtype=torch.float64))


@pytest.mark.parametrize(("k_in", "block"), [(256, 256), (1280, 256), (3072, 256), (96, 32), (7, 1), (1, 1), (512, 256)])
def test_block_is_the_largest_power_of_two_up_to_256(k_in, block):
    assert block_size(k_in) == block


@pytest.mark.parametrize("k_in", [256, 1280, 96, 7])
def test_inverse_undoes_the_transform_and_products_are_kept(k_in):
    x, w, s, block = signed(5, k_in).double(), signed(3, k_in, seed=1).double(), signs(k_in).double(), block_size(k_in)
    y = block_hadamard(x, block, s)
    torch.testing.assert_close(inverse(y, block, s), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(y @ block_hadamard(w, block, s).T, x @ w.T, rtol=1e-12, atol=1e-9)
    if k_in != 7:
        assert not torch.allclose(y, x * s), "the transform must mix features"


@pytest.mark.parametrize("shape", [(3, 256), (2, 5, 1280), (4, 96), (2, 7)])
def test_fast_hadamard_errs_no_more_than_twice_the_reference(shape):
    x, s, block = signed(*shape), signs(shape[-1]), block_size(shape[-1])
    exact = block_hadamard(x.double(), block, s.double())
    reference_error = (block_hadamard(x, block, s) - exact).abs().max()
    fast = ops.block_hadamard(x, block, s)
    assert fast.shape == x.shape
    assert (fast - exact).abs().max() <= 2 * reference_error + 2**-23


def test_fast_hadamard_takes_any_memory_layout():
    x, s = signed(6, 4, 64).transpose(0, 1), signs(64)
    assert torch.equal(ops.block_hadamard(x, 64, s), ops.block_hadamard(x.contiguous(), 64, s))


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 features are not a multiple"):
        block_hadamard(torch.ones(1, 10), 4, torch.ones(10))


# --- activations ---

@pytest.mark.parametrize("bits", ACT_BITS)
def test_tokens_are_rounded_to_the_nearest_of_their_own_levels(bits):
    x_MK = signed(9, 33)
    q_MK, scale_M1 = act_quant.quantize_per_token(x_MK, bits)
    top = 2 ** (bits - 1) - 1
    assert q_MK.dtype == torch.int8 and int(q_MK.abs().max()) == top
    levels_M1C = scale_M1.double()[..., None] * torch.arange(-top, top + 1)
    nearest_MK = (levels_M1C - x_MK.double()[..., None]).abs().amin(-1)
    error_MK = (q_MK * scale_M1 - x_MK).abs().double()
    # a value half way between two levels may go to either; fp32 decides "half way" to within a few units in the last place
    assert bool((error_MK <= nearest_MK + 4 * 2**-24 * x_MK.abs().amax(-1, keepdim=True)).all())
    assert bool((error_MK <= scale_M1 / 2 * (1 + 2**-20)).all())
    assert bool((q_MK[0] == 0).all()), "the all-zero token stays zero"


@pytest.mark.parametrize("bits", MID_RISE_BITS)
def test_mid_rise_rounds_to_the_odd_multiple_of_half_a_step_in_whose_cell_a_value_lies(bits):
    x_MK = signed(9, 33)
    q_MK, scale_M1 = act_quant.quantize_per_token(x_MK, bits, 1.0, True)
    top = 2**bits - 1
    assert q_MK.dtype == torch.int8 and int(q_MK.abs().max()) == top and bool((q_MK % 2 != 0).all())
    share = 0.9 if bits == 3 else 1.0
    torch.testing.assert_close(scale_M1, share * x_MK.abs().amax(-1, keepdim=True) / 2**bits)
    inside_MK = x_MK.abs() <= scale_M1 * 2**bits  # all of them, where the grid spans the largest magnitude
    assert bool(inside_MK.all()) == (share == 1.0)
    error_MK = (q_MK * scale_M1 - x_MK).abs()
    assert bool((error_MK <= scale_M1 * (1 + 2**-18))[inside_MK].all()), "half a step is one unit of a code"
    assert bool((scale_M1[0] == 0).all()), "the all-zero token stays zero"


@pytest.mark.parametrize("bits", ACT_BITS)
def test_values_on_the_grid_are_kept_exactly(bits):
    top = 2 ** (bits - 1) - 1
    x_MK = torch.arange(-top, top + 1).float()[None] * 0.25
    assert torch.equal(act_quant.fake_quantize(x_MK, bits), x_MK)


@settings(deadline=None, max_examples=50)
@given(bits=st.sampled_from(ACT_BITS), seed=st.integers(0, 2**31), exponent=st.integers(-45, 37))
def test_fast_activations_equal_the_reference_bit_for_bit(bits, seed, exponent):
    x = torch.randn(3, 4, 17, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x[0, 0] = 0
    for grid in ((1.0, False), (0.9, False), (1.0, True), (0.8, True)):
        fast = ops.fake_quantize(x, bits, *grid)
        assert torch.equal(fast, act_quant.fake_quantize(x, bits, *grid))
        assert bool(torch.isfinite(fast).all())
        assert grid[1] or torch.equal(ops.fake_quantize(-x, bits, *grid), -fast)


def test_sixteen_bits_return_the_input_itself():
    x = signed(2, 8)
    assert ops.fake_quantize(x, 16) is x and act_quant.fake_quantize(x, 16) is x


def test_widths_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="9-bit activations"):
        ops.fake_quantize(torch.ones(1, 2), 9)


# --- linear ---

def packed_layer(bits, group_size, symmetric, n_out=5, k_in=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k_in // (group_size or k_in))
    codes_NK = torch.randint(0, 1 << bits, (n_out, k_in), generator=generator, dtype=torch.uint8)
    scale_NG = (torch.rand(n_out, groups, generator=generator) + 0.01).half()
    if symmetric:  # signed grids have scales of either sign
        scale_NG = scale_NG * (1 - 2 * torch.randint(0, 2, scale_NG.shape, generator=generator))
    zero_NG = None if symmetric else torch.randint(0, 1 << bits, (n_out, groups), generator=generator, dtype=torch.uint8)
    return codes_NK, pack(codes_NK, bits), scale_NG, zero_NG


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantized_weight_follows_its_formula(bits, group_size, symmetric):
    codes_NK, packed_NP, scale_NG, zero_NG = packed_layer(bits, group_size, symmetric)
    w_NK = naive.dequantize(packed_NP, scale_NG, zero_NG, bits, group_size, 70)
    for n in range(5):
        for k in range(70):
            g = k // (group_size or 70)
            zero = 2 ** (bits - 1) if zero_NG is None else int(zero_NG[n, g])
            assert float(w_NK[n, k]) == float(scale_NG[n, g]) * (int(codes_NK[n, k]) - zero)


@pytest.mark.parametrize("act_bits", [3, 8, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_emulated_layer_errs_no_more_than_twice_its_float_product(act_bits, bias):
    _, packed_NP, scale_NG, zero_NG = packed_layer(4, 32, False)
    x, b = signed(2, 7, 70), torch.randn(5).half() if bias else None
    w_NK = naive.dequantize(packed_NP, scale_NG, zero_NG, 4, 32, 70)
    rounded, offset = act_quant.fake_quantize(x, act_bits), 0 if b is None else b
    exact = rounded.double() @ w_NK.double().T + offset
    reference_error = (rounded @ w_NK.T + offset - exact).abs().max()
    y = ops.emulated_linear(x, packed_NP, scale_NG, zero_NG, 4, 32, act_bits, b, {})
    assert y.shape == (2, 7, 5) and y.dtype == x.dtype
    assert (y - exact).abs().max() <= 2 * reference_error + 1e-5
    assert torch.equal(y[0, 0], torch.zeros(5) if b is None else b.float()), "an all-zero token gives the bias"


def test_scratch_keeps_the_weight_until_it_is_emptied_or_the_weight_is_another():
    _, packed_NP, scale_NG, zero_NG = packed_layer(4, 32, True)
    x, scratch = signed(3, 70), {}
    first = ops.emulated_linear(x, packed_NP, scale_NG, zero_NG, 4, 32, 16, None, scratch)
    kept = scratch[x.dtype][0]
    assert torch.equal(ops.emulated_linear(x, packed_NP, scale_NG, zero_NG, 4, 32, 16, None, scratch), first)
    assert scratch[x.dtype][0] is kept
    doubled = scale_NG * 2
    torch.testing.assert_close(ops.emulated_linear(x, packed_NP, doubled, zero_NG, 4, 32, 16, None, scratch), 2 * first)
    doubled *= 2
    torch.testing.assert_close(ops.emulated_linear(x, packed_NP, doubled, zero_NG, 4, 32, 16, None, scratch), 4 * first)
    assert len(scratch) == 1, "of one weight at a time"


# --- what layers share ---

class Counter:
    def __init__(self):
        self.tensor_cache, self.calls = LastInputCache(), 0

    def double(self, x, key="key"):
        def compute():
            self.calls += 1
            return x * 2
        return self.tensor_cache.get(x, key, compute)


def test_a_result_is_shared_for_the_same_tensor_and_key():
    count, x = Counter(), torch.ones(3)
    assert count.double(x) is count.double(x)
    count.double(x, "another")
    count.double(x.clone())
    assert count.calls == 3


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x[:1].zero_(), lambda x: x.detach().mul_(3),
                                    lambda x: torch.add(x, 1, out=x)])
def test_a_result_is_never_stale_after_a_change_in_place(change):
    count, x = Counter(), torch.ones(3)
    count.double(x)
    change(x)
    assert torch.equal(count.double(x), x * 2)


def test_a_result_is_dropped_with_its_tensor_and_not_taken_for_a_successor():
    count = Counter()
    for value in range(50):  # the allocator reuses addresses; a memo by address would return an old result
        x = torch.full((3,), float(value))
        assert torch.equal(count.double(x), x * 2)
        del x
    gc.collect()
    assert not count.tensor_cache._slots


def test_inference_tensors_are_computed_anew():
    with torch.inference_mode():
        count, x = Counter(), torch.ones(3)
        count.double(x)
        x.add_(1)
        assert torch.equal(count.double(x), x * 2)
