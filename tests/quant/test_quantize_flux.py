"""The stage on a tiny random FluxTransformer2DModel behind the real Flux family."""

import torch

from tests.quant.toy import plan_of, record
from workbench.options import QuantConfig
from workbench.quant.quantize import build, solve_bank


def final_latent(bundle, trace):
    latent = trace.latent_STMD[:, 0]
    for t in range(trace.schedule.steps):
        with torch.no_grad():
            latent = bundle.advance(latent, bundle.velocity(latent, trace.schedule, t, trace.conditioning), trace.schedule, t)
    return latent


def test_a_flux_model_is_quantized_end_to_end(flux):
    trace = record(flux, samples=3, steps=3)
    alpha_TL = torch.tensor([1.5, 0.5, 1.0])[:, None].expand(3, len(flux.layers))
    quant = QuantConfig()
    bank = solve_bank(flux, trace, alpha_TL, quant, (2, 4, 8, 16))
    exact, errors = final_latent(flux, trace), {}
    assert torch.equal(exact, trace.latent_STMD[:, -1])
    for bits in (8, 4, 2):
        plan = plan_of(flux, trace.schedule, quant, bits, 8 if bits == 8 else 4)
        quantized = build(flux, bank, plan)
        assert quantized.weight_bytes == plan.weight_bytes < flux.float_bytes
        assert set(quantized.modules) == {layer.name for layer in (*flux.layers, *flux.modulation)}
        with quantized.attached(flux):
            errors[bits] = float((final_latent(flux, trace) - exact).square().mean() / exact.square().mean())
    assert 0 < errors[8] < errors[4] < errors[2]
    assert torch.equal(final_latent(flux, trace), exact), "detached, it is the float model again"


def test_sixteen_bits_are_the_float_model_bit_for_bit(flux):
    trace, quant = record(flux, samples=2, steps=2), QuantConfig(modulation_bits=16)
    bank = solve_bank(flux, trace, None, quant, (16,))
    with build(flux, bank, plan_of(flux, trace.schedule, quant, 16, 16)).attached(flux):
        assert torch.equal(final_latent(flux, trace), trace.latent_STMD[:, -1])
