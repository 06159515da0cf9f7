"""Cached modulation: the same numbers, and the weights really are not needed while the steps run."""

import pytest
import torch

from tests.quant.toy import make_toy, method_plan, record
from workbench import costs
from workbench.models.bundle import Bundle
from workbench.options import BadInput, QuantConfig
from workbench.quant.quantize import build, solve_bank

CACHED = QuantConfig(modulation="cached")


def rollout(bundle, trace):
    latent = trace.latent_STMD[:, 0]
    for t in range(trace.schedule.steps):
        with torch.no_grad():
            latent = bundle.advance(latent, bundle.velocity(latent, trace.schedule, t, trace.conditioning), trace.schedule, t)
    return latent


def test_at_16_bits_the_cached_model_is_the_uncached_one_bit_for_bit(flux):
    trace = record(flux, samples=3, steps=3)
    quantized = build(flux, solve_bank(flux, trace, None, CACHED, (16,)), method_plan(flux, trace.schedule, CACHED, 16, 16))
    with quantized.attached(flux):
        quantized.cache_modulation(flux, trace.schedule, trace.conditioning)
        assert torch.equal(rollout(flux, trace), trace.latent_STMD[:, -1])


def test_the_weights_are_not_read_while_the_steps_run(flux):
    trace = record(flux, samples=2, steps=3)
    quantized = build(flux, solve_bank(flux, trace, None, CACHED, (16,)), method_plan(flux, trace.schedule, CACHED, 16, 16))
    weights = [flux.linear(layer.name).weight for layer in flux.modulation]
    kept = [w.clone() for w in weights]
    with quantized.attached(flux):
        quantized.cache_modulation(flux, trace.schedule, trace.conditioning)
        for w in weights:
            w.fill_(float("nan"))
        try:
            assert torch.equal(rollout(flux, trace), trace.latent_STMD[:, -1])
            quantized.cache_modulation(flux, trace.schedule, trace.conditioning)
            flux._lean._last = None  # the lean forward remembers outputs, and does not know that weights were overwritten
            assert bool(torch.isnan(rollout(flux, trace)).any()), "the cache was made of these weights"
        finally:
            for w, before in zip(weights, kept):
                w.copy_(before)


def test_another_prompt_or_a_single_row_is_never_served_from_the_cache(flux):
    trace = record(flux, samples=3, steps=2)
    quantized = build(flux, solve_bank(flux, trace, None, CACHED, (16,)), method_plan(flux, trace.schedule, CACHED, 16, 16))
    with quantized.attached(flux), torch.no_grad():
        quantized.cache_modulation(flux, trace.schedule, trace.conditioning.rows(slice(0, 2)))
        for rows in (slice(0, 2), slice(1, 3), slice(2, 3)):
            made = flux.velocity(trace.latent_STMD[rows, 1], trace.schedule, 1, trace.conditioning.rows(rows))
            torch.testing.assert_close(made, trace.target_STMD[rows, 1], rtol=1e-4, atol=1e-5)  # other batch sizes round differently


def test_the_bytes_are_those_of_the_outputs_of_one_image():
    toy = make_toy()
    trace, stored = record(toy, steps=4), QuantConfig(modulation_bits=16)
    sizes = {quant.modulation: build(toy, solve_bank(toy, trace, None, quant, (4,)),
                                     method_plan(toy, trace.schedule, quant, 4, 4)).weight_bytes for quant in (CACHED, stored)}
    in_float = sum(2 * layer.n_out * (layer.k_in + 1) for layer in toy.modulation)
    assert sizes["stored"] - sizes["cached"] == in_float - 4 * 2 * sum(layer.n_out for layer in toy.modulation)


def test_a_size_needs_a_number_of_steps_and_a_family_must_offer_the_input(monkeypatch):
    toy = make_toy()
    with pytest.raises(BadInput, match="number of steps"):
        costs.tabulate(toy, CACHED)
    monkeypatch.setattr(type(toy), "modulation_input", Bundle.modulation_input)
    trace = record(toy)
    quantized = build(toy, solve_bank(toy, trace, None, CACHED, (16,)), method_plan(toy, trace.schedule, CACHED, 16, 16))
    with pytest.raises(BadInput, match="cannot be cached"):
        quantized.cache_modulation(toy, trace.schedule, trace.conditioning)
