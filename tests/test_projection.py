"""Signed errors: the same replay as the sensitivity map, and factors that follow from how errors add up."""

import contextlib

import pytest
import torch

from tests.search.toys import make_layers, make_table
from workbench import projection, sensitivity, trace
from workbench.options import QuantConfig, SensitivityConfig, TraceConfig
from workbench.projection import LEAST_FACTOR, Projection, project, with_signs
from workbench.quant.quantize import solve_bank

QUANT = QuantConfig(solver="nearest", modulation_bits=16)
STEPS = 2


@pytest.fixture(scope="module")
def recorded(bundle):
    return trace.record(bundle, TraceConfig(prompts=("fluent red heart", "noto pizza"), steps=STEPS))


@pytest.fixture(scope="module")
def bank(bundle, recorded):
    return solve_bank(bundle, recorded, None, QUANT, (3, 6, 16))


def test_squares_of_the_signed_errors_are_the_directional_table(bundle, recorded, bank):
    config = SensitivityConfig(probes=2, seed=5)
    smap = sensitivity.profile(bundle, recorded, config, QUANT)
    signed = project(bundle, recorded, bank, probes=2, seed=5)
    widths = signed.act_TRSLC.shape[-1]
    squares_TLC = signed.act_TRSLC.double().square().mean((1, 2))
    torch.testing.assert_close(squares_TLC.float(), smap.directional_TLC[..., :widths], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(signed.adjoint_RSTMD, smap.adjoint_RSTMD)


def moved(bundle, recorded, bank, bits, share):
    """Final latent of the model whose weights are moved by a share of their quantization error; the model is put back."""
    linears = {layer.name: bundle.linear(layer.name) for layer in bundle.layers}
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    latent_SMD = recorded.latent_STMD[:, 0]
    try:
        for name, linear in linears.items():
            linear.weight.copy_(before[name] + share * (bank.effective_weight(name, bits) - before[name]))
        for step in range(STEPS):
            velocity_SMD = trace.forward(bundle, latent_SMD, recorded.schedule, step, recorded.conditioning)
            latent_SMD = bundle.advance(latent_SMD, velocity_SMD, recorded.schedule, step)
    finally:
        for name, linear in linears.items():
            linear.weight.copy_(before[name])
    return latent_SMD


def test_weight_errors_projected_and_summed_are_the_change_of_the_final_latent(bundle, recorded, bank, monkeypatch):
    """To first order: what the prediction leaves over is of second order, so an eighth of the error leaves about an eighth as large a
    share of the change; a fifth allows for the third order."""
    monkeypatch.setattr(projection, "fast_arithmetic", lambda bundle: contextlib.nullcontext())
    signed = project(bundle, recorded, bank, probes=8)
    predicted_RS = signed.weight_RSLC[..., signed.weight_bits_C.index(6)].sum(2)
    probe_RSMD = torch.randn((8, *recorded.target_STMD[:, 0].shape), generator=torch.Generator().manual_seed(1))

    def residual(share: float) -> float:
        change_SMD = (moved(bundle, recorded, bank, 6, share) - recorded.latent_STMD[:, -1]) / share
        measured_RS = (probe_RSMD * change_SMD).sum((2, 3))
        return float((predicted_RS - measured_RS).norm() / measured_RS.norm())

    whole, eighth = residual(1.0), residual(0.125)
    assert eighth < whole / 5


def make_projection(act_TRSLC, weight_RSLC, weight_bits_C=(4, 8)):
    return Projection(adjoint_RSTMD=torch.zeros(1), act_TRSLC=act_TRSLC, weight_RSLC=weight_RSLC, weight_bits_C=weight_bits_C,
                      model_hash="a toy model")


def test_errors_that_repeat_count_once_per_step_and_alternating_ones_cancel():
    table, layers = make_table(0), make_layers(3)  # 4 steps, 3 layers of one role, widths 3, 4, 8, 16
    same = torch.randn(2, 5, 3, 3).expand(4, 2, 5, 3, 3)
    predicted = table.weight_error_LC[:, [1, 2]].sqrt().expand(2, 5, 3, 2)
    repeated = with_signs(table, make_projection(same, predicted), layers)
    torch.testing.assert_close(repeated.error_TLC, table.error_TLC * 4)
    torch.testing.assert_close(repeated.weight_error_LC, table.weight_error_LC, rtol=1e-5, atol=1e-9)
    alternating = with_signs(table, make_projection(same * torch.tensor([1, -1, 1, -1.0])[:, None, None, None, None], predicted), layers)
    torch.testing.assert_close(alternating.error_TLC, table.error_TLC * LEAST_FACTOR)


def test_a_weight_that_errs_more_than_predicted_is_corrected_at_every_width():
    table, layers = make_table(0), make_layers(3)
    factor_L = torch.tensor([1.0, 9.0, 100.0])
    predicted = (table.weight_error_LC[:, [1, 2]] * factor_L[:, None]).sqrt().expand(2, 5, 3, 2)
    found = with_signs(table, make_projection(torch.randn(4, 2, 5, 3, 3), predicted), layers)
    torch.testing.assert_close(found.weight_error_LC, table.weight_error_LC * factor_L[:, None], rtol=1e-5, atol=1e-9)
    assert (found.error_TLC[..., -1] == 0).all()
