"""The whole stage on a toy transformer in a real Bundle."""

import threading

import pytest
import torch

from tests.quant.toy import final_latent, output, plan_of, record, solve
from workbench.options import BadInput, Cancelled, QuantConfig
from workbench.quant.bank import Calibration
from workbench.quant.calibration import input_groups
from workbench.quant.quantize import build, quantize

WIDTHS = (2, 3, 4, 6, 8, 16)


def alpha_of(trace, layers, seed=0):
    alpha_TL = torch.rand(trace.steps, layers, generator=torch.Generator().manual_seed(seed)) + 0.1
    return alpha_TL / alpha_TL.mean(0)


def inputs_of(bundle, trace):
    """Every layer's input x_MK at every step, recorded without the code under test."""
    found = {layer.name: [] for layer in bundle.layers}
    hooks = [bundle.linear(layer).register_forward_hook(lambda _m, args, _y, name=layer.name: found[name].append(args[0].flatten(0, -2)))
             for layer in bundle.layers]
    for t in range(trace.steps):
        output(bundle, trace, t)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("solver", ["gptq", "nearest"])
def test_sixteen_bits_equal_the_float_model_bit_for_bit(toy, toy_trace, transform, solver):
    quant = QuantConfig(transform=transform, solver=solver, modulation_bits=16)
    bank = solve(toy, toy_trace, None, quant, (16,))
    quantized = build(toy, bank, plan_of(toy, toy_trace.integrator, quant, 16, 16))
    assert torch.equal(output(quantized, toy_trace), output(toy, toy_trace))
    assert quantized.weight_bytes == toy.float_bytes


def test_fewer_bits_are_worse_and_more_bits_approach_float(toy, toy_trace):
    quant = QuantConfig(group_size=32, weight_grid="symmetric")
    bank, expected, errors = solve(toy, toy_trace, None, quant, WIDTHS), output(toy, toy_trace), []
    for bits in (8, 6, 4, 3, 2):
        quantized = build(toy, bank, plan_of(toy, toy_trace.integrator, quant, bits, 16))
        errors.append(float((output(quantized, toy_trace) - expected).square().sum() / expected.square().sum()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-4 < 1e-2 < errors[-1] < 1


@pytest.mark.parametrize("quant", [QuantConfig(group_size=32), QuantConfig(group_size=None, modulation_bits=4),
                                   QuantConfig(group_size=128, modulation_bits=16)])
def test_weight_bytes_equal_the_plan_and_the_storage(toy, toy_trace, quant):
    bank = solve(toy, toy_trace, None, quant, WIDTHS)
    bits_L = [WIDTHS[i % len(WIDTHS)] for i in range(len(toy.layers))]
    plan = plan_of(toy, toy_trace.integrator, quant, bits_L, 4)
    quantized = build(toy, bank, plan)
    output(quantized, toy_trace)
    own = quantized.modules["transformer"]
    buffers = sum(b.untyped_storage().nbytes() for b in own.buffers())
    in_float = 2 * sum(p.numel() for p in own.parameters())
    assert quantized.weight_bytes == plan.weight_bytes == buffers + in_float


def test_recorded_losses_are_the_weighted_output_errors(toy, toy_trace):
    quant, alpha_TL = QuantConfig(group_size=32), alpha_of(toy_trace, len(toy.layers))
    bank, inputs = solve(toy, toy_trace, alpha_TL, quant, WIDTHS), inputs_of(toy, toy_trace)
    groups = {layer.name: [member.index for member in group] for group in input_groups(toy.layers) for layer in group}
    for layer in toy.layers:
        for c, bits in enumerate(WIDTHS):
            delta_NK = (bank.effective_weight(layer.name, bits) - toy.weight(layer)).double()
            expected = sum(float(alpha_TL[t, groups[layer.name]].mean()) * float((x_MK.double() @ delta_NK.T).square().sum())
                           for t, x_MK in enumerate(inputs[layer.name]))
            assert float(bank.weight_error_LC[layer.index, c]) == pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_constant_alpha_equals_uniform_calibration_and_another_alpha_does_not(toy, toy_trace):
    shape = (toy_trace.steps, len(toy.layers))
    fisher, uniform = QuantConfig(group_size=32), QuantConfig(group_size=32, hessian="uniform")
    banks = [solve(toy, toy_trace, alpha_TL, quant, (3,)) for alpha_TL, quant in (
        (torch.ones(shape), fisher), (None, fisher), (alpha_of(toy_trace, shape[1]), uniform), (alpha_of(toy_trace, shape[1]), fisher))]
    codes = [torch.cat([bank.weights[layer.name, 3].packed_NP.flatten() for layer in toy.layers]) for bank in banks]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
    assert not torch.equal(codes[0], codes[3])


def test_solved_losses_are_below_nearest_rounding(toy, toy_trace):
    bank = solve(toy, toy_trace, None, QuantConfig(group_size=32), WIDTHS)
    rounded = {layer.name for layer in toy.modulation}
    for (name, _), report in bank.reports.items():
        assert report.loss_solved == report.loss_rtn if name in rounded else report.loss_solved < report.loss_rtn


def test_the_plan_sets_activation_bits_by_noise_level(toy, toy_trace):
    quant = QuantConfig(modulation_bits=16)
    rows = [[16] * len(toy.layers), [3] * len(toy.layers), [16] * len(toy.layers)]
    quantized = quantize(toy, Calibration(trace=toy_trace), plan_of(toy, toy_trace.integrator, quant, 16, rows))
    expected = [output(toy, toy_trace, t) for t in range(3)]
    assert [torch.equal(output(quantized, toy_trace, t), expected[t]) for t in (0, 1, 2, 1)] == [True, False, True, False]
    quantized.state.plan, quantized.state.row = None, rows[0]
    assert torch.equal(output(quantized, toy_trace, 1), expected[1]), "without a plan the row is the caller's"


def test_models_share_weights_and_caches_with_the_bank(toy, toy_trace):
    quant = QuantConfig(group_size=32)
    bank = solve(toy, toy_trace, None, quant, (4, 8))
    first, second = (build(toy, bank, plan_of(toy, toy_trace.integrator, quant, 4, bits)) for bits in (4, 8))
    name = toy.layers[1].name
    first.layers[name](torch.randn(3, toy.layers[1].k_in, dtype=torch.float64))  # no kernel takes float64: this keeps a weight
    assert second.layers[name].packed_NP is first.layers[name].packed_NP
    assert second.layers[name]._scratch[torch.float64][0] is first.layers[name]._scratch[torch.float64][0]


def test_a_quantized_model_is_a_tree_of_its_own_that_shares_what_is_not_quantized(toy, toy_trace):
    quant, before = QuantConfig(group_size=32), dict(toy.transformer.named_modules())
    expected, bank = output(toy, toy_trace), solve(toy, toy_trace, None, quant, (4, 8))
    eight, four = (build(toy, bank, plan_of(toy, toy_trace.integrator, quant, bits, bits)) for bits in (8, 4))
    of_eight = output(eight, toy_trace)
    assert not torch.equal(output(four, toy_trace), of_eight) and torch.equal(output(eight, toy_trace), of_eight)
    assert torch.equal(output(toy, toy_trace), expected)
    assert dict(toy.transformer.named_modules()) == before and not toy.transformer._forward_pre_hooks
    own = eight.modules["transformer"]
    assert own.time is not toy.transformer.time and own.time.weight is toy.transformer.time.weight
    own.time.register_forward_hook(lambda *_: pytest.fail("a hook of one tree was called by another"))
    output(toy, toy_trace)


def test_float_and_quantized_run_side_by_side_in_threads_with_the_right_numbers(toy, toy_trace):
    quant = QuantConfig(group_size=32)
    bank = solve(toy, toy_trace, None, quant, (3, 4, 8))
    rows = [[bits] * len(toy.layers) for bits in (3, 8, 4)]
    models = [toy, *(build(toy, bank, plan_of(toy, toy_trace.integrator, quant, bits, rows)) for bits in (4, 8))]
    alone = [final_latent(model, toy_trace) for model in models]
    found, barrier = [[] for _ in models], threading.Barrier(len(models))

    def run(number):
        barrier.wait()
        for _ in range(20):
            found[number].append(final_latent(models[number], toy_trace))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, latents in zip(alone, found, strict=True):
        assert len(latents) == 20 and all(torch.equal(latent, expected) for latent in latents)


def test_cancelling_leaves_no_hook_behind(toy, toy_trace):
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        solve(toy, toy_trace, None, QuantConfig(), (4,), on_progress=stop)
    assert [p.done for p in seen] == [1, 2] and seen[0].total == 3 + len(input_groups(toy.layers))
    assert not any(toy.linear(layer)._forward_pre_hooks for layer in toy.layers)


def test_a_larger_model_is_replayed_in_parts_with_the_same_result(toy, toy_trace, monkeypatch):
    whole = solve(toy, toy_trace, None, QuantConfig(group_size=32), (4,))
    monkeypatch.setattr("workbench.quant.calibration._HESSIAN_BYTES", 4 * 64**2 * 3)
    steps = []
    parts = solve(toy, toy_trace, None, QuantConfig(group_size=32), (4,), on_progress=steps.append)
    assert steps[-1].done == steps[-1].total > 3 + len(input_groups(toy.layers))
    assert torch.equal(whole.weight_error_LC, parts.weight_error_LC)


def test_what_does_not_belong_together_is_refused(toy, toy_trace):
    quant = QuantConfig(group_size=32)
    bank = solve(toy, toy_trace, None, quant, (4,))
    plan = plan_of(toy, toy_trace.integrator, quant, 4, 4)
    with pytest.raises(BadInput, match="another model"):
        build(toy, bank, plan.model_copy(update={"model_hash": "something-else"}))
    with pytest.raises(BadInput, match="was not solved at 8 bits"):
        build(toy, bank, plan_of(toy, toy_trace.integrator, quant, 8, 4))
    with pytest.raises(BadInput, match="with group size 64"):
        build(toy, bank, plan_of(toy, toy_trace.integrator, QuantConfig(group_size=64), 4, 4))
    for wrong in (torch.ones(2, len(toy.layers)), torch.full((3, len(toy.layers)), float("nan"))):
        with pytest.raises(BadInput, match="calibration weights are"):
            solve(toy, toy_trace, wrong, quant, (4,))
    toy.model_hash = "another-model"
    with pytest.raises(BadInput, match="the trace belongs to model toy-model-hash"):
        solve(toy, toy_trace, None, quant, (4,))


def test_more_calibration_samples_are_replayed_in_chunks_with_the_same_result(toy, monkeypatch):
    trace = record(toy, samples=7)
    whole = solve(toy, trace, None, QuantConfig(group_size=32), (4,))
    monkeypatch.setattr("workbench.quant.calibration._TOKENS", 12)
    chunked = solve(toy, trace, None, QuantConfig(group_size=32), (4,))
    torch.testing.assert_close(whole.weight_error_LC, chunked.weight_error_LC, rtol=0.02, atol=0)
