"""Every stage in every float type, and on a device that refuses what is not on it."""

import pytest
import torch

from tests.elsewhere import DEVICE, Elsewhere, elsewhere, is_marked
from tests.quant.toy import make_flux, make_toy, method_plan, record
from workbench import generate, inspection, sensitivity
from workbench.options import QuantConfig, SensitivityConfig
from workbench.quant import calibration
from workbench.quant.bank import Calibration, solve_bank
from workbench.quant.quantize import build, quantize
from workbench.replay.trace import trajectories
from workbench.rollout import Rollout
from workbench.sensitivity.signed import project, with_signs

STEPS, PROMPTS, SEEDS = 2, ("a", "b", "c"), (0, 1, 2)


def every_stage(bundle, quant=None):
    """(map, error of a plan that was searched for nothing, generated latents)."""
    quant = quant or QuantConfig()
    trace = trajectories(bundle, PROMPTS, SEEDS, bundle.integrator(STEPS))
    fitted = calibration.fit_transforms(bundle, trace, quant, 4)
    smap = sensitivity.profile(bundle, trace, SensitivityConfig(probes=2), quant, fitted=fitted)
    bank = solve_bank(bundle, Calibration(trace=trace, alpha_TL=smap.alpha_TL, fitted=fitted), quant, (4, 8))
    signed = project(bundle, trace, bank)
    table = with_signs(sensitivity.tabulate(smap, bank.weight_bits_C, bank.weight_error_LC), signed, bundle.layers)
    plan = method_plan(bundle, trace.integrator, quant, 4, 4)

    def model_of(weight_bits_L):
        return build(bundle, bank, method_plan(bundle, trace.integrator, quant, list(weight_bits_L), 16))

    rollout = Rollout(bundle, trace, model_of, samples=2, scoring="adjoint", costates_T=signed.costates_T)
    rollout.use_weights(plan.weight_bits_L)
    state = rollout.start()
    for step in range(STEPS):
        state = rollout.extend(rollout.load(rollout.save(state)), step, (4,) * len(bundle.layers))
        rollout.score(state, step)
    quantized = quantize(bundle, Calibration(trace=trace, alpha_TL=smap.alpha_TL), plan)
    made = generate.run(bundle, PROMPTS, SEEDS, trace.integrator, quantized=quantized)
    inspection.inspect(bundle, trace, bundle.layers[1].index, 1, QuantConfig())
    return smap, table, rollout.error(state), made


@pytest.mark.parametrize("make", [make_toy, make_flux])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_stage_runs_in_other_float_types_to_the_same_numbers(make, dtype):
    """A gradient of bfloat16 times a weight of float32 was a crash on every GPU."""
    reference, other = every_stage(make()), every_stage(make().in_dtype(dtype))
    # activations near a tie are rounded otherwise: their signed effects differ most
    tolerance = {"fisher_TL": 0.1, "squared_error_TLC": 0.1, "directional_TLC": 0.5}
    if dtype == torch.float64:  # probes are drawn in the type of the outputs: other directions of the same space
        tolerance |= {"fisher_TL": 0.5, "directional_TLC": 1.5}
    for name in ("fisher_TL", "directional_TLC", "squared_error_TLC"):
        expected, found = getattr(reference[0], name), getattr(other[0], name)
        assert float((found - expected).norm() / expected.norm()) < tolerance[name], name
    assert other[2] == pytest.approx(reference[2], rel=0.5) and bool(torch.isfinite(other[3].latent_ST).all())


@pytest.mark.parametrize("make", [make_toy, make_flux])
@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig(transform="smooth", branch_bits=1 / 3, group_size=32, act_scale="group"),
                                   QuantConfig(hessian="ssc", act_scale="tensor")], ids=["default", "smoothed", "static"])
def test_every_stage_keeps_to_the_device_of_its_model(make, quant, monkeypatch):
    expected = every_stage(make(), quant)
    with elsewhere(monkeypatch, make()) as bundle:
        found = every_stage(bundle, quant)
    assert torch.allclose(found[0].fisher_TL, expected[0].fisher_TL, rtol=0.05)
    assert found[2] == pytest.approx(expected[2], rel=0.2)
    for kept in (found[0].fisher_TL, found[1].error_TLC, found[3].latent_ST):
        assert not is_marked(kept), "what a stage returns is on the CPU"


def test_stored_conditioning_comes_back_on_the_cpu_and_is_moved_where_it_is_used(monkeypatch):
    """A resumed run on a GPU failed at the first replay."""
    with elsewhere(monkeypatch, make_toy()) as bundle:
        trace = record(bundle)
        assert not any(is_marked(value) for value in trace.conditioning.per_sample.values())
        [batch] = trace.batches(tokens=10**6, device=bundle.device)
        assert all(is_marked(value) for value in batch.conditioning.per_sample.values())


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with Elsewhere():
        there, here = torch.ones(2, device=DEVICE), torch.ones(2)
        assert there.device == DEVICE and (there + 1).device == DEVICE and here.device.type == "cpu"
        for mix in (lambda: there + here, lambda: torch.nn.functional.linear(there, torch.ones(3, 2)), lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        assert (there.cpu() + here).device.type == "cpu" and (here.to(DEVICE) + there).device == DEVICE
