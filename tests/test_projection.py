"""Signed errors: the same replay as the sensitivity map, and factors that follow from how errors add up."""

import pytest
import torch

from tests.search.toys import make_layers, make_table
from workbench import pipeline, sensitivity, trace
from workbench.options import QuantConfig, SensitivityConfig, TraceConfig
from workbench.projection import LEAST_FACTOR, Projection, project, with_signs
from workbench.quant.quantize import solve_bank
from workbench.rollout import Rollout

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


def test_weight_errors_projected_and_summed_are_the_change_of_the_final_latent(bundle, recorded, bank):
    """To first order: 6-bit weights change a layer by 1.5 % (rounding at 1/31 of the largest of 64 values), gradients are bfloat16."""
    signed = project(bundle, recorded, bank, probes=8)
    plan = pipeline.uniform_plan(bundle, QUANT, pipeline.sigma_of(recorded), 6, 16)
    with Rollout(bundle, recorded, lambda bits_L: pipeline.build(bundle, bank, plan), samples=2, scoring="raw") as rollout:
        rollout.use_weights(plan.weight_bits_L)
        state = rollout.start()
        for step, row in enumerate(plan.act_bits_TL):
            state = rollout.extend(state, step, row)
    generator = torch.Generator().manual_seed(1)
    probe_RSMD = torch.randn((8, *state.shape), generator=generator)
    measured_RS = (probe_RSMD * (state - recorded.latent_STMD[:, -1])).sum((2, 3))
    predicted_RS = signed.weight_RSLC[..., signed.weight_bits_C.index(6)].sum(2)
    residual = (predicted_RS - measured_RS).norm() / measured_RS.norm()
    assert residual < 0.1


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
