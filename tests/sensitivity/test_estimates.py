"""What estimates rest on: samples, not probes; tokens from everywhere."""

import pytest
import torch

from workbench import sensitivity
from workbench.options import QuantConfig, SensitivityConfig, TraceConfig
from workbench.replay.backward import backward
from workbench.replay.trace import record
from workbench.sensitivity import fisher


def test_standard_errors_are_over_samples_whose_probes_are_one_observation(bundle):
    """Four samples, each the same twice over: probes of one picture are no independent witnesses."""
    prompts = ("noto pizza", "fluent rocket", "twemoji red heart", "noto turtle")
    recorded = record(bundle, TraceConfig(prompts=prompts, steps=2))
    probes, quant = 3, QuantConfig()
    probe = torch.randn((probes, *recorded.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(0))
    visitor = fisher.Fisher(bundle, recorded, quant, {})
    backward(bundle, recorded, probe, [visitor])
    found, values_RS = visitor.result(), torch.cat(visitor._fisher[1, 7], 1)
    assert values_RS.shape == (probes, 4)
    assert float(found["stderr"][1, 7]) == pytest.approx(float(values_RS.mean(0).std() / 2), rel=1e-5)
    alone = sensitivity.profile(bundle, record(bundle, TraceConfig(prompts=prompts[:1], steps=2)), SensitivityConfig(), quant)
    assert alone.stderr_TL is None


def test_the_tokens_that_estimate_an_error_come_from_everywhere(bundle):
    """Errors in one column of the image alone: a stride of the row's length sees all of them or none."""
    visitor = fisher.Fisher(bundle, record(bundle, TraceConfig(prompts=("noto pizza",), steps=1)), QuantConfig(), {})
    tokens, side, weight_NK = 64 * 64, 64, torch.eye(4)
    delta_CSMK = torch.zeros(1, 1, tokens, 4)
    delta_CSMK[:, :, ::side] = 1.0  # a share of 1/64 of the tokens
    estimates = torch.stack([visitor._squared(delta_CSMK, weight_NK, step) for step in range(200)])
    assert float(estimates.mean()) == pytest.approx(4 / side, rel=0.15) and float(estimates.max()) < 10 * 4 / side
