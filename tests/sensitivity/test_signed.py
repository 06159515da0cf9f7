"""Signed errors: the same replay as the sensitivity map, and factors that follow from how errors add up."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

from tests.quant.toy import solve
from tests.search.toys import make_layers, make_table
from workbench import sensitivity
from workbench.models.denoiser import denoise
from workbench.models.tree import with_modules
from workbench.options import QuantConfig, SensitivityConfig, TraceConfig
from workbench.replay import backward
from workbench.replay.trace import record
from workbench.sensitivity.signed import LEAST_FACTOR, SignedErrors, project, with_signs

QUANT = QuantConfig(solver="nearest", modulation_bits=16)
STEPS = 2


@pytest.fixture(scope="module")
def recorded(bundle):
    return record(bundle, TraceConfig(prompts=("fluent red heart", "noto pizza"), steps=STEPS))


@pytest.fixture(scope="module")
def bank(bundle, recorded):
    return solve(bundle, recorded, None, QUANT, (3, 6, 16))


def test_squares_of_the_signed_errors_are_the_directional_table(bundle, recorded, bank):
    config = SensitivityConfig(probes=2, seed=5)
    smap = sensitivity.profile(bundle, recorded, config, QUANT)
    signed = project(bundle, recorded, bank, probes=2, seed=5)
    widths = signed.act_TRSLC.shape[-1]
    squares_TLC = signed.act_TRSLC.double().square().mean((1, 2))
    torch.testing.assert_close(squares_TLC.float(), smap.directional_TLC[..., :widths], rtol=1e-3, atol=1e-9)
    assert len(signed.costates_T) == STEPS and all(len(parts) == 1 for parts in signed.costates_T)  # Euler's state is its latent
    probe = torch.randn((2, *recorded.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(5))
    assert torch.equal(signed.costates_T[-1][0], probe), "nothing follows the last step"


def moved(bundle, recorded, bank, bits, share):
    """Final latent of a model whose weights are moved by a share of their quantization error."""
    layers = {}
    for layer in bundle.layers:
        before = bundle.linear(layer)
        layers[layer.name] = torch.nn.Linear(layer.k_in, layer.n_out).requires_grad_(False)
        layers[layer.name].weight.copy_(before.weight + share * (bank.effective_weight(layer.name, bits) - before.weight))
        layers[layer.name].bias.copy_(before.bias)
    modules = {"transformer": with_modules(bundle.transformer, layers)}
    model = SimpleNamespace(predictor=functools.partial(bundle.predictor, modules=modules))
    return denoise(model, recorded.integrator, recorded.latent_ST[:, 0], recorded.conditioning)


def test_weight_errors_projected_and_summed_are_the_change_of_the_final_latent(bundle, recorded, bank, monkeypatch):
    """To first order: what the prediction leaves over is of second order, so an eighth of the error leaves about an eighth as large a
    share of the change; a fifth allows for the third order."""
    monkeypatch.setattr(backward, "fast_arithmetic", lambda bundle: contextlib.nullcontext())
    signed = project(bundle, recorded, bank, probes=8)
    predicted_RS = signed.weight_RSLC[..., signed.weight_bits_C.index(6)].sum(2)
    probe_R = torch.randn((8, *recorded.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(1))

    def residual(share: float) -> float:
        change = (moved(bundle, recorded, bank, 6, share) - recorded.latent_ST[:, -1]) / share
        measured_RS = (probe_R * change).sum((2, 3))
        return float((predicted_RS - measured_RS).norm() / measured_RS.norm())

    whole, eighth = residual(1.0), residual(0.125)
    assert eighth < whole / 5


def make_projection(act_TRSLC, weight_RSLC, weight_bits_C=(4, 8)):
    return SignedErrors(costates_T=(), act_TRSLC=act_TRSLC, weight_RSLC=weight_RSLC, weight_bits_C=weight_bits_C,
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
