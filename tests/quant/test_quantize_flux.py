"""The stage on a tiny random FluxTransformer2DModel behind the real Flux family."""

import torch

from tests.quant.toy import final_latent, plan_of, record, solve
from workbench.options import QuantConfig
from workbench.quant.quantize import build


def test_a_flux_model_is_quantized_end_to_end(flux):
    trace = record(flux, samples=3, steps=3)
    alpha_TL = torch.tensor([1.5, 0.5, 1.0])[:, None].expand(3, len(flux.layers))
    quant = QuantConfig()
    bank = solve(flux, trace, alpha_TL, quant, (2, 4, 8, 16))
    exact, errors = final_latent(flux, trace), {}
    assert torch.equal(exact, trace.latent_ST[:, -1])
    for bits in (8, 4, 2):
        plan = plan_of(flux, trace.integrator, quant, bits, 8 if bits == 8 else 4)
        quantized = build(flux, bank, plan)
        assert quantized.weight_bytes == plan.weight_bytes < flux.float_bytes
        assert set(quantized.layers) == {layer.name for layer in flux.layers}
        errors[bits] = float((final_latent(quantized, trace) - exact).square().mean() / exact.square().mean())
    assert 0 < errors[8] < errors[4] < errors[2]
    assert torch.equal(final_latent(flux, trace), exact), "the float model is as it was"


def test_sixteen_bits_are_the_float_model_bit_for_bit(flux):
    trace, quant = record(flux, samples=2, steps=2), QuantConfig(modulation_bits=16)
    bank = solve(flux, trace, None, quant, (16,))
    assert torch.equal(final_latent(build(flux, bank, plan_of(flux, trace.integrator, quant, 16, 16)), trace), trace.latent_ST[:, -1])
