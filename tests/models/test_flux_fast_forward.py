"""The lean forward of Flux is diffusers' own up to rounding, whatever stands in the layers' places."""

import pytest
import torch
from torch import nn

from workbench.models import flux_fast_forward
from workbench.models.tree import clone_tree, with_modules
from workbench.options import TraceConfig
from workbench.quant import calibration
from workbench.quant.calibration import Count
from workbench.replay.trace import record

PROMPTS = ("fluent red heart", "noto grinning face")


@pytest.fixture(scope="module")
def inputs(bundle):
    return bundle.integrator(4), bundle.encode(PROMPTS), bundle.noise([3, 4])


def full(bundle, latent, integrator, step, conditioning, modules=None):
    """diffusers' own forward: the one that carries gradients."""
    with torch.enable_grad():
        return bundle.predictor(integrator, conditioning, modules=modules)(latent, step).detach()


def fast_forward(bundle, latent, integrator, step, conditioning, modules=None):
    with torch.no_grad():
        return bundle.predictor(integrator, conditioning, modules=modules)(latent, step)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_it_errs_no_more_than_twice_as_much_as_diffusers_in_the_same_precision(bundle, inputs, step):
    integrator, conditioning, latent = inputs
    exact = full(bundle.in_dtype(torch.float64), latent, integrator, step, conditioning)
    theirs = (full(bundle, latent, integrator, step, conditioning) - exact).abs().max()
    mine = (fast_forward(bundle, latent, integrator, step, conditioning) - exact).abs().max()
    assert mine <= 2 * theirs


def test_bfloat16_errs_no_more_than_twice_as_much_as_diffusers_bfloat16(bundle, inputs):
    integrator, conditioning, latent = inputs
    exact, half = full(bundle, latent, integrator, 1, conditioning), bundle.in_dtype(torch.bfloat16)
    theirs = (full(half, latent, integrator, 1, conditioning) - exact).square().mean()
    mine = (fast_forward(half, latent, integrator, 1, conditioning) - exact).square().mean()
    assert mine <= 4 * theirs  # of squares


def test_another_float_type_leaves_the_bundle_as_it_was(bundle):
    before = bundle.transformer, bundle.dtype, {name: p.clone() for name, p in bundle.transformer.named_parameters()}
    half = bundle.in_dtype(torch.bfloat16)
    assert half.transformer is not before[0] and half.dtype == torch.bfloat16
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    assert (bundle.transformer, bundle.dtype) == before[:2] and bundle.in_dtype(bundle.dtype) is bundle
    assert all(torch.equal(p, before[2][name]) for name, p in bundle.transformer.named_parameters())


class Counted(nn.Linear):
    """A linear that counts its runs; no hook, so that nobody looks into single steps."""

    runs = 0

    def forward(self, x):
        Counted.runs += 1
        return super().forward(x)


def counted(linear, factor=1):
    made = Counted(linear.in_features, linear.out_features).requires_grad_(False)
    made.load_state_dict({key: factor * value for key, value in linear.state_dict().items()})
    return made


def test_modulation_is_computed_once_for_all_steps_of_a_batch(bundle, inputs):
    integrator, conditioning, latent = inputs
    layer = bundle.modulation[0]
    modules = {"transformer": with_modules(bundle.transformer, {layer.name: counted(bundle.linear(layer))})}
    Counted.runs = 0
    with torch.no_grad():
        predict = bundle.predictor(integrator, conditioning, modules=modules)
        first = [predict(latent, step) for step in range(4)]
    assert Counted.runs == 1
    assert torch.equal(first[0], fast_forward(bundle, latent, integrator, 0, conditioning))
    swapped = fast_forward(bundle, latent, integrator, 0, bundle.encode(PROMPTS[::-1]), modules)
    assert Counted.runs == 2 and not torch.allclose(swapped, first[0])
    doubled = {"transformer": with_modules(bundle.transformer, {layer.name: counted(bundle.linear(layer), factor=2)})}
    changed = fast_forward(bundle, latent, integrator, 0, conditioning, doubled)
    torch.testing.assert_close(changed, full(bundle, latent, integrator, 0, conditioning, doubled), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, first[0])


def test_recording_a_trace_computes_modulation_once_for_a_batch(bundle, monkeypatch):
    """Not at every forward: all steps' modulation at every step of every chunk cost a quarter of the time."""
    runs, original = [], type(bundle).modulation_input
    monkeypatch.setattr(type(bundle), "modulation_input", lambda *args: runs.append(1) or original(*args))
    recorded = record(bundle, TraceConfig(prompts=PROMPTS, steps=5))
    assert len(runs) == 1
    replayed = []
    calibration.replay(bundle, recorded, [[bundle.layers[2]]], lambda *_: replayed.append(1), Count(lambda _: None, "", 5))
    assert len(runs) == 2 and len(replayed) == 5


def test_whoever_looks_at_modulation_sees_one_step_at_a_time(bundle):
    """A Hessian weighted by step must not get all steps' inputs at the first."""
    recorded, layer, seen = record(bundle, TraceConfig(prompts=PROMPTS, steps=3)), bundle.modulation[3], []
    calibration.replay(bundle, recorded, [[layer]], lambda _, t, x: seen.append((t, x)), Count(lambda _: None, "", 3))
    expected = bundle.modulation_input(recorded.integrator, range(3), recorded.conditioning)
    assert [t for t, _ in seen] == [0, 1, 2]
    for (t, x), x_SK in zip(seen, expected, strict=True):
        torch.testing.assert_close(x, x_SK, msg=f"step {t}")


def test_where_all_steps_do_not_fit_each_is_computed_by_itself(bundle, inputs, monkeypatch):
    integrator, conditioning, latent = inputs
    together = [fast_forward(bundle, latent, integrator, step, conditioning) for step in (1, 2)]
    monkeypatch.setattr(flux_fast_forward, "SHARED_BYTES", 0)
    for step, expected in zip((1, 2), together):
        torch.testing.assert_close(fast_forward(bundle, latent, integrator, step, conditioning), expected, rtol=1e-5, atol=1e-5)


def test_a_bundle_s_weights_are_joined_before_anybody_runs_it_and_never_moved_again(bundle, inputs):
    """A thread that moved them later would take the memory from under another that multiplies by them."""
    integrator, conditioning, latent = inputs
    weight = bundle.transformer.transformer_blocks[0].attn.to_q.weight
    before = weight.joined_rows, [p.data_ptr() for p in bundle.transformer.parameters()]
    for modules in (None, {"transformer": clone_tree(bundle.transformer)}):
        fast_forward(bundle, latent, integrator, 0, conditioning, modules)
    assert weight.joined_rows is before[0] and [p.data_ptr() for p in bundle.transformer.parameters()] == before[1]
    assert hasattr(bundle.in_dtype(torch.bfloat16).transformer.transformer_blocks[0].attn.to_q.weight, "joined_rows")


def test_joined_layers_hold_nothing_twice_and_follow_a_change_of_their_weights():
    generator = torch.Generator().manual_seed(0)
    layers, x = tuple(nn.Linear(8, n) for n in (4, 4, 6)), torch.randn(3, 8, generator=generator)
    with torch.no_grad():
        apart = [layer(x) for layer in layers]
        flux_fast_forward._fuse(layers)
        assert flux_fast_forward._fused(layers) is not None
        for made, expected in zip(flux_fast_forward._together(layers, x), apart, strict=True):
            torch.testing.assert_close(made, expected)
        storages = {part.untyped_storage().data_ptr() for layer in layers for part in layer.parameters()}
        assert len(storages) == 2  # one of weights, one of biases
        layers[1].weight.mul_(2)
        assert flux_fast_forward._fused(layers) is not None
        torch.testing.assert_close(flux_fast_forward._together(layers, x)[1], layers[1](x))
        layers[2].weight = nn.Parameter(torch.randn(6, 8, generator=generator))
        assert flux_fast_forward._fused(layers) is None
        for made, layer in zip(flux_fast_forward._together(layers, x), layers, strict=True):
            torch.testing.assert_close(made, layer(x))


def test_hooks_see_layers_that_would_be_fused():
    layers, seen = (nn.Linear(4, 4), nn.Linear(4, 4)), []
    layers[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        flux_fast_forward._together(layers, torch.ones(2, 4))
    assert seen == [1]
