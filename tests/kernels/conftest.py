"""Fixtures of the kernel tests: the C kernels compiled for every instruction set this CPU can run, and poisoned outputs."""

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import ctypes
import os
import subprocess

import pytest
import torch
from lowbit import abi, build

VNNI_256 = frozenset(("avx512vl", "avx512_vnni"))
# name -> (instruction set, what the CPU must list besides, more compiler flags). "avxvnni" takes the instruction's AVX-512 encoding
# where the CPU lacks the other one: the same code path. "avx512 without more": as on a CPU that has neither VBMI nor BF16.
VARIANTS = {"amx": ("amx", frozenset(), ()), "avx512": ("avx512", frozenset(), ()),
            "avx512 without more": ("avx512", frozenset(), ("-mno-avx512vbmi", "-mno-avx512bf16")),
            "avxvnni": ("avx2", VNNI_256, ("-DLOWBIT_TEST_AVXVNNI",)), "avx2": ("avx2", frozenset(), ()),
            "portable": ("portable", frozenset(), ())}


@pytest.fixture(scope="session")
def compiler() -> str:
    """Path of a C compiler; skips where there is none."""
    found = build._compiler()
    return found or pytest.skip("no C compiler")


@pytest.fixture(scope="session")
def library(compiler, tmp_path_factory):
    """name -> Built, compiled once, with the flags the product uses; skips what this CPU cannot run."""
    loaded, folder = {}, os.environ.get("LOWBIT_CACHE") or tmp_path_factory.mktemp("kernels")
    runtime = build._openmp_runtime()
    if runtime:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)

    def load(name):
        isa_name, more, extra = VARIANTS[name]
        isa = next(isa for isa in build.ISAS if isa.name == isa_name)
        if not isa.needs | more <= build.cpu_flags():
            pytest.skip(f"this CPU has no {' '.join(sorted((isa.needs | more) - build.cpu_flags()))}")
        if name not in loaded:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOWBIT_CACHE", str(folder))
                path = build.compile_library(isa, compiler, openmp=bool(runtime), extra=extra)
            loaded[name] = build.Built(abi.Library(str(path)), isa, isa.label)
        return loaded[name]
    return load


@pytest.fixture(scope="session")
def able() -> list[str]:
    """Names of the variants that this CPU runs."""
    needs = {isa.name: isa.needs for isa in build.ISAS}
    return [name for name, (isa, more, _) in VARIANTS.items() if needs[isa] | more <= build.cpu_flags()]


@pytest.fixture(params=VARIANTS)
def isa(request, library, monkeypatch) -> str:
    """The test runs on the kernels of each instruction set in turn."""
    use(library(request.param), monkeypatch)
    return request.param


@pytest.fixture
def use_built(monkeypatch):
    """A function that makes the operations run on what a build came to."""
    return lambda built: use(built, monkeypatch)


def use(built, monkeypatch):
    monkeypatch.setattr(build, "result", lambda: built)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What torch.empty returns is full of NaN (integers: their largest), so that a value left unwritten is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of torch's threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def address_sanitizer(compiler) -> str:
    """The compiler, where it brings AddressSanitizer's runtime; skips elsewhere."""
    made = subprocess.run([compiler, "-fsanitize=address,undefined", "-x", "c", "-", "-o", "/dev/null"], input="int main(void){return 0;}",
                          capture_output=True, text=True)
    return compiler if made.returncode == 0 else pytest.skip("the compiler brings no AddressSanitizer")
