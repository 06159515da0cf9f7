"""Triton kernels against their references. `test_triton.py` runs this file in a process of its own: interpreted by NumPy on the CPU
(`TRITON_INTERPRET=1`, which must be set before Triton is imported and would leak into other tests), or on a GPU where there is one.

Every output is allocated full of NaN (integers: of a code no result has), so an element that was not written is seen. Tolerances are
rounding bounds: n float32 additions err by at most n 2^-24 times the sum of magnitudes; 2^-23 covers units that truncate.
"""

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit import gpu
from lowbit.act_quant import naive as act_naive
from lowbit.act_quant import triton as act_triton
from lowbit.formats import PACKED_BITS, pack
from lowbit.hadamard import naive as hadamard_naive
from lowbit.hadamard import triton as hadamard_triton
from lowbit.linear_wna16 import triton as wna16_triton
from lowbit.linear_wnan import naive as wnan_naive
from lowbit.linear_wnan import triton as wnan_triton

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / (1 + inf) is the right 0
DEVICE = "cpu" if gpu.interpreted() else "cuda"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = 2.0**-23
if DEVICE == "cuda":  # one configuration each: measuring all of them for every small shape would take minutes
    from lowbit.linear_wnan import triton_kernel

    for kernel in (triton_kernel.multiply_one, triton_kernel.multiply_grouped):  # the largest tile fits Hopper's shared memory only
        kernel.configs = kernel.configs[:1] if torch.cuda.get_device_capability() == (9, 0) else kernel.configs[-1:]
FEW, MANY = 5, wnan_triton.FEW_TOKENS + 3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty full of NaN, or of -128 / 255, which no quantized activation is."""
    plain, like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -128)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(plain(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))


def require_fp8():
    reason = gpu.why_not_fp8(torch.zeros(1, device=DEVICE))
    if reason:
        pytest.skip(reason)


def signed(*shape, dtype=torch.float32, seed=0):
    """Signed, channels of different size; the first token all zero, the last with one value that saturates every other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.rand(shape[-1], generator=generator).mul(3).exp()
    x.view(-1, shape[-1])[0] = 0
    x.view(-1, shape[-1])[-1, 1] = -1000.0
    return x.to(dtype).to(DEVICE)


def factors(k_in, seed=1):
    """Signs times smoothing factors."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randint(0, 2, (k_in,), generator=generator) * 2 - 1) * (torch.rand(k_in, generator=generator) + 0.5)).to(DEVICE)


def output_error(dtype):
    """Largest relative error of rounding to the type; the interpreter cuts bfloat16 off instead of rounding."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and gpu.interpreted() else 2)


def rotated_exactly(x, factor_K, block):
    """(float64 rotation, bound of its float32 error): a product, two sums of 16 with TF32's two terms, a scale."""
    exact = hadamard_naive.block_hadamard(x.double(), block, factor_K.double())
    magnitude = (x.double() * factor_K.double()).abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
    return exact, 2.0**-18 * magnitude.expand(*magnitude.shape[:-1], block).flatten(-2)


# --- Hadamard ---

@pytest.mark.parametrize(("shape", "block"), [((3, 256), 256), ((2, 2, 768), 256), ((3, 320), 64), ((3, 96), 32), ((2, 24), 8),
                                              ((3, 7), 1), ((1, 1280), 128), ((2, 48), 16), ((2, 6), 2)])
def test_hadamard_is_the_rotation(shape, block):
    for dtype in TYPES:
        x, factor_K = signed(*shape, dtype=dtype), factors(shape[-1])
        y = hadamard_triton.block_hadamard(x, block, factor_K)
        exact, bound = rotated_exactly(x, factor_K, block)
        assert y.shape == x.shape and y.dtype == dtype
        assert bool(((y.double() - exact).abs() <= bound + output_error(dtype) * exact.abs()).all())


def test_hadamard_of_nothing_is_nothing_and_any_memory_layout_is_taken():
    assert hadamard_triton.block_hadamard(torch.zeros(0, 64, device=DEVICE), 64, factors(64)).shape == (0, 64)
    x = signed(6, 4, 64).transpose(0, 1)
    assert torch.equal(hadamard_triton.block_hadamard(x, 64, factors(64)),
                       hadamard_triton.block_hadamard(x.contiguous(), 64, factors(64)))


# --- activations ---

@pytest.mark.parametrize("bits", act_naive.ACT_BITS)
@pytest.mark.parametrize(("shape", "group_size"), [((3, 2, 33), 0), ((4, 96), 32), ((2, 320), 64), ((3, 1), 0)])
def test_without_a_rotation_codes_and_scales_are_the_references(bits, shape, group_size):
    for dtype in TYPES:
        x = signed(*shape, dtype=dtype) if shape[-1] > 1 else torch.tensor([[0.0], [-3], [1e-30]], device=DEVICE).to(dtype)
        for factor_K in (None, factors(shape[-1])):
            for grid in ((1.0, False), (0.9, False), (1.0, True), (0.9, True)):
                q, scale = act_triton.act_quant(x, factor_K, 1, bits, group_size, *grid)
                expected_q, expected_scale = act_naive.act_quant(x, factor_K, 1, bits, group_size, *grid)
                assert torch.equal(q, expected_q) and q.dtype == torch.int8
                # on a GPU torch divides by a number as it multiplies by its reciprocal: one more rounding
                torch.testing.assert_close(scale, expected_scale, rtol=UNIT, atol=0)


@pytest.mark.parametrize("bits", act_naive.FP8_BITS)
def test_codes_in_fp8_are_the_same_codes(bits):
    require_fp8()
    for x, rest in ((signed(3, 96), (None, 1, bits, 32)), (signed(2, 256), (factors(256), 256, bits, 0))):
        for grid in ((1.0, False), (0.9, True)):
            (q, scale), (expected_q, expected_scale) = (act_triton.act_quant(x, *rest, *grid, fp8) for fp8 in (True, False))
            assert q.dtype == torch.float8_e4m3fn and torch.equal(q.float(), expected_q.float()) and torch.equal(scale, expected_scale)
    with pytest.raises(ValueError, match="FP8 does not hold the codes of 5-bit activations"):
        act_triton.act_quant(signed(2, 8), None, 1, 5, 0, 1.0, True, True)


def test_halves_are_rounded_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 127]], device=DEVICE)
    q, scale = act_triton.act_quant(x, None, 1, 8, 0)
    assert q.tolist() == [[0, 2, 2, 0, -2, -2, 4, 127]] and scale.item() == 1


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_tokens_of_any_magnitude_are_the_references(magnitude):
    x = torch.tensor([[1.0, -0.3, 0.7], [0.2, 0.1, -0.9]], device=DEVICE) * magnitude
    q, scale = act_triton.act_quant(x, None, 1, 8, 0)
    expected_q, expected_scale = act_naive.act_quant(x, None, 1, 8, 0)
    assert torch.equal(q, expected_q)
    torch.testing.assert_close(scale, expected_scale, rtol=2 * UNIT, atol=2.0**-149)


@pytest.mark.parametrize(("shape", "block", "group_size"), [((2, 2, 256), 256, 0), ((3, 768), 256, 64), ((3, 320), 64, 0),
                                                            ((3, 96), 32, 32), ((2, 24), 8, 8)])
def test_rotated_codes_are_the_nearest_up_to_the_rotations_rounding(shape, block, group_size):
    """Codes and scale against float64; half a step, plus what the rotation's error makes of a step."""
    for dtype, bits in zip(TYPES, (8, 4, 3)):
        x, factor_K, top = signed(*shape, dtype=dtype), factors(shape[-1]), act_naive.grid_of(bits, 1.0, False).top
        q, scale = act_triton.act_quant(x, factor_K, block, bits, group_size)
        exact, bound = (y.unflatten(-1, (-1, group_size or shape[-1])) for y in rotated_exactly(x, factor_K, block))
        absmax, bound = exact.abs().amax(-1, keepdim=True), bound.amax(-1, keepdim=True)
        assert bool(((scale[..., None].double() * top - absmax).abs() <= bound + 2 * UNIT * absmax).all())
        steps = torch.where(absmax > 0, exact * top / absmax, 0.0)
        allowed = 0.5 + torch.where(absmax > 0, 2 * top * bound / absmax, 0.0) + 4 * UNIT * top
        assert bool(((q.unflatten(-1, (-1, group_size or shape[-1])) - steps).abs() <= allowed).all())
        assert int(q.abs().max()) == top and not q.view(-1, shape[-1])[0].any()


def test_activations_in_any_memory_layout_and_none_at_all():
    x = signed(64, 6).T
    assert torch.equal(act_triton.act_quant(x, None, 1, 8, 0)[0], act_triton.act_quant(x.contiguous(), None, 1, 8, 0)[0])
    for shape in ((0, 32), (2, 0, 32), (3, 0)):
        for found, expected in zip(act_triton.act_quant(torch.zeros(shape, device=DEVICE), None, 1, 8, 0),
                                   act_naive.act_quant(torch.zeros(shape, device=DEVICE), None, 1, 8, 0)):
            assert found.shape == expected.shape and found.dtype == expected.dtype


def test_sizes_that_do_not_divide_are_refused():
    x = signed(2, 48)
    for factor_K, block, group_size, message in ((None, 32, 0, "block 32"), (None, 1, 32, "group size 32"), (factors(7), 1, 0, "factors")):
        with pytest.raises(ValueError, match=message):
            act_triton.act_quant(x, factor_K, block, 8, group_size)
    with pytest.raises(ValueError, match="9-bit activations"):
        act_triton.act_quant(x, None, 1, 9, 0)


# --- linear layers ---

def layer(bits, group_size, symmetric, n_out, k_in, unit_scales=False, seed=0):
    """(packed_NP, scale_NG, zero_NG, bits, group_size); the first row all ones, the second all zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_out, -(-k_in // (group_size or k_in)))
    codes_NK = torch.randint(0, 1 << bits, (n_out, k_in), generator=generator, dtype=torch.uint8)
    codes_NK[0], codes_NK[1:2] = (1 << bits) - 1, 0
    scale_NG = torch.ones(shape).half() if unit_scales else ((torch.rand(shape, generator=generator) - 0.5) * 0.02).half()
    zero_NG = None if symmetric else torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8).to(DEVICE)
    return pack(codes_NK, bits).to(DEVICE), scale_NG.to(DEVICE), zero_NG, bits, group_size


def codes(tokens, k_in, seed=2):
    """int8 activations in [-127, 127]: the first token all zero, the last all at the ends."""
    q_MK = torch.randint(-127, 128, (tokens, k_in), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    q_MK[0], q_MK[-1] = 0, 127
    q_MK[-1, ::2] = -127
    return q_MK.to(DEVICE)


def few_codes(tokens, k_in, seed=2):
    """Mid-rise codes of 4 bits in FP8, the last token all at an end: where code - zero has one sign, the largest sums there are."""
    q_MK = torch.randint(-8, 8, (tokens, k_in), generator=torch.Generator().manual_seed(seed)) * 2 + 1
    q_MK[0], q_MK[-1] = 0, 15
    return q_MK.to(torch.float8_e4m3fn).to(DEVICE)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "k_in"), [(0, 1000), (128, 512), (64, 192), (24, 100)])
def test_integers_held_in_fp8_are_exact(bits, symmetric, group_size, k_in):
    """As long as a float32 holds their sum; weights that FP8 cannot hold are multiplied in int8."""
    require_fp8()
    stored = layer(bits, group_size, symmetric, 37, k_in, unit_scales=True)
    if not symmetric:
        stored[2][:2] = 0  # the first row's code - zero is the largest there is
    for tokens in (FEW, MANY):
        arguments = (few_codes(tokens, k_in), torch.ones(tokens, 1, device=DEVICE), *stored, None, None, None, False, torch.float32)
        expected = wnan_naive.linear_wnan(*arguments)
        assert float(expected.abs().max()) < 2**24
        assert torch.equal(wnan_triton.linear_wnan(*arguments), expected)


def test_scales_and_epilogue_of_codes_in_fp8_are_those_of_int8():
    require_fp8()
    for act_grouped in (False, True):
        stored = layer(4, 64, True, 37, 192)
        for tokens in (FEW, MANY):
            q_MK, scale = few_codes(tokens, 192), torch.rand(tokens, 3 if act_grouped else 1, generator=torch.Generator().manual_seed(5))
            rest = (scale.to(DEVICE), *stored, *branches(tokens, 37, 5, torch.bfloat16), True, torch.bfloat16)
            y, expected = (wnan_triton.linear_wnan(q, *rest).float() for q in (q_MK, q_MK.to(torch.int8)))
            torch.testing.assert_close(y, expected, rtol=2 * output_error(torch.bfloat16), atol=1e-3)


def branches(tokens, n_out, rank, dtype, seed=3):
    """(bias_N, low, up_NR)."""
    generator = torch.Generator().manual_seed(seed)
    bias_N, low, up_NR = (torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
                          for shape in ((n_out,), (tokens, rank), (n_out, rank)))
    return (bias_N, low, up_NR) if rank else (bias_N, None, None)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 32, 24, 20])
def test_integers_are_exact(bits, symmetric, group_size):
    """Unit scales, sums below 2^24: float32 holds every partial result, so every order of summation gives the same."""
    n_out, k_in = 37, 100
    stored = layer(bits, group_size, symmetric, n_out, k_in, unit_scales=True)
    for tokens in (FEW, MANY):
        q_MK, one = codes(tokens, k_in), torch.ones(tokens, 1, device=DEVICE)
        arguments = (q_MK, one, *stored, None, None, None, False, torch.float32)
        expected = wnan_naive.linear_wnan(*arguments)
        assert float(expected.abs().max()) < 2**24
        assert torch.equal(wnan_triton.linear_wnan(*arguments), expected)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.sampled_from([1, 16, 17, 33, MANY]), n_out=st.integers(1, 70), k_in=st.integers(1, 140), bits=st.sampled_from(PACKED_BITS),
       group_size=st.sampled_from([0, 7, 32, 48, 128]), symmetric=st.booleans())
def test_integers_are_exact_in_any_shape(tokens, n_out, k_in, bits, group_size, symmetric):
    stored = layer(bits, group_size, symmetric, n_out, k_in, unit_scales=True)
    arguments = (codes(tokens, k_in), torch.ones(tokens, 1, device=DEVICE), *stored, None, None, None, False, torch.float32)
    assert torch.equal(wnan_triton.linear_wnan(*arguments), wnan_naive.linear_wnan(*arguments))


def exact_wnan(q, act_scale, packed_NP, scale_NG, zero_NG, bits, group_size):
    """float64 (product, sum of the magnitudes of its groups)."""
    sums_GMN = wnan_naive.group_sums(q.cpu(), packed_NP.cpu(), None if zero_NG is None else zero_NG.cpu(), bits, group_size, q.shape[-1])
    scale_MG = act_scale.cpu().double().expand(-1, len(sums_GMN))
    parts_GMN = sums_GMN.double() * scale_MG.T[:, :, None] * scale_NG.cpu().double().T[:, None, :]
    return parts_GMN.sum(0).to(DEVICE), parts_GMN.abs().sum(0).to(DEVICE)


def check(y, product, magnitude, terms, extra, gelu_after):
    """y against the float64 product plus (bias, low, up), where float32 sums `terms` terms of that magnitude."""
    bias_N, low, up_NR = (None if each is None else each.double() for each in extra)
    exact, magnitude = product + bias_N, magnitude + bias_N.abs()
    if low is not None:
        exact, magnitude, terms = exact + low @ up_NR.T, magnitude + low.abs() @ up_NR.abs().T, terms + low.shape[1]
    bound = (terms + 4) * UNIT * magnitude
    if gelu_after:  # slope at most 1.13; the exponential errs by a few units of its argument
        exact, bound = torch.nn.functional.gelu(exact, approximate="tanh"), 1.13 * bound + 8 * UNIT * exact.abs()
    assert bool(((y.double() - exact).abs() <= bound + output_error(y.dtype) * (exact.abs() + bound) + 2.0**-24).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_grouped", "rank", "gelu_after", "k_in"), [
    (4, 64, True, False, 0, False, 192), (8, 0, True, False, 5, True, 131), (3, 32, False, True, 17, True, 96),
    (8, 256, False, True, 0, True, 300)])
def test_linear_is_the_reference_up_to_rounding(dtype, bits, group_size, symmetric, act_grouped, rank, gelu_after, k_in):
    n_out = 37
    stored = layer(bits, group_size, symmetric, n_out, k_in)
    for tokens in (1, MANY):
        q_MK, groups = codes(tokens, k_in), stored[1].shape[1]
        act_scale = (torch.rand(tokens, groups if act_grouped else 1, generator=torch.Generator().manual_seed(5)) * 0.02).to(DEVICE)
        extra = branches(tokens, n_out, rank, dtype)
        y = wnan_triton.linear_wnan(q_MK, act_scale, *stored, *extra, gelu_after, dtype)
        assert y.shape == (tokens, n_out) and y.dtype == dtype
        check(y, *exact_wnan(q_MK, act_scale, *stored), groups, extra, gelu_after)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "rank", "gelu_after", "k_in"), [
    (2, 32, True, 0, False, 96), (3, 0, False, 5, True, 131), (4, 64, True, 0, True, 192), (6, 40, False, 17, False, 120),
    (8, 32, True, 0, False, 64)])
def test_float_activations_are_the_reference_up_to_rounding(dtype, bits, group_size, symmetric, rank, gelu_after, k_in):
    n_out = 37
    stored = layer(bits, group_size, symmetric, n_out, k_in)
    w_NK = wnan_naive.dequantize(*stored[:3], bits, group_size or None, k_in).double()
    x = signed(FEW, k_in, dtype=dtype)
    extra = branches(FEW, n_out, rank, dtype)
    y = wna16_triton.linear_wna16(x, *stored, *extra, gelu_after)
    check(y, x.double() @ w_NK.T, x.double().abs() @ w_NK.T.abs(), k_in, extra, gelu_after)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(3, 20, False), (8, 0, False), (4, 64, True)])
def test_many_float_activations_err_at_most_twice_the_working_precision(dtype, bits, group_size, symmetric):
    """Against float64, next to torch's own product of the weight rounded to the working type."""
    n_out, k_in = 37, 131
    stored = layer(bits, group_size, symmetric, n_out, k_in)
    w_NK = wnan_naive.dequantize(*stored[:3], bits, group_size or None, k_in)
    x = signed(MANY, k_in, dtype=dtype)
    bias_N, low, up_NR = branches(MANY, n_out, 5, dtype)
    exact = torch.nn.functional.gelu(x.double() @ w_NK.double().T + bias_N.double() + low.double() @ up_NR.double().T, approximate="tanh")
    working = torch.nn.functional.gelu(x @ w_NK.to(dtype).T + bias_N + low @ up_NR.T, approximate="tanh")
    y = wna16_triton.linear_wna16(x, *stored, bias_N, low, up_NR, True)
    allowed = 2 * (2 if dtype == torch.bfloat16 and gpu.interpreted() else 1)  # the interpreter cuts bfloat16 off
    assert float((y.double() - exact).norm()) <= allowed * float((working.double() - exact).norm())


def test_leading_dimensions_memory_layout_and_no_tokens():
    stored = layer(4, 32, True, 37, 64)
    q = codes(6, 64).view(2, 3, 64).transpose(0, 1)
    scale = torch.rand(3, 2, 1).to(DEVICE)
    arguments = (*stored, None, None, None, False)
    y = wnan_triton.linear_wnan(q, scale, *arguments, torch.float32)
    assert torch.equal(y, wnan_triton.linear_wnan(q.reshape(6, 64), scale.reshape(6, 1), *arguments, torch.float32).view(3, 2, 37))
    assert wnan_triton.linear_wnan(q[:0], scale[:0], *arguments, torch.bfloat16).shape == (0, 2, 37)
    assert wna16_triton.linear_wna16(torch.zeros(0, 64, device=DEVICE), *arguments).shape == (0, 37)
    branch = (torch.zeros(0, 5, device=DEVICE), torch.zeros(37, 5, device=DEVICE))
    assert wna16_triton.linear_wna16(torch.zeros(0, 64, device=DEVICE), *stored, None, *branch, True).shape == (0, 37)


def test_tensors_whose_sizes_disagree_are_refused_before_a_kernel_reads_them():
    packed_NP, scale_NG, zero_NG, bits, group_size = layer(4, 32, False, 37, 64)
    q_MK, one = codes(3, 64), torch.ones(3, 1, device=DEVICE)
    rest = (None, None, None, False, torch.float32)
    wrong = {"packed bytes": (q_MK, one, packed_NP[:, :-1], scale_NG, zero_NG, bits, group_size, *rest),
             "scales are": (q_MK, one, packed_NP, scale_NG[:, :-1], zero_NG, bits, group_size, *rest),
             "zero points are": (q_MK, one, packed_NP, scale_NG, zero_NG[1:], bits, group_size, *rest),
             "activation scales": (q_MK, one.expand(3, 5), packed_NP, scale_NG, zero_NG, bits, group_size, *rest),
             "bias": (q_MK, one, packed_NP, scale_NG, zero_NG, bits, group_size, one[0], *rest[1:]),
             "rank": (q_MK, one, packed_NP, scale_NG, zero_NG, bits, group_size, None, one, one, *rest[3:]),
             "cannot be packed": (q_MK, one, packed_NP, scale_NG, zero_NG, 5, group_size, *rest)}
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            wnan_triton.linear_wnan(*arguments)
