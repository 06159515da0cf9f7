"""Of several compiled libraries in one process, the one that is in use is the one that runs."""

import ctypes
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from lowbit import abi, build, ops

from tests.kernels.test_registered import CALLS

FAILS = "\n".join(f"int {name}() {{ return 1; }}" for name in abi.ARGUMENTS)  # each says that it is out of memory
ENTRY_POINTS = {name: "lowbit_" + name.removeprefix("block_") for name in ops.SCHEMAS}


def addresses(library) -> dict[str, int]:
    """Where each entry point lies."""
    return {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in library.functions.items()}


def mapped(path: str) -> list[range]:
    """Where the code of a library lies in this process."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines if "x" in line[1] and line[-1] == path]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what is mapped")
def test_what_is_called_lies_in_the_library_of_the_instruction_set_in_use(library, isa):
    used = build.result().library
    assert used is library(isa).library and ops.backend().reason == library(isa).reason
    code = mapped(used._name)
    assert code and all(any(at in part for part in code) for at in addresses(used).values())


def test_no_two_instruction_sets_share_a_function(library, able):
    found = [addresses(library(name).library) for name in able]
    assert set(found[0]) == set(abi.ARGUMENTS)
    for one, other in itertools.combinations(found, 2):
        assert not set(one.values()) & set(other.values())


@pytest.fixture(scope="module")
def failing(compiler, tmp_path_factory):
    """A library in which every function says that it is out of memory."""
    path = tmp_path_factory.mktemp("failing") / "failing.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=FAILS, text=True, check=True)
    return build.Built(abi.Library(str(path)), build.ISAS[-1], "failing")


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_every_operation_follows_a_change_of_the_library(name, library, failing, use_built):
    def run():
        made = getattr(ops, name)(*CALLS[name])
        return list(made) if isinstance(made, (tuple, list)) else [made]
    use_built(library("portable"))
    before = run()
    use_built(failing)
    assert ops.backend() == ops.Backend("kernel", "failing")
    with pytest.raises(MemoryError, match=f"{ENTRY_POINTS[name]}: out of memory"):
        run()
    use_built(library("portable"))
    assert all(torch.equal(one, other) for one, other in zip(before, run(), strict=True))
