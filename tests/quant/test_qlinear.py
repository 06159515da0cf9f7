"""The quantized layer: what it computes, what it stores, and what it refuses to be made of."""

import copy
import pickle

import pytest
import torch
from lowbit import ops
from lowbit.act_quant.naive import fake_quantize
from lowbit.linear_wnan import naive
from lowbit.quant_linears import cpu as joint_calls
from torch import nn

from workbench.models.denoiser import StepState
from workbench.options import BadInput
from workbench.plans import BitChoice
from workbench.quant import transforms
from workbench.quant.activations import ActFormat
from workbench.quant.activations import fake_quantize as fake
from workbench.quant.grids import predicted_bytes, quantize_nearest
from workbench.quant.lowrank import truncated
from workbench.quant.qlinear import Extras, FloatLinear, LayerFormat, QuantLinear

N_OUT, K_IN = 11, 160


def layer(bits=4, group_size=64, symmetric=True, bias=True, transform="hadamard", **place):
    generator = torch.Generator().manual_seed(0)
    w_NK, b = torch.randn(N_OUT, K_IN, generator=generator), torch.randn(N_OUT, generator=generator)
    mix = transforms.make(transform, K_IN, 0)
    stored = quantize_nearest(mix.weight(w_NK), BitChoice(weight_bits=bits, group_size=group_size, symmetric=symmetric))
    return QuantLinear(stored, b if bias else None, mix, **place)


def dequantize(module):
    """The stored weight of a layer."""
    return naive.dequantize(module.packed_NP, module.scale_NG, module.zero_NG, module.bits, module.group_size, module.k_in)


def tokens():
    x = torch.randn(2, 5, K_IN, generator=torch.Generator().manual_seed(7))
    x[0, 0] = 0
    x[1, 4, 3] = -50.0
    return x


@pytest.mark.parametrize("act_bits", [3, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_computes_what_the_reference_does(act_bits, symmetric):
    step_state = StepState()
    step_state.row = (16, act_bits)
    module, x = layer(symmetric=symmetric, step_state=step_state, layer_index=1), tokens()
    weight_NK = naive.dequantize(module.packed_NP, module.scale_NG, module.zero_NG, 4, 64, K_IN)
    expected = fake_quantize(module.transform.forward(x), act_bits) @ weight_NK.T + module.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)
    if act_bits == 3:
        step_state.row = (3, 16)
        assert not torch.allclose(module(x), expected, atol=0.1), "a layer reads its own column of the row"


def test_activations_stay_float_without_a_row_or_an_index():
    step_state, x = StepState(), tokens()
    alone, followed, weight_only = layer(), layer(step_state=step_state, layer_index=0), layer(step_state=step_state, layer_index=None)
    assert torch.equal(followed(x), alone(x))
    step_state.row = (3,)
    assert torch.equal(weight_only(x), alone(x))
    assert not torch.equal(followed(x), alone(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("bias", [True, False])
def test_resident_bytes_equal_predicted_bytes(bits, group_size, bias):
    module = layer(bits, group_size, bias=bias)
    choice = BitChoice(weight_bits=bits, group_size=group_size)
    real_bytes = sum(t.untyped_storage().nbytes() for t in module.state_dict().values())
    assert real_bytes == module.weight_bytes == predicted_bytes(N_OUT, K_IN, choice, bias)
    module(tokens())
    assert sum(t.untyped_storage().nbytes() for t in module.state_dict().values()) == real_bytes, "a cache is no state"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_stored_tensors_make_the_same_layer_again(symmetric, bias):
    module = layer(3, 64, symmetric, bias, layer_index=0)
    layer_format = LayerFormat.parse(module.format.model_dump_json())
    again = QuantLinear.from_tensors({name: t.clone() for name, t in module.tensors().items()}, layer_format)
    assert torch.equal(again(tokens()), module(tokens())) and again.format == module.format


def broken(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])
    return apply


@pytest.mark.parametrize(("damage", "message"), [
    (broken("packed_NP", lambda t: t[:, :-1]), "packed_NP is"),
    (broken("packed_NP", lambda t: t[:-1]), "packed_NP is"),
    (broken("packed_NP", lambda t: t.to(torch.int32)), "packed_NP is torch.int32"),
    (broken("packed_NP", lambda t: t.flatten()), "packed_NP is"),
    (broken("scale_NG", lambda t: t[:, :1]), "scale_NG is"),
    (broken("scale_NG", lambda t: t.float()), "scale_NG is torch.float32"),
    (broken("scale_NG", lambda t: t * float("nan")), "zero or not finite"),
    (broken("scale_NG", lambda t: t * 0), "zero or not finite"),
    (broken("zero_NG", lambda t: t + 200), "does not fit in 4 bits"),
    (broken("zero_NG", lambda t: t[:, :0]), "zero_NG is"),
    (broken("bias", lambda t: t[:3]), "bias is"),
    (broken("bias", lambda t: t.float()), "expected 16-bit float"),
    (broken("bias", lambda t: t * float("inf")), "bias holds NaN or infinity"),
    (lambda tensors: tensors.pop("zero_NG"), "expected"),
    (lambda tensors: tensors.update(order_K=torch.arange(K_IN)), "order_K"),
])
def test_tensors_that_do_not_fit_are_refused(damage, message):
    module = layer(symmetric=False)
    tensors = module.tensors()
    damage(tensors)
    with pytest.raises(BadInput, match=message):
        QuantLinear.from_tensors(tensors, module.format)


@pytest.mark.parametrize(("field", "value"), [("bits", 5), ("k_in", 0), ("k_in", 1 << 40), ("group_size", 0), ("transform", "x"),
                                              ("layer_index", -1), ("surprise", 1)])
def test_a_format_out_of_range_is_refused(field, value):
    with pytest.raises(BadInput, match=field):
        LayerFormat.parse({**layer().format.model_dump(), field: value})


def test_an_empty_or_longer_format_than_its_tensors_is_refused():
    module = layer()
    with pytest.raises(BadInput, match="packed_NP is"):
        QuantLinear.from_tensors(module.tensors(), module.format.model_copy(update={"k_in": 1 << 20}))


def test_the_bias_is_stored_in_the_16_bit_type_that_keeps_it():
    coarse, fine = torch.tensor([1e-30, 3.0]), torch.tensor([1.0009765625])  # exact in bfloat16, exact in float16 only
    stored = quantize_nearest(torch.ones(2, 8), BitChoice(weight_bits=4, group_size=None))
    identity = transforms.make("none", 8, 0)
    assert torch.equal(QuantLinear(stored, coarse.bfloat16().float(), identity).bias.float(), coarse.bfloat16().float())
    assert torch.equal(QuantLinear(stored, fine, identity).bias.float(), fine)


def test_changing_the_model_type_keeps_the_stored_types_and_drops_the_cache():
    module, x = layer(), tokens()
    before, _ = module(x), module(x.double())  # no kernel takes float64: this one keeps a weight
    assert module._scratch
    state = {name: t.clone() for name, t in module.state_dict().items()}
    nn.Sequential(module).to(torch.float64)
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in module.state_dict().items())
    assert not module._scratch
    torch.testing.assert_close(module(x), before)
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_three_layers_on_one_input_transform_and_quantize_it_once_per_width(monkeypatch):
    calls = []
    real = transforms.ops.act_quant
    monkeypatch.setattr(transforms.ops, "act_quant", lambda *a: calls.append(1) or real(*a))
    step_state, x = StepState(), tokens()
    step_state.row = (4, 4, 8)
    modules = [layer(step_state=step_state, layer_index=i) for i in range(3)]
    shared = [module(x) for module in modules]
    assert len(calls) == 2
    assert all(torch.equal(module(x.clone()), y) for module, y in zip(modules, shared)) and len(calls) == 5


@pytest.mark.parametrize("act", [ActFormat(), ActFormat(clip=0.9), ActFormat(grid="mid_rise"), ActFormat(grid="mid_rise", clip=0.8),
                                 ActFormat(scale="group", group_size=32, grid="mid_rise")], ids=lambda act: act.describe())
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_without_a_kernel_the_same_numbers_come_from_a_float_product(monkeypatch, act, bits):
    module, x = layer(group_size=32, step_state=StepState(), layer_index=0, extras=Extras(act=act)), tokens()
    module.step_state.row = (bits,)
    assert module.format.beyond_kernel() == ()
    with_kernel = module(x)
    if ops.backend().is_kernel:
        assert torch.equal(module.run_fused([], [x])[0], with_kernel)
    monkeypatch.setattr("workbench.quant.qlinear.ops.backend", lambda *_: ops.Backend("emulated", "asked for"))
    emulated = module(x)
    assert module._scratch, "the emulated product keeps its weight"
    torch.testing.assert_close(with_kernel, emulated, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not ops.backend().is_kernel, reason="layers run together on kernels only")
def test_what_is_prepared_for_several_layers_follows_their_steps_their_tensors_and_their_company(monkeypatch):
    step_state, x = StepState(), tokens()
    first, *others = (layer(step_state=step_state, layer_index=i) for i in range(3))
    others = tuple(others)

    def agrees(layers, x=x):
        made = first.run_fused(layers[1:], (x,))
        return made is not None and all(torch.equal(y, each(x)) for y, each in zip(made, layers, strict=True))
    for row in ((4, 4, 8), (3, 8, 4)):
        step_state.row = row
        assert agrees((first, *others)) and agrees((first, others[1])) and agrees((first,)), "other bits, other layers"
    step_state.row = (4, 16, 4)
    assert first.run_fused(others, (x,)) is None
    step_state.row = (4, 4, 4)
    for each in (first, *others):  # new tensors, and other values in them
        each._apply(torch.clone)
        each.scale_NG *= 2
        each.packed_NP.bitwise_not_()
    assert agrees((first, *others)) and agrees((first, *others), x.bfloat16())
    with pytest.raises(ValueError, match="weights of 160 input features"):
        first.run_fused(others, (x[..., :96].contiguous(),))
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]  # after it ran: what is prepared stays behind
    assert all(torch.equal(each(x), first(x)) and torch.equal(each.run_fused((), (x,))[0], first(x)) for each in copies)
    monkeypatch.setattr(joint_calls, "LARGE_INPUT", x.numel() - 1)
    assert agrees((first, *others)), "quantized beforehand"
    assert first.run_fused((layer(step_state=step_state, layer_index=1, group_size=32),), (x,)) is None


def test_a_float_weight_is_the_original_layer_at_16_bits_and_quantizes_activations_below():
    torch.manual_seed(0)
    linear, step_state, x = nn.Linear(K_IN, N_OUT), StepState(), tokens()
    module = FloatLinear(linear, transforms.make("hadamard", K_IN, 0), step_state=step_state, layer_index=0)
    assert torch.equal(module(x), linear(x)) and module.weight is linear.weight
    step_state.row = (4,)
    mix = module.transform
    expected = fake_quantize(mix.forward(x), 4) @ mix.weight(linear.weight).T + linear.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert module.weight_bytes == predicted_bytes(N_OUT, K_IN, BitChoice(weight_bits=16), has_bias=True)


def rich_layer(**place):
    """A layer with everything that goes beyond the plain case."""
    generator = torch.Generator().manual_seed(0)
    w_NK, b = torch.randn(N_OUT, K_IN, generator=generator), torch.randn(N_OUT, generator=generator)
    mix = transforms.make("smooth_hadamard", K_IN, 0, (torch.rand(K_IN, generator=generator) + 0.5).half())
    branch = truncated(mix.weight(w_NK), 3)
    stored = quantize_nearest(mix.weight(w_NK) - branch.value(), BitChoice(weight_bits=4, group_size=64, symmetric=False))
    extras = Extras(act=ActFormat(scale="group", group_size=64, grid="asymmetric"), branch=branch, input_group="first")
    return QuantLinear(stored, b, mix, extras=extras, **place), w_NK, b


def test_a_branch_and_a_smoothing_vector_are_part_of_the_product():
    step_state, x = StepState(), tokens()
    module, w_NK, b = rich_layer(step_state=step_state, layer_index=0)
    mixed = (x / module.transform.smooth_K.float())
    mixed = transforms.make("hadamard", K_IN, 0).forward(mixed)
    residual_NK, low_NK = dequantize(module), module.up_NR.float() @ module.down.down_RK.float()
    for bits in (16, 4):
        step_state.row = (bits,)
        expected = fake(mixed, bits, module.act) @ residual_NK.T + mixed @ low_NK.T + b
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-3)
    step_state.row = (16,)
    # 4-bit weights of unit variance in groups of 64: steps of about 5/15, errors of a tenth, over 160 inputs of size one and one of 50
    torch.testing.assert_close(module(x)[0], (x @ w_NK.T + b)[0], rtol=0, atol=160**0.5 * 0.1 * 5)


def test_what_kernels_do_not_have_is_named():
    assert layer(layer_index=0).format.beyond_kernel() == ()
    rich, _, _ = rich_layer(layer_index=0)
    assert rich.format.beyond_kernel() == ("asymmetric per-64-group activations",)
    weight_only, _, _ = rich_layer()
    assert "activations" not in " ".join(weight_only.format.beyond_kernel())


def test_a_rich_layer_is_stored_and_made_again():
    module, _, _ = rich_layer(layer_index=0)
    layer_format = LayerFormat.parse(module.format.model_dump_json())
    own, shared = ({name: t.clone() for name, t in part.items()} for part in (module.tensors(), module.shared_tensors()))
    assert set(shared) == {"smooth_K", "down_RK"} == set(layer_format.shared_shapes()) and set(own) == set(layer_format.shapes())
    again = QuantLinear.from_tensors(own, layer_format, shared=shared)
    assert torch.equal(again(tokens()), module(tokens())) and again.format == module.format
    with pytest.raises(BadInput, match="expected"):
        QuantLinear.from_tensors(own, layer_format)
    with pytest.raises(BadInput, match="smooth"):
        QuantLinear.from_tensors(own, layer_format, shared={**shared, "smooth_K": shared["smooth_K"] * 0})
    with pytest.raises(BadInput, match="up_NR holds NaN"):
        QuantLinear.from_tensors({**own, "up_NR": own["up_NR"] * float("nan")}, layer_format, shared=shared)
    with pytest.raises(BadInput, match="down_RK is"):
        QuantLinear.from_tensors(own, layer_format, shared={**shared, "down_RK": shared["down_RK"][:2]})


def test_a_static_range_is_stored_with_the_layer():
    w_NK = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    stored, extras = quantize_nearest(w_NK, BitChoice(weight_bits=8, group_size=None)), Extras(
        act=ActFormat(scale="tensor"), range_2=torch.tensor([-2.0, 3.0]).half())
    step_state = StepState()
    step_state.row = (8,)
    module = QuantLinear(stored, None, transforms.make("none", 32, 0), step_state=step_state, layer_index=0, extras=extras)
    assert module.weight_bytes == stored.weight_bytes + 4
    x = torch.full((1, 32), 100.0)
    torch.testing.assert_close(module(x), torch.full((1, 32), 3.0) @ dequantize(module).T, rtol=1e-3, atol=1e-3)
    again = QuantLinear.from_tensors(module.tensors(), module.format, step_state=step_state)
    assert torch.equal(again(x), module(x))
