"""The whole stage on a toy transformer in a real Bundle."""

import pytest
import torch

from tests.quant.toy import plan_of, record
from workbench.options import BadInput, Cancelled, QuantConfig
from workbench.quant.quantize import build, input_groups, quantize, solve_bank

WIDTHS = (2, 3, 4, 6, 8, 16)


def velocity(bundle, trace, step=0):
    with torch.no_grad():
        return bundle.velocity(trace.latent_STMD[:, step], trace.schedule, step, trace.conditioning)


def alpha_of(trace, layers, seed=0):
    alpha_TL = torch.rand(trace.schedule.steps, layers, generator=torch.Generator().manual_seed(seed)) + 0.1
    return alpha_TL / alpha_TL.mean(0)


def inputs_of(bundle, trace):
    """Every layer's input x_MK at every step, recorded without the code under test."""
    found = {layer.name: [] for layer in bundle.layers}
    hooks = [bundle.linear(name).register_forward_hook(lambda _m, args, _y, name=name: found[name].append(args[0].flatten(0, 1)))
             for name in found]
    for t in range(trace.schedule.steps):
        velocity(bundle, trace, t)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("solver", ["gptq", "nearest"])
def test_sixteen_bits_equal_the_float_model_bit_for_bit(toy, toy_trace, transform, solver):
    quant = QuantConfig(transform=transform, solver=solver, modulation_bits=16)
    bank = solve_bank(toy, toy_trace, None, quant, (16,))
    quantized = build(toy, bank, plan_of(toy, toy_trace.schedule, quant, 16, 16))
    expected = velocity(toy, toy_trace)
    with quantized.attached(toy):
        assert torch.equal(velocity(toy, toy_trace), expected)
    assert quantized.weight_bytes == toy.float_bytes


def test_fewer_bits_are_worse_and_more_bits_approach_float(toy, toy_trace):
    quant = QuantConfig(group_size=32, weight_grid="symmetric")
    bank, expected, errors = solve_bank(toy, toy_trace, None, quant, WIDTHS), velocity(toy, toy_trace), []
    for bits in (8, 6, 4, 3, 2):
        with build(toy, bank, plan_of(toy, toy_trace.schedule, quant, bits, 16)).attached(toy):
            errors.append(float((velocity(toy, toy_trace) - expected).square().sum() / expected.square().sum()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-4 < 1e-2 < errors[-1] < 1


@pytest.mark.parametrize("quant", [QuantConfig(group_size=32), QuantConfig(group_size=None, modulation_bits=4),
                                   QuantConfig(group_size=128, modulation_bits=16)])
def test_weight_bytes_equal_the_plan_and_the_storage(toy, toy_trace, quant):
    bank = solve_bank(toy, toy_trace, None, quant, WIDTHS)
    bits_L = [WIDTHS[i % len(WIDTHS)] for i in range(len(toy.layers))]
    plan = plan_of(toy, toy_trace.schedule, quant, bits_L, 4)
    quantized = build(toy, bank, plan)
    with quantized.attached(toy):
        velocity(toy, toy_trace)
        buffers = sum(b.untyped_storage().nbytes() for b in toy.transformer.buffers())
        in_float = 2 * sum(p.numel() for p in toy.transformer.parameters())
    assert quantized.weight_bytes == plan.weight_bytes == buffers + in_float


def test_recorded_losses_are_the_weighted_output_errors(toy, toy_trace):
    quant, alpha_TL = QuantConfig(group_size=32), alpha_of(toy_trace, len(toy.layers))
    bank, inputs = solve_bank(toy, toy_trace, alpha_TL, quant, WIDTHS), inputs_of(toy, toy_trace)
    groups = {layer.name: [member.index for member in group] for group in input_groups(toy.layers) for layer in group}
    for layer in toy.layers:
        for c, bits in enumerate(WIDTHS):
            delta_NK = (bank.effective_weight(layer.name, bits) - toy.linear(layer.name).weight).double()
            expected = sum(float(alpha_TL[t, groups[layer.name]].mean()) * float((x_MK.double() @ delta_NK.T).square().sum())
                           for t, x_MK in enumerate(inputs[layer.name]))
            assert float(bank.weight_error_LC[layer.index, c]) == pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_constant_alpha_equals_uniform_calibration_and_another_alpha_does_not(toy, toy_trace):
    shape = (toy_trace.schedule.steps, len(toy.layers))
    fisher, uniform = QuantConfig(group_size=32), QuantConfig(group_size=32, hessian="uniform")
    banks = [solve_bank(toy, toy_trace, alpha_TL, quant, (3,)) for alpha_TL, quant in (
        (torch.ones(shape), fisher), (None, fisher), (alpha_of(toy_trace, shape[1]), uniform), (alpha_of(toy_trace, shape[1]), fisher))]
    codes = [torch.cat([bank.weights[layer.name, 3].packed_NP.flatten() for layer in toy.layers]) for bank in banks]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
    assert not torch.equal(codes[0], codes[3])


def test_solved_losses_are_below_nearest_rounding(toy, toy_trace):
    bank = solve_bank(toy, toy_trace, None, QuantConfig(group_size=32), WIDTHS)
    assert all(report.loss_solved < report.loss_rtn for report in bank.reports.values())


def test_the_plan_sets_activation_bits_by_noise_level(toy, toy_trace):
    quant = QuantConfig(modulation_bits=16)
    rows = [[16] * len(toy.layers), [3] * len(toy.layers), [16] * len(toy.layers)]
    quantized = quantize(toy, toy_trace, None, plan_of(toy, toy_trace.schedule, quant, 16, rows))
    expected = [velocity(toy, toy_trace, t) for t in range(3)]
    with quantized.attached(toy):
        assert [torch.equal(velocity(toy, toy_trace, t), expected[t]) for t in (0, 1, 2, 1)] == [True, False, True, False]
        toy.cursor.plan = None
        toy.cursor.row = rows[0]
        assert torch.equal(velocity(toy, toy_trace, 1), expected[1]), "without a plan the row is the caller's"


def test_models_share_weights_and_caches_with_the_bank(toy, toy_trace):
    quant = QuantConfig(group_size=32)
    bank = solve_bank(toy, toy_trace, None, quant, (4,))
    first, second = (build(toy, bank, plan_of(toy, toy_trace.schedule, quant, 4, bits)) for bits in (4, 8))
    name = toy.layers[0].name
    first.modules[name](torch.randn(3, toy.layers[0].k_in, dtype=torch.float64))  # no kernel takes float64: this keeps a weight
    assert second.modules[name].packed_NP is first.modules[name].packed_NP
    assert second.modules[name]._scratch[torch.float64][0] is first.modules[name]._scratch[torch.float64][0]


def test_attaching_restores_everything_even_after_an_exception(toy, toy_trace):
    quant = QuantConfig(group_size=32)
    bank, before = solve_bank(toy, toy_trace, None, quant, (4, 8)), dict(toy.transformer.named_modules())
    outer, inner = (build(toy, bank, plan_of(toy, toy_trace.schedule, quant, bits, bits)) for bits in (8, 4))
    with outer.attached(toy):
        eight = velocity(toy, toy_trace)
        with pytest.raises(RuntimeError, match="from within"), inner.attached(toy):
            assert not torch.equal(velocity(toy, toy_trace), eight)
            raise RuntimeError("from within")
        assert toy.cursor.plan is outer.plan and torch.equal(velocity(toy, toy_trace), eight)
    assert toy.cursor.plan is None and toy.cursor.row is None
    assert dict(toy.transformer.named_modules()) == before


def test_cancelling_leaves_no_hook_behind(toy, toy_trace):
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        solve_bank(toy, toy_trace, None, QuantConfig(), (4,), on_progress=stop)
    assert [p.done for p in seen] == [1, 2] and seen[0].total == 3 + len(input_groups(toy.layers))
    assert not any(toy.linear(layer.name)._forward_pre_hooks for layer in toy.layers)


def test_a_larger_model_is_replayed_in_parts_with_the_same_result(toy, toy_trace, monkeypatch):
    whole = solve_bank(toy, toy_trace, None, QuantConfig(group_size=32), (4,))
    monkeypatch.setattr("workbench.quant.calibration._HESSIAN_BYTES", 4 * 64**2 * 3)
    steps = []
    parts = solve_bank(toy, toy_trace, None, QuantConfig(group_size=32), (4,), on_progress=steps.append)
    assert steps[-1].done == steps[-1].total > 3 + len(input_groups(toy.layers))
    assert torch.equal(whole.weight_error_LC, parts.weight_error_LC)


def test_what_does_not_belong_together_is_refused(toy, toy_trace):
    quant = QuantConfig(group_size=32)
    bank = solve_bank(toy, toy_trace, None, quant, (4,))
    plan = plan_of(toy, toy_trace.schedule, quant, 4, 4)
    with pytest.raises(BadInput, match="another model"):
        build(toy, bank, plan.model_copy(update={"model_hash": "something-else"}))
    with pytest.raises(BadInput, match="was not solved at 8 bits"):
        build(toy, bank, plan_of(toy, toy_trace.schedule, quant, 8, 4))
    with pytest.raises(BadInput, match="with group size 64"):
        build(toy, bank, plan_of(toy, toy_trace.schedule, QuantConfig(group_size=64), 4, 4))
    for wrong in (torch.ones(2, len(toy.layers)), torch.full((3, len(toy.layers)), float("nan"))):
        with pytest.raises(BadInput, match="calibration weights are"):
            solve_bank(toy, toy_trace, wrong, quant, (4,))
    toy.model_hash = "another-model"
    with pytest.raises(BadInput, match="the trace belongs to model toy-model-hash"):
        solve_bank(toy, toy_trace, None, quant, (4,))


def test_more_calibration_samples_are_replayed_in_chunks_with_the_same_result(toy, monkeypatch):
    trace = record(toy, samples=7)
    whole = solve_bank(toy, trace, None, QuantConfig(group_size=32), (4,))
    monkeypatch.setattr("workbench.quant.calibration._ROWS_PER_FORWARD", 12)
    chunked = solve_bank(toy, trace, None, QuantConfig(group_size=32), (4,))
    torch.testing.assert_close(whole.weight_error_LC, chunked.weight_error_LC, rtol=0.02, atol=0)
