"""What a replay tells, against inputs recorded without the code under test."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.quant.test_quantize import inputs_of
from tests.quant.toy import solve
from workbench.options import BadInput, QuantConfig
from workbench.quant import calibration, smoothing, transforms
from workbench.quant.calibration import input_groups

SMOOTH = QuantConfig(transform="smooth", smooth_alpha=0.3)


def quantizable(bundle):
    """Groups of layers with activation bits that read one tensor."""
    return [group for group in input_groups(bundle.layers) if group[0].has_act_bits]


def by_step(bundle, trace):
    """Every layer's input at every step, x_TMK by layer name."""
    return {name: torch.stack(rows) for name, rows in inputs_of(bundle, trace).items()}


def test_smoothing_uses_the_largest_magnitudes_over_all_steps_and_layers_of_an_input(toy, toy_trace):
    fitted, inputs = calibration.fit_transforms(toy, toy_trace, SMOOTH, 4), by_step(toy, toy_trace)
    for group in quantizable(toy):
        w_NK = torch.cat([toy.weight(layer) for layer in group])
        expected_K = smoothing.vector(inputs[group[0].name].abs().amax((0, 1)), w_NK.abs().amax(0), 0.3, 0.7)
        assert all(fitted[layer.name] is fitted[group[0].name] for layer in group)
        assert torch.equal(fitted[group[0].name].smooth_K, expected_K)


def test_searched_smoothing_is_never_worse_than_none_on_the_rows_it_sees(toy, toy_trace):
    quant = QuantConfig(transform="smooth", smoothing="search", solver="nearest", group_size=None)
    fitted, inputs = calibration.fit_transforms(toy, toy_trace, quant, 4), inputs_of(toy, toy_trace)
    for group in quantizable(toy):
        x_MK = torch.cat(inputs[group[0].name])
        w_NK = torch.cat([toy.weight(layer).detach() for layer in group])

        def error(transform, x_MK=x_MK, w_NK=w_NK):
            from workbench.plans import BitChoice
            from workbench.quant.activations import fake_quantize
            from workbench.quant.grids import dequantize, quantize_nearest

            rounded = dequantize(quantize_nearest(transform.weight(w_NK), BitChoice(weight_bits=4, group_size=None)))
            return float((fake_quantize(transform.forward(x_MK), 4) @ rounded.T - x_MK @ w_NK.T).square().sum())

        # a toy this small is seen whole, so the promise holds on all its rows
        assert error(fitted[group[0].name]) <= error(transforms.make("none", group[0].k_in, 0)) * (1 + 1e-5)


def test_what_needs_no_replay_makes_none(toy, toy_trace):
    seen = []
    fitted = calibration.fit_transforms(toy, toy_trace, QuantConfig(), 4, on_progress=seen.append)
    assert not seen and {fitted[layer.name].name for layer in toy.layers if layer.has_act_bits} == {"hadamard"}
    assert {fitted[layer.name].name for layer in toy.modulation} == {"none"}
    solve(toy, toy_trace, None, QuantConfig(solver="nearest", hessian="none", transform="none"), (4,), on_progress=seen.append)
    assert all("solved" in progress.message for progress in seen)


def test_static_ranges_are_those_of_the_whole_trace(toy, toy_trace):
    quant = QuantConfig(act_scale="tensor")
    fitted = calibration.fit_transforms(toy, toy_trace, quant, 4)
    ranges, inputs = calibration.static_ranges(toy, toy_trace, fitted), inputs_of(toy, toy_trace)
    for layer in (layer for layer in toy.layers if layer.has_act_bits):
        y_MK = fitted[layer.name].forward(torch.cat(inputs[layer.name]))
        expected_2 = torch.stack([y_MK.min(), y_MK.max()])
        torch.testing.assert_close(ranges[layer.name].float(), expected_2, rtol=2**-10, atol=1e-6)


def test_spearman_weights_are_the_published_ones(toy, toy_trace):
    alpha_TL, inputs = calibration.spearman_weights(toy, toy_trace), by_step(toy, toy_trace)
    for group in input_groups(toy.layers):
        w_K = torch.cat([toy.weight(layer) for layer in group]).abs().amax(0).detach().numpy()
        x_TK = inputs[group[0].name].abs().amax(1).numpy()
        rho_T = np.array([spearmanr(x_K, w_K).statistic for x_K in x_TK])
        eta_T = np.exp(-rho_T) / np.exp(-rho_T).sum()
        for layer in group:
            np.testing.assert_allclose(alpha_TL[:, layer.index].numpy(), 3 * eta_T, rtol=1e-5)
    torch.testing.assert_close(alpha_TL.mean(0), torch.ones(len(toy.layers)))


def test_the_hessian_weighting_is_what_the_options_say(toy, toy_trace):
    shape = (toy_trace.steps, len(toy.layers))
    alpha_TL = torch.tensor([2.5, 0.4, 0.1])[:, None].expand(shape)
    codes = {}
    for hessian in ("fisher", "ssc", "uniform", "none"):
        bank = solve(toy, toy_trace, alpha_TL, QuantConfig(group_size=32, hessian=hessian), (3,))
        codes[hessian] = torch.cat([bank.weights[layer.name, 3].packed_NP.flatten() for layer in toy.layers])
    ssc = solve(toy, toy_trace, calibration.spearman_weights(toy, toy_trace), QuantConfig(group_size=32), (3,))
    assert torch.equal(codes["ssc"], torch.cat([ssc.weights[layer.name, 3].packed_NP.flatten() for layer in toy.layers]))
    kinds = list(codes.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i])


def test_a_trace_of_another_model_is_refused(toy, toy_trace):
    toy.model_hash = "another"
    for verb in (lambda: calibration.spearman_weights(toy, toy_trace), lambda: calibration.fit_transforms(toy, toy_trace, SMOOTH, 4)):
        with pytest.raises(BadInput, match="the trace belongs to"):
            verb()


@pytest.mark.parametrize(("widths", "bits"), [((4,), 4), ((3, 16), 3), ((2, 3, 4, 8, 16), 4), ((16,), 16), ((8,), 8)])
def test_what_widths_share_is_searched_for_the_only_one_or_a_typical_one(widths, bits):
    assert calibration.reference_bits(widths) == (4 if widths == (16,) else bits)
