"""Kernels that several Python threads call at once: ctypes lets them run side by side.

Dimension letters: M tokens, N out features, K in features.
"""

import threading
from pathlib import Path

import pytest
import torch
from lowbit import ops
from lowbit.tensor_cache import LastInputCache

from tests.kernels.layers import ends, layer, signed
from workbench.models.denoiser import StepState
from workbench.plans import BitChoice
from workbench.quant import transforms
from workbench.quant.activations import ActFormat, fake_quantize
from workbench.quant.grids import quantize_nearest
from workbench.quant.qlinear import Extras, QuantLinear

STATM = Path("/proc/self/statm")


@pytest.fixture(autouse=True)
def _on_each_instruction_set(isa):
    assert ops.backend().is_kernel


def side_by_side(*runs, turns=12):
    """Each in a thread of its own, beginning together: whether every turn of it gave what it gives alone, bit for bit."""
    expected, start, wrong = [run() for run in runs], threading.Barrier(len(runs)), []

    def repeat(number):
        start.wait()
        for turn in range(turns):
            try:
                made = runs[number]()
            except Exception as error:  # it is told by the test, not by the thread
                wrong.append((number, turn, error))
                return
            if not all(torch.equal(one, other) for one, other in zip(expected[number], made, strict=True)):
                wrong.append((number, turn))
    callers = [threading.Thread(target=repeat, args=(number,)) for number in range(len(runs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return wrong == [] or wrong


def every_kernel(bits, act_bits, m, n_out, k_in, dtype, seed):
    """All entry points on tensors of its own."""
    x_MK, weight = signed(m, k_in, seed, dtype), layer(bits, 32, bits % 2 == 0, n_out, k_in, seed)
    (packed_NP, scale_NG, zero_NG, *_), bias_N = weight, ends(0, n_out, 1, dtype, seed)[0]
    signs_K = torch.sign(torch.randn(k_in, generator=torch.Generator().manual_seed(seed)))
    x_BSD, shift_BD = x_MK[None], x_MK[1:2].clone()
    angle_SC = torch.linspace(0, 6, m * 16).view(m, 16)
    norm = (torch.linspace(0.5, 1.5, 16).to(dtype),)

    def run():
        q, scale = ops.act_quant(x_MK, signs_K, 32, act_bits, 0)
        fused_linears = ops.quant_linears((x_MK,), signs_K, 32, (act_bits, 8), 0, (packed_NP,) * 2, (scale_NG,) * 2, (zero_NG,) * 2,
                                          (bits,) * 2, 32, (bias_N, None), (False, True), None, None)
        streams = [(x_BSD[..., :32],)] * 3
        return [q, scale, *fused_linears, ops.block_hadamard(x_MK, 32, signs_K),
                ops.linear_wnan(q, scale, *weight, bias_N, None, None, True, dtype),
                ops.linear_wna16(x_MK, *weight, None, None, None, False), ops.modulate(x_BSD, shift_BD, shift_BD, 1e-6),
                *ops.attention(*streams, norm, norm, angle_SC.cos(), angle_SC.sin(), 1e-6)]
    return run


@pytest.mark.parametrize("count", [1, 2])
def test_kernels_of_other_shapes_and_widths_do_not_mix(count, threads):
    threads(count)
    assert side_by_side(every_kernel(4, 8, 45, 131, 320, torch.float32, 0), every_kernel(3, 4, 80, 70, 96, torch.bfloat16, 1),
                        every_kernel(8, 6, 9, 1100, 64, torch.float32, 2)) is True


def quantized(seed, bits, act_bits, transform="hadamard", n_out=40, **extras):
    step_state = StepState()
    step_state.row = (act_bits,)
    w_NK, mix = torch.randn(n_out, 160, generator=torch.Generator().manual_seed(seed)), transforms.make(transform, 160, 0)
    stored = quantize_nearest(mix.weight(w_NK), BitChoice(weight_bits=bits, group_size=32))
    return QuantLinear(stored, w_NK[:, 0], mix, step_state=step_state, layer_index=0, extras=Extras(**extras))


def test_layers_that_share_a_transform_do_not_mix():
    """Two models have the same transforms, and what these remember of their last input; one has a quantizer that is emulated."""
    def model(seed, *acts, **extras):
        layers = tuple(quantized(seed + i, 4, bits, **extras) for i, bits in enumerate(acts))
        x = signed(20, 160, seed)

        def run():
            made = layers[0].run_fused(layers[1:], (x,)) or []
            y = x.clone()
            return [*made, *(each(x) for each in layers), *(each(y) for each in layers), fake_quantize(x, acts[0])]
        return run
    assert side_by_side(model(0, 4, 8, 8), model(10, 4, 3, 8), model(20, 4, 8, act=ActFormat(grid="asymmetric"))) is True


def test_two_threads_prepare_the_same_layers_and_share_them():
    first, second = quantized(0, 4, 8), quantized(1, 4, 4)
    x = signed(20, 160, 3)

    def run():
        first._fused = None
        first.packed_NP.__dict__.clear()  # what is remembered on a weight
        return [*first.run_fused((second,), (x,)), first(x), second(x)]
    assert side_by_side(run, run, lambda: [*first.run_fused((second,), (x,)), *second.run_fused((first,), (x,))]) is True


def test_each_thread_keeps_its_own_last_input():
    tensor_cache, calls, x = LastInputCache(), [], torch.ones(3)

    def double(x):
        return tensor_cache.get(x, "key", lambda: calls.append(threading.get_ident()) or x * 2)
    double(x)
    other = threading.Thread(target=lambda: double(torch.ones(4)))
    other.start()
    other.join()
    double(x)
    assert len(calls) == 2, "another thread's input drove nothing out"
    del x
    assert not tensor_cache._slots


@pytest.mark.skipif(not STATM.exists(), reason="the system does not tell how much memory is resident")
def test_scratch_ends_with_its_thread():
    x_MK, weight = signed(256, 4096, 0), layer(4, 64, True, 64, 4096, 0)  # a megabyte of quantized tokens

    def run():
        ops.quant_linears((x_MK,), None, 256, (8,), 0, *((part,) for part in weight[:4]), 64, (None,), (False,), None, None)

    def in_threads(count):
        for _ in range(count):
            caller = threading.Thread(target=run)
            caller.start()
            caller.join()
        return int(STATM.read_text().split()[1]) * 4096
    before = in_threads(3)
    assert in_threads(60) - before < 20 << 20, "of 60 threads"
