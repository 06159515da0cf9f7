"""GPTQ's theorems. Losses are recomputed here from the inputs themselves, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.options import BadInput
from workbench.plans import BitChoice
from workbench.quant import transforms
from workbench.quant.grids import dequantize, quantize_nearest
from workbench.quant.solvers import HessianSum, factorize, solve, solve_stack

BITS = (2, 3, 4, 6, 8)


def correlated(rows=600, k_in=96, seed=0):
    """Inputs with a decaying spectrum, signed, of different size by channel."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(k_in, k_in, generator=generator) * (0.93 ** torch.arange(k_in))[:, None]
    return torch.randn(rows, k_in, generator=generator) @ mix_KK + 0.1 * torch.randn(rows, k_in, generator=generator)


def weights(n_out=24, k_in=96, seed=1):
    return torch.randn(n_out, k_in, generator=torch.Generator().manual_seed(seed)) * 0.05


def hessian_of(x_MK, weight=1.0):
    total = HessianSum(x_MK.shape[1])
    total.update(x_MK, weight)
    return total.result()


def choices(*bits, group_size=32, symmetric=True):
    return [BitChoice(weight_bits=b, group_size=group_size, symmetric=symmetric) for b in bits]


def output_error(w_NK, stored, x_MK):
    delta_NK = dequantize(stored).double() - w_NK.double()
    return float((x_MK.double() @ delta_NK.T).square().sum())


def same(a, b):
    return torch.equal(a.packed_NP, b.packed_NP) and torch.equal(a.scale_NG, b.scale_NG)


@pytest.mark.parametrize("k_in", [5, 256, 600])
def test_hessian_is_the_weighted_sum_of_outer_products(k_in):
    parts = [(torch.randn(2, 30, k_in), weight) for weight in (0.5, 1.0, 3.0)]
    total = HessianSum(k_in)
    for x, weight in parts:
        total.update(x, weight)
    expected = sum(weight * x.flatten(0, 1).double().T @ x.flatten(0, 1).double() for x, weight in parts)
    torch.testing.assert_close(total.result().double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(total.result(), total.result().T)


def test_the_factor_is_the_cholesky_factor_of_the_inverse():
    h_KK = hessian_of(correlated()).double()
    factor = factorize(h_KK, 0.01)
    damped_KK = h_KK + 0.01 * h_KK.diagonal().mean() * torch.eye(96)
    upper_KK = torch.linalg.cholesky(torch.linalg.inv(damped_KK), upper=True)
    expected = (upper_KK / upper_KK.diagonal()[:, None]).triu(1)
    torch.testing.assert_close(factor.ratio_KK.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_identity_hessian_gives_nearest_rounding_bit_for_bit(group_size, symmetric):
    w_NK, wanted = weights(), choices(*BITS, group_size=group_size, symmetric=symmetric)
    for choice, (stored, report) in zip(wanted, solve(w_NK, 7.0 * torch.eye(96), wanted, clip=False)):
        assert same(stored, quantize_nearest(w_NK, choice))
        assert report.loss_solved == report.loss_rtn


@pytest.mark.parametrize("group_size", [32, None])
def test_identity_hessian_with_searched_scales_rounds_to_the_nearest_level(group_size):
    w_NK = weights()
    for bits, (stored, _) in zip(BITS, solve(w_NK, torch.eye(96), choices(*BITS, group_size=group_size))):
        scale_NK = stored.scale_NG.float().repeat_interleave(group_size or 96, 1)
        nearest_NK = (w_NK / scale_NK).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale_NK
        assert torch.equal(dequantize(stored), nearest_NK)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_units_of_the_hessian_do_not_matter(scale):
    x_MK = correlated()
    x_MK[:, [3, 40]] = 0
    h_KK, w_NK = hessian_of(x_MK).double(), weights()  # in float64, so that scaling rounds far below a code's width
    for (a, _), (b, report) in zip(solve(w_NK, h_KK, choices(*BITS)), solve(w_NK, scale * h_KK, choices(*BITS))):
        assert report.dead_channels == 2
        assert same(a, b)


def test_a_small_hessian_with_a_dead_channel_still_compensates():
    x_MK = correlated() * 1e-4
    x_MK[:, 7] = 0
    [(stored, report)] = solve(weights(), hessian_of(x_MK), choices(3))
    assert report.loss_solved < 0.5 * report.loss_rtn
    assert not same(stored, quantize_nearest(weights(), choices(3)[0]))


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("clip", [False, True])
def test_output_error_is_below_nearest_rounding_on_correlated_inputs(group_size, clip):
    x_MK, w_NK = correlated(), weights()
    wanted = choices(*BITS, group_size=group_size)
    for choice, (stored, report) in zip(wanted, solve(w_NK, hessian_of(x_MK), wanted, clip=clip)):
        solved, rtn = output_error(w_NK, stored, x_MK), output_error(w_NK, quantize_nearest(w_NK, choice), x_MK)
        assert solved < 0.7 * rtn
        assert report.loss_solved == pytest.approx(solved, rel=1e-3)
        assert report.loss_rtn == pytest.approx(rtn, rel=1e-3)


def test_searched_scales_lower_the_loss_of_narrow_weights():
    h_KK, w_NK = hessian_of(correlated()), weights()
    plain, searched = (solve(w_NK, h_KK, choices(2, 3), clip=clip) for clip in (False, True))
    for (_, before), (_, after) in zip(plain, searched):
        assert after.loss_solved < 0.9 * before.loss_solved


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), k_in=st.integers(4, 40), clip=st.booleans(),
       bits=st.sampled_from(BITS))
def test_the_solved_loss_is_never_above_nearest_rounding(seed, rows, k_in, clip, bits):
    x_MK = correlated(rows, k_in, seed)  # with fewer rows than features the Hessian is singular
    w_NK = weights(1, k_in, seed)  # one row: the greedy walk alone is worse for about one row in ten
    [(stored, report)] = solve(w_NK, hessian_of(x_MK), choices(bits), clip=clip)
    rtn = output_error(w_NK, quantize_nearest(w_NK, choices(bits)[0]), x_MK)
    assert output_error(w_NK, stored, x_MK) <= rtn * (1 + 1e-3)
    assert report.loss_solved <= report.loss_rtn and not report.note


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), k_in=st.integers(2, 6))
def test_two_bit_solutions_never_beat_brute_force(seed, k_in):
    x_MK, w_NK = correlated(30, k_in, seed), weights(1, k_in, seed)
    [(stored, _)] = solve(w_NK, hessian_of(x_MK), choices(2))
    every_CK = torch.tensor(list(itertools.product(range(-2, 2), repeat=k_in))).double() * float(stored.scale_NG[0, 0])
    best = float((x_MK.double() @ (every_CK - w_NK.double()).T).square().sum(0).min())
    assert output_error(w_NK, stored, x_MK) >= best * (1 - 1e-9)


def by_normal_equations(w_NK, h_KK, scale_N, bits, damping):
    """GPTQ from its definition, without a factorization: quantize a column, then give the columns still free the values that
    minimise the loss in closed form, and so on."""
    h = h_KK.double() + damping * h_KK.double().diagonal().mean() * torch.eye(len(h_KK), dtype=torch.float64)
    w, free = w_NK.double(), w_NK.double().clone()
    q = torch.zeros_like(w)
    for i in range(w.shape[1]):
        codes_N = (free[:, i].float() / scale_N).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        q[:, i] = codes_N.double() * scale_N.double()
        done, rest = slice(0, i + 1), slice(i + 1, None)
        if i + 1 < w.shape[1]:  # min over d_rest of (d_done, d_rest) H (d_done, d_rest)^T, with d_done = q - w fixed
            error_N = q[:, done] - w[:, done]
            free[:, rest] = w[:, rest] - torch.linalg.solve(h[rest, rest], h[rest, done] @ error_N.T).T
    return q


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_the_closed_form_solution_column_by_column(bits):
    x_MK, w_NK = correlated(200, 24), weights(16, 24)
    h_KK = hessian_of(x_MK)
    [(stored, _)] = solve(w_NK, h_KK, choices(bits, group_size=None), clip=False)
    expected = by_normal_equations(w_NK, h_KK, stored.scale_NG[:, 0].float(), bits, 0.01)
    rounded = dequantize(quantize_nearest(w_NK, choices(bits, group_size=None)[0])).double()
    kept_rounding_N = (rounded - dequantize(stored).double()).abs().amax(1) == 0  # rows where the greedy walk lost
    same_N = (expected - dequantize(stored).double()).abs().amax(1) < 1e-6
    assert bool((same_N | kept_rounding_N).all()) and int(same_N.sum()) >= 12


def test_searched_scales_alone_are_never_worse_than_the_largest_magnitude():
    x_MK, w_NK = correlated(), weights()
    for bits, (stored, report) in zip(BITS, solve(w_NK, hessian_of(x_MK), choices(*BITS), solver="clip")):
        rtn = output_error(w_NK, quantize_nearest(w_NK, choices(bits)[0]), x_MK)
        assert report.loss_solved == pytest.approx(output_error(w_NK, stored, x_MK), rel=1e-3)
        assert report.loss_solved < 0.95 * rtn if bits < 4 else report.loss_solved <= rtn * (1 + 1e-3)
        scale_NK = stored.scale_NG.float().repeat_interleave(32, 1)
        nearest_NK = (w_NK / scale_NK).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale_NK
        assert torch.equal(dequantize(stored), nearest_NK), "it is nearest rounding, on other scales"


def test_constant_calibration_weights_equal_none():
    x_MK, w_NK = correlated(), weights()
    for (a, _), (b, _) in zip(solve(w_NK, hessian_of(x_MK), choices(*BITS)), solve(w_NK, hessian_of(x_MK, 0.25), choices(*BITS))):
        assert same(a, b)


def test_rows_that_weigh_more_are_served_better():
    first, second = correlated(seed=0), correlated(seed=9)
    total = HessianSum(96)
    total.update(first, 100.0)
    total.update(second, 0.01)
    [(for_first, _)] = solve(weights(), total.result(), choices(3))
    [(for_both, _)] = solve(weights(), hessian_of(torch.cat([first, second])), choices(3))
    assert output_error(weights(), for_first, first) < output_error(weights(), for_both, first)
    assert output_error(weights(), for_first, second) > output_error(weights(), for_both, second)


@pytest.mark.parametrize("n_out", [1, 2])
def test_solving_leaves_the_weight_alone_and_reports_the_loss_of_what_it_stores(n_out):
    x_MK, w_NK = correlated(4, 4, 1), weights(n_out, 4, 1)
    before = w_NK.clone()
    [(stored, report)] = solve(w_NK, hessian_of(x_MK), choices(6), clip=False)
    assert torch.equal(w_NK, before)
    assert report.loss_solved == pytest.approx(output_error(w_NK, stored, x_MK), rel=1e-3)


def test_layers_solved_together_are_what_they_are_alone():
    h_KK, w_q, w_k = hessian_of(correlated()), weights(20, seed=1), weights(12, seed=2)
    stacked = solve_stack({"q": w_q, "k": w_k}, h_KK, choices(2, 4))
    for name, w_NK in (("q", w_q), ("k", w_k)):
        for (a, report_a), (b, report_b) in zip(stacked[name], solve(w_NK, h_KK, choices(2, 4), layer_name=name)):
            assert report_a.layer == report_b.layer == name and a.packed_NP.shape == b.packed_NP.shape
            assert report_a.loss_solved == pytest.approx(report_b.loss_solved, rel=1e-2)
            assert float((a.packed_NP == b.packed_NP).float().mean()) > 0.98


def test_results_come_in_the_order_of_the_choices():
    mixed = [*choices(8, 2), *choices(4, group_size=None), *choices(3, symmetric=False)]
    for choice, (stored, _) in zip(mixed, solve(weights(), hessian_of(correlated()), mixed)):
        assert (stored.bits, stored.group_size) == (choice.weight_bits, choice.group_size)
        assert (stored.zero_NG is None) == choice.symmetric


def test_an_indefinite_hessian_raises_the_damping_and_says_so():
    h_KK = hessian_of(correlated())
    values, vectors = torch.linalg.eigh(h_KK)
    values[0] = -0.05 * h_KK.diagonal().mean()
    [(_, report)] = solve(weights(), (vectors * values) @ vectors.T, choices(4))
    assert report.damping == pytest.approx(0.1) and "damping raised from 0.01 to 0.1" in report.note


def test_a_hopeless_hessian_is_refused():
    h_KK = torch.eye(96)
    h_KK[0, 1] = h_KK[1, 0] = 1e9
    with pytest.raises(BadInput, match="not positive definite even with damping"):
        solve(weights(), h_KK, choices(4))


def test_an_input_that_is_always_zero_is_rounded_to_nearest():
    [(stored, report)] = solve(weights(), torch.zeros(96, 96), choices(4), clip=False)
    assert same(stored, quantize_nearest(weights(), choices(4)[0]))
    assert (report.loss_solved, report.dead_channels) == (0.0, 96)


@pytest.mark.parametrize("broken", ["weight", "hessian"])
def test_nan_is_refused(broken):
    w_NK, h_KK = weights(), hessian_of(correlated())
    (w_NK if broken == "weight" else h_KK)[0, 0] = float("nan")
    with pytest.raises(BadInput, match="holds NaN or infinity"):
        solve(w_NK, h_KK, choices(4))


def test_nearest_solver_is_nearest_rounding_whatever_the_hessian():
    [(stored, report)] = solve(weights(), hessian_of(correlated()), choices(4), solver="nearest")
    assert same(stored, quantize_nearest(weights(), choices(4)[0])) and report.loss_solved == report.loss_rtn


def test_hadamard_then_gptq_serves_the_untransformed_layer():
    x_MK, w_NK, transform = correlated(k_in=64), weights(k_in=64), transforms.make("hadamard", 64, 0)
    [(stored, report)] = solve(transform.weight(w_NK), transform.hessian(hessian_of(x_MK)), choices(4))
    delta_NK = transform.inverse(dequantize(stored)) - w_NK
    assert float((x_MK @ delta_NK.T).square().sum()) == pytest.approx(report.loss_solved, rel=1e-3)
