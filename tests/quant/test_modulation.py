"""Cached modulation: the same numbers, and the weights really are not needed while the steps run."""

import pytest
import torch

from tests.quant.toy import final_latent, make_toy, method_plan, record, solve
from workbench import costs
from workbench.models import Bundle
from workbench.options import BadInput, QuantConfig
from workbench.quant.modulation import CachedModulation
from workbench.quant.quantize import build

CACHED = QuantConfig(modulation="cached")


def test_at_16_bits_the_cached_model_is_the_uncached_one_bit_for_bit(flux):
    trace = record(flux, samples=3, steps=3)
    quantized = build(flux, solve(flux, trace, None, CACHED, (16,)), method_plan(flux, trace.integrator, CACHED, 16, 16))
    assert torch.equal(final_latent(quantized, trace), trace.latent_ST[:, -1])


def test_the_weights_are_not_read_while_the_steps_run(flux):
    trace = record(flux, samples=2, steps=3)
    quantized = build(flux, solve(flux, trace, None, CACHED, (16,)), method_plan(flux, trace.integrator, CACHED, 16, 16))
    weights = [flux.weight(layer) for layer in flux.modulation]
    kept = [w.clone() for w in weights]
    predict = quantized.predictor(trace.integrator, trace.conditioning)
    for w in weights:
        w.fill_(float("nan"))
    try:
        with torch.no_grad():
            assert torch.equal(predict(trace.latent_ST[:, 1], 1), trace.output_ST[:, 1])
        assert bool(torch.isnan(final_latent(quantized, trace)).any()), "a new predictor's cache is made of these weights"
    finally:
        for w, before in zip(weights, kept):
            w.copy_(before)


def test_another_prompt_or_a_single_row_is_never_served_from_the_cache(flux):
    trace = record(flux, samples=3, steps=2)
    quantized = build(flux, solve(flux, trace, None, CACHED, (16,)), method_plan(flux, trace.integrator, CACHED, 16, 16))
    quantized.predictor(trace.integrator, trace.conditioning.rows(slice(0, 2)))
    kept = [module._kept for module in quantized.layers.values() if isinstance(module, CachedModulation)]
    for rows in (slice(0, 2), slice(1, 3), slice(2, 3)):
        predict = quantized.predictor(trace.integrator, trace.conditioning.rows(rows))
        for module, before in zip((m for m in quantized.layers.values() if isinstance(m, CachedModulation)), kept, strict=True):
            module._kept = before  # as if another batch had cached its own meanwhile
        with torch.no_grad():
            made = predict(trace.latent_ST[rows, 1], 1)
            torch.testing.assert_close(made, trace.output_ST[rows, 1], rtol=1e-4, atol=1e-5)  # other batch sizes round differently


def test_the_bytes_are_those_of_the_outputs_of_one_image():
    toy = make_toy()
    trace, stored = record(toy, steps=4), QuantConfig(modulation_bits=16)
    sizes = {quant.modulation: build(toy, solve(toy, trace, None, quant, (4, 16)),
                                     method_plan(toy, trace.integrator, quant, 4, 4)).weight_bytes for quant in (CACHED, stored)}
    in_float = sum(2 * layer.n_out * (layer.k_in + 1) for layer in toy.modulation)
    assert sizes["stored"] - sizes["cached"] == in_float - 4 * 2 * sum(layer.n_out for layer in toy.modulation)


def test_a_size_needs_a_number_of_steps_and_a_family_must_offer_the_input(monkeypatch):
    toy = make_toy()
    with pytest.raises(BadInput, match="number of steps"):
        costs.tabulate(toy, CACHED)
    monkeypatch.setattr(type(toy), "modulation_input", Bundle.modulation_input)
    trace = record(toy)
    quantized = build(toy, solve(toy, trace, None, CACHED, (16,)), method_plan(toy, trace.integrator, CACHED, 16, 16))
    with pytest.raises(BadInput, match="cannot be cached"):
        quantized.predictor(trace.integrator, trace.conditioning)
