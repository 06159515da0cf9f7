"""Sensitivity against finite differences in float64, and the arithmetic of alpha and of the distortion table."""

import dataclasses

import pytest
import torch

from workbench import sensitivity, trace
from workbench.models import sources
from workbench.options import ACT_BITS, ModelSpec, QuantConfig, SensitivityConfig, TraceConfig
from workbench.quant.transforms import make

STEPS, QUANT = 3, QuantConfig()


@pytest.fixture(scope="module", autouse=True)
def all_digits():
    """Rotary embeddings and the quantizer work in float32; a finite difference would measure that rounding."""
    to_float32 = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float32(x))
        yield


@pytest.fixture(scope="module")
def exact_bundle():
    """The embedded model in float64: finite differences need it."""
    bundle = sources.load(ModelSpec())
    bundle.transformer.double()
    bundle.dtype = torch.float64
    torch.manual_seed(0)
    for parameter in bundle.transformer.parameters():
        if not bool(parameter.any()):  # layers that training starts at zero would make every slope zero
            parameter.normal_(std=0.05)
    return bundle


@pytest.fixture(scope="module")
def exact_trace(exact_bundle):
    recorded = trace.record(exact_bundle, TraceConfig(prompts=("fluent red heart",), steps=STEPS, seed=3))
    latent = recorded.latent_STMD[:, :1].double()
    latents, targets = [latent[:, 0]], []
    for step in range(STEPS):  # advance() is float32 by contract; the differences below need all digits
        targets.append(trace.forward(exact_bundle, latents[-1], recorded.schedule, step, recorded.conditioning))
        latents.append(latents[-1] + (recorded.schedule.sigma_T1[step + 1] - recorded.schedule.sigma_T1[step]).double() * targets[-1])
    return dataclasses.replace(recorded, latent_STMD=torch.stack(latents, 1), target_STMD=torch.stack(targets, 1))


def _final_latent(bundle, recorded, step, layer, delta_SMN, eps):
    """The rollout from `step` on, with eps * delta added to one layer's output at that step."""
    latent = recorded.latent_STMD[:, step]
    outputs = []
    for t in range(step, STEPS):
        hook = bundle.linear(layer.name).register_forward_hook(lambda _m, _a, y: y + eps * delta_SMN) if t == step else None
        velocity = trace.forward(bundle, latent, recorded.schedule, t, recorded.conditioning)
        if hook:
            hook.remove()
        outputs.append(velocity)
        latent = latent + (recorded.schedule.sigma_T1[t + 1] - recorded.schedule.sigma_T1[t]).double() * velocity
    return latent, outputs[0]


def _quantization_error(bundle, recorded, step, layer, bits):
    seen = []
    hook = bundle.linear(layer.name).register_forward_hook(lambda _m, args, _y: seen.append(args[0]))
    trace.forward(bundle, recorded.latent_STMD[:, step], recorded.schedule, step, recorded.conditioning)
    hook.remove()
    transform = make(QUANT.transform, layer.k_in, QUANT.seed)
    rotated = transform.forward(seen[0])
    rounded = sensitivity.fake_quantize(rotated, bits, sensitivity.format_of(QUANT, QUANT.group_size))
    return (rounded - rotated) @ transform.weight(bundle.linear(layer.name).weight).T


@pytest.mark.parametrize("estimator", ["adjoint", "local"])
def test_directional_table_equals_finite_differences(exact_bundle, exact_trace, estimator):
    config = SensitivityConfig(estimator=estimator, probes=1, seed=5)
    smap = sensitivity.profile(exact_bundle, exact_trace, config, QUANT)
    probe = torch.randn((1, *exact_trace.target_STMD[:, 0].shape), generator=torch.Generator().manual_seed(5), dtype=torch.float64)[0]
    assert ACT_BITS[1] == 4
    for step, index in [(0, 0), (0, 30), (1, 3), (1, 53), (2, 11), (2, 24)]:
        layer = exact_bundle.layers[index]
        delta = _quantization_error(exact_bundle, exact_trace, step, layer, 4)
        eps = 1e-4
        plus, plus_now = _final_latent(exact_bundle, exact_trace, step, layer, delta, eps)
        minus, minus_now = _final_latent(exact_bundle, exact_trace, step, layer, delta, -eps)
        difference = (plus - minus) if estimator == "adjoint" else (plus_now - minus_now)
        slope = float((probe * difference).sum()) / (2 * eps)
        assert slope != 0
        assert float(smap.directional_TLC[step, index, 1]) == pytest.approx(slope**2, rel=1e-4), (step, layer.name)


def test_fisher_of_the_last_layers_output_is_known_in_closed_form(exact_bundle, exact_trace):
    """The adjoint kept for the last step is the probe itself, since nothing follows it."""
    smap = sensitivity.profile(exact_bundle, exact_trace, SensitivityConfig(probes=2, seed=1), QUANT)
    probe = torch.randn((2, *exact_trace.target_STMD[:, 0].shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(smap.adjoint_RSTMD[:, :, -1], probe)
    assert smap.fisher_TL.shape == (STEPS, len(exact_bundle.layers))
    assert float(smap.directional_TLC[..., -1].abs().max()) == 0.0


def test_errors_shrink_with_bits_and_absmax_is_positive(exact_bundle, exact_trace):
    smap = sensitivity.profile(exact_bundle, exact_trace, SensitivityConfig(probes=1), QUANT)
    squared = smap.squared_error_TLC
    assert bool((squared[..., 0] > squared[..., 1]).all() and (squared[..., 1] > squared[..., 3]).all())
    assert bool((smap.act_absmax_TL > 0).all())


@pytest.mark.parametrize("weighting", ["softmax", "linear", "sqrt", "uniform"])
def test_alpha_has_mean_one_and_respects_the_cap(weighting):
    fisher = torch.rand(20, 7).pow(6) * 1e-9
    fisher[:, 3] = 0  # a layer nothing depends on
    alpha = sensitivity.calibration_weights(fisher, SensitivityConfig(weighting=weighting, cap=5, tau=0.2))
    assert torch.allclose(alpha.mean(0), torch.ones(7), atol=1e-5)
    assert float((alpha.amax(0) / alpha.amin(0)).max()) <= 5.001
    if weighting != "uniform":
        assert float((alpha.amax(0) / alpha.amin(0))[:3].min()) > 1.5
    assert torch.allclose(alpha[:, 3], torch.ones(20))


def test_alpha_ignores_the_scale_of_fisher_and_tends_to_uniform():
    fisher = torch.rand(10, 4) + 0.1
    config = SensitivityConfig(tau=1.0)
    alpha, scaled = (sensitivity.calibration_weights(f, config) for f in (fisher, fisher * 1e-8))
    assert torch.allclose(alpha, scaled, rtol=1e-4)
    flat = sensitivity.calibration_weights(fisher, SensitivityConfig(tau=100.0))
    assert float((flat - 1).abs().max()) < 0.05


def test_table_is_white_error_times_one_factor_per_step_and_layer(exact_bundle, exact_trace):
    smap = sensitivity.profile(exact_bundle, exact_trace, SensitivityConfig(probes=1), QUANT)
    loss = torch.ones(len(smap.layers), 2)
    directional = sensitivity.tabulate(smap, (4, 16), loss).error_TLC
    white_config = SensitivityConfig(probes=1, distortion="white")
    white = sensitivity.tabulate(dataclasses.replace(smap, config=white_config), (4, 16), loss).error_TLC
    ratio = (directional / white)[..., :-1]
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3)
    layer = smap.layers[5]
    by_hand = smap.fisher_TL[1, 5] * smap.squared_error_TLC[1, 5, 0] * layer.tokens / layer.n_out
    assert float(white[1, 5, 0]) == pytest.approx(float(by_hand), rel=1e-5)
