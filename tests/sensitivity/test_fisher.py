"""Sensitivity against finite differences in float64, and the arithmetic of alpha and of the distortion table."""

import dataclasses

import pytest
import torch

from workbench import sensitivity
from workbench.models import sources
from workbench.models.integrator import State
from workbench.models.tree import clone_tree
from workbench.options import ACT_BITS, ModelSpec, QuantConfig, SensitivityConfig
from workbench.quant.activations import fake_quantize, format_of
from workbench.quant.transforms import make
from workbench.replay.trace import Trace

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
    bundle = sources.load(ModelSpec()).in_dtype(torch.float64)
    torch.manual_seed(0)
    for parameter in bundle.transformer.parameters():
        if not bool(parameter.any()):  # layers that training starts at zero would make every slope zero
            parameter.normal_(std=0.05)
    return bundle


@pytest.fixture(scope="module")
def exact_trace(exact_bundle):
    """Two samples from float64 noise: the latents keep all digits."""
    integrator, conditioning = exact_bundle.integrator(STEPS), exact_bundle.encode(("fluent red heart",))
    latents, outputs = [exact_bundle.noise([3]).double()], []
    predict = exact_bundle.predictor(integrator, conditioning)
    with torch.no_grad():
        for step in range(STEPS):
            outputs.append(predict(latents[-1], step))
            latents.append(integrator.advance(State((latents[-1],)), outputs[-1], step).latent)
    return Trace(integrator=integrator, latent_ST=torch.stack(latents, 1), output_ST=torch.stack(outputs, 1), conditioning=conditioning,
                 prompts=("fluent red heart",), seeds=(3,), model_hash=exact_bundle.model_hash, tokens=exact_bundle.tokens)


def hooked(bundle, layer, hook):
    """A tree of the model whose layer has a forward hook."""
    tree = clone_tree(bundle.transformer)
    tree.get_submodule(layer.module_name).register_forward_hook(hook)
    return {"transformer": tree}


@torch.no_grad()
def _final_latent(bundle, recorded, step, layer, delta_SMN, eps):
    """(the end of the rollout from `step` on, its output there), with eps * delta added to one layer's output at that step."""
    moved = hooked(bundle, layer, lambda _m, _a, y: y + eps * delta_SMN)
    latent, outputs, integrator = recorded.latent_ST[:, step], [], recorded.integrator
    for t in range(step, STEPS):
        predict = bundle.predictor(integrator, recorded.conditioning, modules=moved if t == step else None)
        outputs.append(predict(latent, t))
        latent = integrator.advance(State((latent,)), outputs[-1], t).latent
    return latent, outputs[0]


@torch.no_grad()
def _quantization_error(bundle, recorded, step, layer, bits):
    seen = []
    modules = hooked(bundle, layer, lambda _m, args, _y: seen.append(args[0]))
    bundle.predictor(recorded.integrator, recorded.conditioning, modules=modules)(recorded.latent_ST[:, step], step)
    transform = make(QUANT.transform, layer.k_in, QUANT.seed)
    rotated = transform.forward(seen[0])
    rounded = fake_quantize(rotated, bits, format_of(QUANT, QUANT.group_size))
    return (rounded - rotated) @ transform.weight(bundle.weight(layer)).T


@pytest.mark.parametrize("estimator", ["adjoint", "local"])
def test_directional_table_equals_finite_differences(exact_bundle, exact_trace, estimator):
    config = SensitivityConfig(estimator=estimator, probes=1, seed=5)
    smap = sensitivity.profile(exact_bundle, exact_trace, config, QUANT)
    probe = torch.randn((1, *exact_trace.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(5), dtype=torch.float64)[0]
    assert ACT_BITS[1] == 4
    layers = [layer for layer in exact_bundle.layers if layer.has_act_bits]
    for step, number in [(0, 0), (0, 30), (1, 3), (1, 53), (2, 11), (2, 24)]:
        layer = layers[number]
        delta = _quantization_error(exact_bundle, exact_trace, step, layer, 4)
        eps = 1e-4
        plus, plus_now = _final_latent(exact_bundle, exact_trace, step, layer, delta, eps)
        minus, minus_now = _final_latent(exact_bundle, exact_trace, step, layer, delta, -eps)
        difference = (plus - minus) if estimator == "adjoint" else (plus_now - minus_now)
        slope = float((probe * difference).sum()) / (2 * eps)
        assert slope != 0
        assert float(smap.directional_TLC[step, layer.index, 1]) == pytest.approx(slope**2, rel=1e-4), (step, layer.name)


def test_fisher_of_a_layer_is_its_squared_slope_by_finite_differences(exact_bundle, exact_trace):
    """Of modulation and of other layers: the slope of <r, x_0> in a random direction of one token's output, all tokens together."""
    config = SensitivityConfig(probes=1, seed=5)
    smap = sensitivity.profile(exact_bundle, exact_trace, config, QUANT)
    probe = torch.randn((1, *exact_trace.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(5), dtype=torch.float64)[0]
    by_name = {layer.name: layer for layer in exact_bundle.layers}
    for step, name in [(0, "transformer_blocks.1.norm1.linear"), (2, "single_transformer_blocks.3.norm.linear"),
                       (1, "transformer_blocks.0.attn.to_add_out")]:
        layer = by_name[name]
        shape = (1, layer.n_out) if layer.tokens == 1 else (1, layer.tokens, layer.n_out)
        slopes = []
        for seed in range(60):  # E (g . d)^2 = |g|^2 for d ~ N(0, I)
            delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            ends = [_final_latent(exact_bundle, exact_trace, step, layer, delta, eps)[0] for eps in (1e-4, -1e-4)]
            slopes.append(float((probe * (ends[0] - ends[1])).sum()) / 2e-4)
        squared = torch.tensor(slopes).square()
        per_token, spread = squared.mean() / layer.tokens, squared.std() / layer.tokens / len(slopes) ** 0.5
        assert abs(float(smap.fisher_TL[step, layer.index]) - float(per_token)) < 4 * float(spread), (step, name)


def test_fisher_of_the_last_layers_output_is_known_in_closed_form(exact_bundle, exact_trace):
    """The last layer is followed by a gate, the final norm and the output projection alone: autograd of these three, written out here,
    gives the gradient at the last step."""
    config = SensitivityConfig(probes=2, seed=1)
    smap = sensitivity.profile(exact_bundle, exact_trace, config, QUANT)
    probe = torch.randn((2, *exact_trace.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, last = exact_bundle.transformer, exact_bundle.layers[-1]
    assert last.name == f"single_transformer_blocks.{len(model.single_transformer_blocks) - 1}.proj_out"
    block = model.single_transformer_blocks[-1]
    seen = {}
    tree = clone_tree(model)
    tree.get_submodule(last.module_name).register_forward_hook(lambda _m, _a, y: seen.update(y=y))
    tree.single_transformer_blocks[-1].register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(before=kwargs), with_kwargs=True)
    predict = exact_bundle.predictor(exact_trace.integrator, exact_trace.conditioning, modules={"transformer": tree})
    call = predict.calls(exact_trace.latent_ST[:, -2], STEPS - 1)[0]
    with torch.enable_grad():
        predict.run(call)
    before, y = seen["before"], seen["y"].detach().requires_grad_()
    text = before["encoder_hidden_states"]
    joined = torch.cat([text, before["hidden_states"]], 1)
    gate = block.norm(joined, emb=before["temb"])[1]
    with torch.enable_grad():
        out = model.proj_out(model.norm_out((joined + gate.unsqueeze(1) * y)[:, text.shape[1]:], before["temb"]))
    h = float(exact_trace.integrator.sigma_T1[-1] - exact_trace.integrator.sigma_T1[-2])
    expected = []
    for r in probe:
        [g] = torch.autograd.grad(out, y, h * r, retain_graph=True)
        expected.append(g.square().sum(-1).mean())
    assert float(smap.fisher_TL[-1, last.index]) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-6)
    assert float(smap.directional_TLC[..., -1].abs().max()) == 0.0


def test_errors_shrink_with_bits_and_absmax_is_positive(exact_bundle, exact_trace):
    smap = sensitivity.profile(exact_bundle, exact_trace, SensitivityConfig(probes=1), QUANT)
    squared = smap.squared_error_TLC[:, [layer.has_act_bits for layer in smap.layers]]
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
    rounded = [layer.has_act_bits for layer in smap.layers]
    assert not bool(directional[:, [not each for each in rounded]].any()), "activations of modulation stay float"
    ratio = (directional / white)[:, rounded][..., :-1]
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3)
    layer = smap.layers[5]
    by_hand = smap.fisher_TL[1, 5] * smap.squared_error_TLC[1, 5, 0] * layer.tokens / layer.n_out
    assert float(white[1, 5, 0]) == pytest.approx(float(by_hand), rel=1e-5)
