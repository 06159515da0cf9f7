"""Each method is the composition its paper describes."""

import pytest
import torch

from tests.quant.toy import make_toy, plan_of, record
from workbench.methods import METHODS
from workbench.quant.quantize import build, solve_bank


def test_every_method_is_registered_by_its_own_name_and_describes_itself():
    assert list(METHODS) == ["rtn", "gptq", "adatsq_uniform", "adatsq"]
    for name, method in METHODS.items():
        assert method.name == name and method.label and method.description
        assert method.allocation in ("uniform", "plan")


@pytest.mark.parametrize(("name", "parts"), [
    ("rtn", ("none", "nearest", "uniform", None)),
    ("gptq", ("none", "gptq", "uniform", None)),
    ("adatsq", ("hadamard", "gptq", "fisher", 64)),
])
def test_methods_are_composed_as_published(name, parts):
    quant = METHODS[name].quant
    assert (quant.transform, quant.solver, quant.hessian, quant.group_size) == parts


def test_only_the_allocation_separates_adatsq_from_its_uniform_rival():
    assert METHODS["adatsq"].quant == METHODS["adatsq_uniform"].quant
    assert (METHODS["adatsq"].allocation, METHODS["adatsq_uniform"].allocation) == ("plan", "uniform")


@pytest.mark.parametrize("name", list(METHODS))
def test_at_16_bits_every_method_is_the_float_model_and_at_4_it_is_not(name):
    toy = make_toy()
    trace, quant = record(toy), METHODS[name].quant.model_copy(update={"modulation_bits": 16})
    bank = solve_bank(toy, trace, None, quant, (4, 16))
    for bits, equal in ((16, True), (4, False)):
        with build(toy, bank, plan_of(toy, trace.schedule, quant, bits, bits)).attached(toy), torch.no_grad():
            output = toy.velocity(trace.latent_STMD[:, 1], trace.schedule, 1, trace.conditioning)
        assert torch.equal(output, trace.target_STMD[:, 1]) == equal


@pytest.mark.parametrize("name", ["gptq", "adatsq"])
def test_solved_weights_beat_rounded_ones_on_what_the_layers_put_out(name):
    toy = make_toy()
    trace, quant = record(toy), METHODS[name].quant
    solved, rounded = (solve_bank(toy, trace, None, quant.model_copy(update={"solver": solver}), (4,)).weight_error_LC
                       for solver in (quant.solver, "nearest"))
    assert bool((solved < rounded).all())
