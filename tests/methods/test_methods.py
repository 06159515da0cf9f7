"""Each method is the composition its paper describes."""

import pytest

from workbench.methods import METHODS


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
