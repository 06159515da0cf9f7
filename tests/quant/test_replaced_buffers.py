"""What a layer prepared for its calls, and what it keeps of its weight, follows every way in which a buffer can be replaced.

Dimension letters: N out features, K in features.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from lowbit import ops
from torch import nn

from workbench.models.denoiser import StepState
from workbench.plans import BitChoice
from workbench.quant import transforms
from workbench.quant.grids import quantize_nearest
from workbench.quant.qlinear import FloatLinear, QuantLinear

N_OUT, K_IN, BITS = 24, 128, 4
needs_kernels = pytest.mark.skipif(not ops.backend().is_kernel, reason="calls are prepared for kernels only")
NAMES = ("packed_NP", "scale_NG", "zero_NG", "bias")


def layer(seed, step_state):
    generator = torch.Generator().manual_seed(seed)
    w_NK, bias = torch.randn(N_OUT, K_IN, generator=generator), torch.randn(N_OUT, generator=generator)
    mix = transforms.make("hadamard", K_IN, 0)
    stored = quantize_nearest(mix.weight(w_NK), BitChoice(weight_bits=BITS, group_size=32, symmetric=False))
    return QuantLinear(stored, bias, mix, step_state=step_state, layer_index=0)


def following(bits=BITS):
    step_state = StepState()
    step_state.row = (bits,)
    return step_state


def inputs():
    return torch.randn(3, K_IN, generator=torch.Generator().manual_seed(9))


def by_assignment(module, state):
    module.load_state_dict(state, assign=True)


def by_copy(module, state):
    module.load_state_dict(state)


def by_attribute(module, state):
    for name, tensor in state.items():
        setattr(module, name, tensor)


def by_name(module, state):
    for name, tensor in state.items():
        module._buffers[name] = tensor


def by_table(module, state):
    module.__dict__["_buffers"] = dict(state)


def by_data(module, state):
    for name, tensor in state.items():
        getattr(module, name).data = tensor


def by_set(module, state):
    for name, tensor in state.items():
        getattr(module, name).set_(tensor)


def by_move(module, state):
    """As a move to another device does: each tensor becomes another one."""
    others = {module._buffers[name].data_ptr(): tensor for name, tensor in state.items()}
    nn.Sequential(module)._apply(lambda t: others[t.data_ptr()])


def by_strides(module, state):
    """Tensors that no kernel reads in place."""
    for name, tensor in state.items():
        setattr(module, name, torch.stack([tensor, tensor], -1)[..., 0])


WAYS = (by_assignment, by_copy, by_attribute, by_name, by_table, by_data, by_set, by_move, by_strides)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@needs_kernels
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("replace", WAYS)
def test_a_prepared_call_reads_what_took_a_buffers_place(replace, place):
    step_state, x = following(), inputs()
    layers = tuple(layer(seed, step_state) for seed in (0, 1))
    layers[0].run_fused(layers[1:], (x,))
    for seed in (2, 3, 4):  # again: an address may come back
        other = layer(seed, step_state)
        replace(layers[place], state_of(other))
        assert torch.equal(layers[0].run_fused(layers[1:], (x,))[place], other(x)) and torch.equal(layers[place](x), other(x))
        layers[place].scale_NG.mul_(2)
        other.scale_NG.mul_(2)
        assert torch.equal(layers[0].run_fused(layers[1:], (x,))[place], other(x)), "and a change of it in place"


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("replace", [by_attribute, by_data])
def test_a_prepared_call_sees_every_buffer_that_is_replaced(replace, name):
    step_state, x = following(), inputs()
    module, other = layer(0, step_state), layer(1, step_state)
    module.run_fused((), (x,))
    replace(module, {name: state_of(other)[name]})
    [made] = module.run_fused((), (x,))
    module._fused = None
    assert torch.equal(made, module.run_fused((), (x,))[0]) and torch.equal(made, module(x))


@needs_kernels
def test_what_a_prepared_call_reads_is_not_freed_before_it():
    module, x = layer(0, following()), inputs()
    expected = module(x)
    module.run_fused((), (x,))
    call, held = module._fused.call, state_of(module)
    for name in NAMES:
        getattr(module, name).data = torch.empty(0, dtype=held[name].dtype)
    filler = [torch.full_like(held["packed_NP"], 255) for _ in range(50)]  # takes what was freed
    assert torch.equal(call((x,), [BITS], None, None, *module._fused.grid)[0], expected) and filler


@needs_kernels
def test_what_is_prepared_keeps_no_module_alive_and_a_move_gives_the_old_tensors_back():
    module, x = layer(0, following()), inputs()
    module.run_fused((), (x,))
    before = weakref.ref(module.packed_NP.untyped_storage())
    gc.disable()
    try:
        module._apply(torch.clone)
        assert before() is None
        module.run_fused((), (x,))
        gone = weakref.ref(module)
        del module
        assert gone() is None
    finally:
        gc.enable()


COPIES = {"deep": copy.deepcopy, "shallow": copy.copy, "pickled": lambda module: pickle.loads(pickle.dumps(module)),
          "replica": lambda module: module._replicate_for_data_parallel()}


@needs_kernels
@pytest.mark.parametrize("made", COPIES)
def test_a_copy_has_prepared_calls_of_its_own(made):
    x, module = inputs(), layer(0, following())
    [expected] = module.run_fused((), (x,))
    twin = COPIES[made](module)
    twin.__dict__["_buffers"] = dict(twin._buffers)  # a module of its own that shares the tensors
    twin.step_state = following(8)
    assert not torch.equal(twin.run_fused((), (x,))[0], expected), "it follows its own steps"
    other = layer(5, twin.step_state)
    by_attribute(twin, state_of(other))
    assert torch.equal(twin.run_fused((), (x,))[0], other(x)) and torch.equal(module.run_fused((), (x,))[0], expected)


@needs_kernels
def test_a_layer_follows_the_step_state_that_it_has_now():
    x, module = inputs(), layer(0, following(8))
    module.run_fused((), (x,))
    module.step_state = following(3)
    assert torch.equal(module.run_fused((), (x,))[0], module(x))
    module.layer_index = None
    assert module.run_fused((), (x,)) is None


@needs_kernels
def test_two_threads_share_a_layer_and_its_shallow_copy():
    """Each with steps of its own, while what is prepared is thrown away again and again."""
    x, module = inputs(), layer(0, following(3))
    twin, companion = copy.copy(module), layer(1, following(8))
    twin.step_state = following(8)
    expected = {id(each): each(x) for each in (module, twin, companion)}
    wrong = []

    def run(each, company):
        for turn in range(300):
            if turn % 7 == 0:
                each._fused = None
            made = each.run_fused(company, (x,))
            if not all(torch.equal(y, expected[id(one)]) for y, one in zip(made, (each, *company), strict=True)):
                wrong.append(turn)
    callers = [threading.Thread(target=run, args=arguments)
               for arguments in ((module, ()), (twin, (companion,)), (module, (companion,)), (twin, ()))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("replace", WAYS)
def test_the_emulated_product_follows_its_weight(replace, monkeypatch):
    monkeypatch.setattr("workbench.quant.qlinear.ops.backend", lambda *_: ops.Backend("emulated", "asked for"))
    step_state, x = following(), inputs()
    module = layer(0, step_state)
    module(x)
    for seed in (1, 2, 3):
        other = layer(seed, step_state)
        replace(module, state_of(other))
        assert torch.equal(module(x), other(x))
        module.scale_NG.mul_(2)
        other.scale_NG.mul_(2)
        assert torch.equal(module(x), other(x))


@pytest.mark.parametrize("replace", [by_assignment, by_copy, by_data])
def test_a_float_weight_with_quantized_activations_follows_its_weight(replace):
    x, mix = inputs(), transforms.make("hadamard", K_IN, 0)

    def made(seed):
        torch.manual_seed(seed)
        return FloatLinear(nn.Linear(K_IN, N_OUT).requires_grad_(False), mix, step_state=following(), layer_index=0)
    module = made(0)
    module(x)
    for seed in (1, 2, 3):
        other = made(seed)
        replace(module, state_of(other))
        assert torch.equal(module(x), other(x))
