"""The lean forward of Flux is diffusers' own up to rounding, whatever stands in the layers' places."""

import pytest
import torch
from torch import nn

from workbench.models import flux_lean

PROMPTS = ("fluent red heart", "noto grinning face")


@pytest.fixture(scope="module")
def inputs(bundle):
    return bundle.schedule(4), bundle.encode(PROMPTS), bundle.initial_latents([3, 4])


def full(bundle, latent_SMD, schedule, step, conditioning):
    """diffusers' own forward: the one that carries gradients."""
    with torch.enable_grad():
        return bundle.velocity(latent_SMD, schedule, step, conditioning).detach()


def lean(bundle, latent_SMD, schedule, step, conditioning):
    with torch.no_grad():
        return bundle.velocity(latent_SMD, schedule, step, conditioning)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_it_errs_no_more_than_twice_as_much_as_diffusers_in_the_same_precision(bundle, inputs, step):
    schedule, conditioning, latent_SMD = inputs
    with bundle.in_arithmetic(torch.float64):
        exact = full(bundle, latent_SMD, schedule, step, conditioning)
    theirs = (full(bundle, latent_SMD, schedule, step, conditioning) - exact).abs().max()
    mine = (lean(bundle, latent_SMD, schedule, step, conditioning) - exact).abs().max()
    assert mine <= 2 * theirs


def test_bfloat16_errs_no_more_than_twice_as_much_as_diffusers_bfloat16(bundle, inputs):
    schedule, conditioning, latent_SMD = inputs
    exact = full(bundle, latent_SMD, schedule, 1, conditioning)
    with bundle.in_arithmetic(torch.bfloat16):
        theirs = (full(bundle, latent_SMD, schedule, 1, conditioning) - exact).square().mean()
        mine = (lean(bundle, latent_SMD, schedule, 1, conditioning) - exact).square().mean()
    assert mine <= 4 * theirs  # of squares


def test_another_arithmetic_leaves_the_bundle_as_it_was(bundle):
    before = bundle.transformer, bundle.dtype, {name: p.clone() for name, p in bundle.transformer.named_parameters()}
    with bundle.in_arithmetic(torch.bfloat16):
        assert bundle.transformer is not before[0]
        assert {p.dtype for p in bundle.transformer.parameters()} == {torch.bfloat16}
    assert (bundle.transformer, bundle.dtype) == before[:2]
    assert all(torch.equal(p, before[2][name]) for name, p in bundle.transformer.named_parameters())


def test_modulation_is_computed_once_for_all_steps_and_anew_for_other_prompts_and_weights(bundle, inputs):
    schedule, conditioning, latent_SMD = inputs
    name, calls = bundle.modulation[0].name, []
    handle = bundle.linear(name).register_forward_hook(lambda *_: calls.append(1))
    other = bundle.encode(PROMPTS[::-1])
    first = [lean(bundle, latent_SMD, schedule, step, conditioning) for step in range(4)]
    assert len(calls) == 1
    swapped = lean(bundle, latent_SMD, schedule, 0, other)
    assert len(calls) == 2 and not torch.allclose(swapped, first[0])
    handle.remove()
    original = bundle.linear(name)
    doubled = nn.Linear(original.in_features, original.out_features).requires_grad_(False)
    doubled.load_state_dict({key: 2 * value for key, value in original.state_dict().items()})
    before = bundle.replace({name: doubled})
    assert before == {name: original}
    try:
        changed = lean(bundle, latent_SMD, schedule, 0, conditioning)
        torch.testing.assert_close(changed, full(bundle, latent_SMD, schedule, 0, conditioning), rtol=1e-4, atol=1e-4)
    finally:
        bundle.replace(before)
    assert not torch.allclose(changed, first[0])
    assert torch.equal(lean(bundle, latent_SMD, schedule, 0, conditioning), first[0])


def test_where_all_steps_do_not_fit_each_is_computed_by_itself(bundle, inputs, monkeypatch):
    schedule, conditioning, latent_SMD = inputs
    together = [lean(bundle, latent_SMD, schedule, step, conditioning) for step in (1, 2)]
    monkeypatch.setattr(flux_lean, "REMEMBERED_BYTES", 0)
    for step, expected in zip((1, 2), together):
        bundle._lean._last = None
        torch.testing.assert_close(lean(bundle, latent_SMD, schedule, step, conditioning), expected, rtol=1e-5, atol=1e-5)


def test_joined_layers_hold_nothing_twice_and_follow_a_change_of_their_weights():
    generator = torch.Generator().manual_seed(0)
    layers, x = tuple(nn.Linear(8, n) for n in (4, 4, 6)), torch.randn(3, 8, generator=generator)
    with torch.no_grad():
        for _ in range(2):  # the second time they are joined already
            for made, layer in zip(flux_lean._together(layers, x), layers, strict=True):
                torch.testing.assert_close(made, layer(x))
        storages = {part.untyped_storage().data_ptr() for layer in layers for part in layer.parameters()}
        assert len(storages) == 2  # one of weights, one of biases
        layers[1].weight.mul_(2)
        layers[2].weight = nn.Parameter(torch.randn(6, 8, generator=generator))
        for made, layer in zip(flux_lean._together(layers, x), layers, strict=True):
            torch.testing.assert_close(made, layer(x))


def test_hooks_see_layers_that_would_be_joined():
    layers, seen = (nn.Linear(4, 4), nn.Linear(4, 4)), []
    layers[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        flux_lean._together(layers, torch.ones(2, 4))
    assert seen == [1]
