"""Each method is the composition its paper describes, runs end to end at 16, 8 and 4 bits, and stores what it says."""

import sys

import pytest
import torch

from tests.quant.toy import make_toy, method_plan, output, record, solve
from workbench import methods
from workbench.methods import METHODS, Method
from workbench.options import QuantConfig
from workbench.quant.quantize import build

NAMES = list(METHODS)
ORDER = ["rtn", "smoothquant", "quarot", "gptq", "viditq", "qdit", "svdquant", "adatsq_uniform", "adatsq", "adatsq_smooth",
         "adatsq_grouped", "adatsq_lowrank"]


@pytest.fixture(scope="module")
def bases():
    """For every method: the toy, its trace, and banks solved at 4, 8 and 16 bits."""
    toy = make_toy()
    trace, alpha_TL = record(toy), torch.tensor([1.5, 0.5, 1.0])[:, None].expand(3, len(toy.layers))
    return toy, trace, {name: solve(toy, trace, alpha_TL, METHODS[name].quant, (4, 8, 16)) for name in METHODS}


def outputs(model, trace):
    """The model's output at every step of the trace."""
    return torch.stack([output(model, trace, t) for t in range(trace.steps)], 1)


def test_the_papers_methods_are_here_in_its_order():
    assert NAMES == ORDER
    for name, method in METHODS.items():
        assert method.name == name and method.label and method.description
        assert method.allocation in ("uniform", "plan") and method.groups in ("fixed", "evolved")


@pytest.mark.parametrize(("name", "parts"), [
    ("rtn", ("none", "nearest", "none", None, "symmetric", "token", "symmetric", 1.0, 0)),
    ("smoothquant", ("smooth", "nearest", "none", None, "symmetric", "token", "symmetric", 1.0, 0)),
    ("quarot", ("hadamard", "gptq", "uniform", None, "symmetric", "token", "symmetric", 0.9, 0)),
    ("gptq", ("none", "gptq", "uniform", None, "symmetric", "token", "symmetric", 1.0, 0)),
    ("viditq", ("smooth_hadamard", "nearest", "none", None, "asymmetric", "token", "asymmetric", 1.0, 0)),
    ("qdit", ("none", "gptq", "uniform", 64, "asymmetric", "group", "asymmetric", 1.0, 0)),
    ("svdquant", ("smooth", "nearest", "none", 64, "symmetric", "group", "symmetric", 1.0, 1 / 3)),
    ("adatsq", ("hadamard", "gptq", "fisher", 64, "signed", "token", "mid_rise", 1.0, 0)),
    ("adatsq_grouped", ("hadamard", "gptq", "fisher", 64, "signed", "group", "asymmetric", 1.0, 0)),
    ("adatsq_lowrank", ("hadamard", "gptq", "fisher", 64, "signed", "group", "mid_rise", 1.0, 1 / 3)),
    ("adatsq_smooth", ("smooth", "gptq", "fisher", 64, "signed", "token", "symmetric", 1.0, 0)),
])
def test_methods_are_composed_as_published(name, parts):
    quant = METHODS[name].quant
    assert (quant.transform, quant.solver, quant.hessian, quant.group_size, quant.weight_grid, quant.act_scale, quant.act_grid,
            quant.act_clip, quant.branch_bits) == parts


def test_the_papers_constants():
    assert METHODS["smoothquant"].quant.smooth_alpha == 0.5 and METHODS["viditq"].quant.smooth_alpha == 0.3
    assert METHODS["svdquant"].quant.smoothing == "search" and METHODS["gptq"].quant.damping == 0.01
    assert [name for name, method in METHODS.items() if method.groups == "evolved"] == ["qdit"]


def test_only_the_allocation_separates_adatsq_from_its_uniform_rival():
    assert METHODS["adatsq"].quant == METHODS["adatsq_uniform"].quant
    assert (METHODS["adatsq"].allocation, METHODS["adatsq_uniform"].allocation) == ("plan", "uniform")


def test_a_new_file_is_all_a_new_method_takes(tmp_path, monkeypatch):
    (tmp_path / "borrowed").mkdir()
    for name, order in (("second", 2), ("first", 1)):
        (tmp_path / "borrowed" / f"{name}.py").write_text(
            "from workbench.methods.method import Method\nfrom workbench.options import QuantConfig\n"
            f"METHOD = Method(name='{name}', label='{name}', quant=QuantConfig(), allocation='uniform', description='x', order={order})\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = methods.discover([str(tmp_path / "borrowed")], "borrowed")
    assert list(found) == ["first", "second"] and found["first"].quant == QuantConfig()
    for name in ("first", "second"):
        sys.modules.pop(f"borrowed.{name}", None)


def test_two_methods_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "twins").mkdir()
    for name in ("a", "b"):
        (tmp_path / "twins" / f"{name}.py").write_text("from workbench.methods import rtn\nMETHOD = rtn.METHOD\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="one name"):
        methods.discover([str(tmp_path / "twins")], "twins")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modulation", ["stored", "cached"])
def test_at_16_bits_every_method_is_the_float_model_bit_for_bit(name, modulation):
    toy = make_toy()
    trace = record(toy)
    quant = METHODS[name].quant.model_copy(update={"modulation_bits": 16, "modulation": modulation})
    bank = solve(toy, trace, None, quant, (16,))
    assert torch.equal(outputs(build(toy, bank, method_plan(toy, trace.integrator, quant, 16, 16)), trace), trace.output_ST)


@pytest.mark.parametrize("name", NAMES)
def test_each_method_runs_end_to_end_and_eight_bits_are_closer_than_four(bases, name):
    toy, trace, banks = bases
    errors = {}
    for bits in (8, 4):
        made = outputs(build(toy, banks[name], method_plan(toy, trace.integrator, METHODS[name].quant, bits, bits)), trace)
        errors[bits] = float((made - trace.output_ST).square().sum() / trace.output_ST.square().sum())
    # an 8-bit grid is 16 times finer than a 4-bit one, 256 times in the square; modulation stays at 8 bits, and clipped
    # activations lose their peaks at any width
    assert 0 < errors[8] < errors[4] / (16 if METHODS[name].quant.act_clip == 1 else 4) and errors[4] < 0.1
    assert torch.equal(outputs(toy, trace), trace.output_ST), "the float model is as it was"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modulation", ["stored", "cached"])
def test_stored_bytes_equal_predicted_bytes(bases, name, modulation):
    toy, trace, banks = bases
    quant = METHODS[name].quant.model_copy(update={"modulation": modulation})
    bank = banks[name] if modulation == "stored" else solve(toy, trace, None, quant, (4, 8, 16))
    # k keeps its float weight; a branch is counted for its input even where every layer of that input does
    widths_L = [16 if layer.role == "k" else (4, 8)[layer.index % 2] for layer in toy.layers]
    plan = method_plan(toy, trace.integrator, quant, widths_L, 4)
    quantized = build(toy, bank, plan)
    own = quantized.modules["transformer"]
    held = {buffer.data_ptr(): buffer.untyped_storage().nbytes() for buffer in own.buffers()}
    in_float = 2 * sum(p.numel() for p in own.parameters())
    shared = {t.data_ptr(): t.untyped_storage().nbytes() for module in quantized.layers.values() if hasattr(module, "shared_tensors")
              for t in module.shared_tensors().values()}
    cached = 2 * 3 * sum(layer.n_out for layer in toy.modulation) if modulation == "cached" else 0
    assert quantized.weight_bytes == plan.weight_bytes == in_float + sum(held.values()) + sum(shared.values()) + cached


@pytest.mark.parametrize("name", NAMES)
def test_solving_never_loses_against_rounding_the_same_weights(bases, name):
    _, _, banks = bases
    assert all(report.loss_solved <= report.loss_rtn * (1 + 1e-6) for report in banks[name].reports.values())


def test_what_each_base_stores_is_what_it_is_made_of(bases):
    _, _, banks = bases
    for name, bank in banks.items():
        quant = METHODS[name].quant
        layer = next(layer.name for layer in bank.layers if layer.has_act_bits)
        assert (layer in bank.branches) == (quant.branch_bits > 0)
        assert bank.transform(layer).name == quant.transform
        assert (bank.weights[layer, 4].zero_NG is not None) == (quant.weight_grid == "asymmetric")
        assert bank.weights[layer, 4].group_size == quant.group_size
    assert isinstance(METHODS["rtn"], Method)
