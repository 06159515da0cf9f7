"""The Triton kernels: run by the interpreter and, where there is one, on a GPU (`triton_cases.py`); compiled for Hopper without one
(`triton_compiled.py`). Each in a process of its own, because Triton is interpreted or not for the whole life of a process."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import pytest
import torch
from lowbit import gpu
from lowbit.act_quant import triton as act_triton
from lowbit.hadamard import triton as hadamard_triton
from lowbit.linear_wna16 import triton as wna16_triton
from lowbit.linear_wnan import triton as wnan_triton
from packaging.version import Version

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreter_fails() -> str:
    """Why the installed Triton cannot interpret, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    installed = importlib.metadata.version("triton")
    return f"the interpreter of Triton {installed} does not know NumPy 2.4; 3.8 does" if Version(installed) < Version("3.8") else ""


def run(root, tmp_path, *command, **environment) -> str:
    """Standard output of a Python process; its whole output is shown if it fails."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and not name.startswith("PYTEST")}
    environment = plain | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *map(str, command)], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(interpreter_fails()), reason=interpreter_fails())
def test_kernels_match_their_references_in_the_interpreter(root, tmp_path):
    assert " passed" in run(root, tmp_path, "-m", "pytest", "-x", HERE / "triton_cases.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_match_their_references_on_the_gpu(root, tmp_path):
    assert " passed" in run(root, tmp_path, "-m", "pytest", "-x", HERE / "triton_cases.py")


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_hopper_and_use_its_int8_and_fp8_matrix_units(root, tmp_path):
    kernels = json.loads(run(root, tmp_path, HERE / "triton_compiled.py", 90))
    assert set(kernels) == {"act_quant", "block_hadamard", "expand", "group_sums", "multiply", "multiply_few"}
    found = [name for kernel in kernels["multiply"] for name in kernel["instructions"]]
    units = [name.rpartition("k32.")[2] for name in found if "wgmma" in name and "k32" in name]
    assert len(units) == len(kernels["multiply"]) and units.count("s32.s8.s8") == 6 and units.count("f32.e4m3.e4m3") == 4
    few = [" ".join(kernel["instructions"]) for kernel in kernels["multiply_few"]]
    assert sum("s32.s8.s8.s32" in names for names in few) == 4, "int8 activations meet the weights as int8"
    assert sum("f32.bf16.bf16.f32" in names and "s8" not in names for names in few) == 4, "16-bit activations meet them in 16 bits"
    for kernel in kernels["block_hadamard"] + kernels["act_quant"] + kernels["expand"]:
        assert kernel["stack_bytes"] == 0, "a row stays in registers"


@needs_triton
@pytest.mark.slow
def test_blackwell_ultra_multiplies_large_tiles_in_fp8_only(root, tmp_path):
    """Which is why codes of few bits are held in FP8 there: int8 is left to the instructions of a warp."""
    kernels = json.loads(run(root, tmp_path, HERE / "triton_compiled.py", 103))["multiply"]
    products = [" ".join(kernel["instructions"]) for kernel in kernels]
    in_fp8 = [names for names in products if "tcgen05.mma.cta_group::1.kind::f8f6f4" in names]
    assert (10, 3) in gpu.FP8_CHOSEN and len(in_fp8) == 4
    assert all("mma.sync" in names and "s32.s8.s8" in names and "kind::i8" not in names for names in products if names not in in_fp8)


def on_gpu(monkeypatch, capability):
    """A tensor that passes for one on such a GPU."""
    monkeypatch.delenv("LOWBIT_GPU", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return SimpleNamespace(is_cuda=True, device="cuda")


def test_fp8_is_chosen_where_it_is_exact_and_by_published_rates_the_faster(monkeypatch):
    assert [bits for bits in (3, 4, 5, 8, 16) if gpu.chooses_fp8(on_gpu(monkeypatch, (10, 3)), bits)] == [3, 4]
    assert not gpu.chooses_fp8(torch.ones(1), 4), "not on a CPU"
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        assert not gpu.chooses_fp8(on_gpu(monkeypatch, capability), 4)


def test_fp8_is_taken_or_left_on_request(monkeypatch):
    for capability, asked, taken in (((8, 0), "fp8", False), ((10, 3), "int8", False), ((9, 0), "fp8", True)):
        x = on_gpu(monkeypatch, capability)
        monkeypatch.setenv("LOWBIT_GPU", asked)
        assert gpu.chooses_fp8(x, 4) == taken
        assert gpu.why_not_fp8(x) == ("compute capability 8.0 has no FP8 units" if capability == (8, 0) else "")
    monkeypatch.setenv("LOWBIT_GPU", "fp4")
    with pytest.raises(ValueError, match="LOWBIT_GPU is 'fp4'; use fp8, int8 or nothing"):
        gpu.chooses_fp8(x, 4)


def arguments(**changed):
    """One set of arguments that every kernel's reasons can be asked about."""
    return {"x": torch.ones(2, 64), "factor_K": torch.ones(64), "block": 64, "bits": 8, "group_size": 0} | changed


@pytest.mark.parametrize(("changed", "reason"), [
    ({"group_size": 24}, "a group of 24 is not a power of two"),
    ({"x": torch.ones(2, 64, dtype=torch.float64)}, "float64 input"),
])
def test_what_a_kernel_cannot_do_is_the_reason(changed, reason):
    assert act_triton.why_not(**arguments(**changed)) == reason


def test_rotations_that_do_not_fit_are_the_reason():
    assert hadamard_triton.why_not_rotated(1 << 16, 256) == "65536 features are more than 32768"
    assert hadamard_triton.why_not_rotated(1024, 512) == "a block of 512 is not a power of two up to 256"
    assert hadamard_triton.why_not_rotated(3072, 256) == ""


def test_layers_without_input_features_or_of_another_type_are_the_reason():
    empty, layer = torch.ones(2, 0), (None, None, None, 4, 0, None, None, None, False)
    assert wna16_triton.why_not(empty, *layer) == wnan_triton.why_not(empty, None, *layer, torch.float32) == "no input features"
    assert wnan_triton.why_not(empty, None, *layer, torch.float64) == "float64 output"


def test_a_machine_that_cannot_run_them_is_the_reason(monkeypatch):
    x = torch.ones(2, 64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not(x) == hadamard_triton.why_not(x, 64, x[0]) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.why_not(x) == "the tensor is not on a GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.why_not(x) == ""
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.why_not(x) == "Triton is not installed"


def test_triton_is_not_imported_before_a_kernel_is_launched(root, tmp_path):
    code = ("import workbench, sys\nfrom lowbit.act_quant import triton\nfrom lowbit.hadamard import triton\n"
            "from lowbit.linear_wnan import triton\nfrom lowbit.linear_wna16 import triton\nprint('triton' in sys.modules)")
    assert run(root, tmp_path, "-c", code).strip() == "False"
