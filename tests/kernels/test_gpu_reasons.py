"""Where a CUDA device is there and its kernels do not run, the reason is told. No GPU is needed: torch is made to say that it has one."""

import importlib.util
import sys
from types import SimpleNamespace

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import pytest
import torch
from lowbit import gpu, ops
from lowbit.linear_wna16 import triton as wna16_triton

from tests.quant.test_qlinear import layer
from workbench.models.denoiser import StepState
from workbench.quant.activations import ActFormat
from workbench.quant.qlinear import Extras
from workbench.quant.quantize import QuantizedModel
from workbench.ui.views.compare import compute_badge


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    """What was found out about the real machine is forgotten, and what the stand-in said afterwards."""
    for name in ("LOWBIT_GPU", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    ops._backend.cache_clear()
    yield
    ops._backend.cache_clear()


@pytest.fixture
def gpu_of(monkeypatch):
    """A function that makes torch say it has a GPU (capability None: it has none), and Triton installed or not."""
    def pretend(capability=(9, 0), triton=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.delitem(sys.modules, "triton", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if triton else None)
    return pretend


def on_gpu(*modules):
    """(backend, what the screen shows) of a quantized model on a CUDA device in bfloat16."""
    model = QuantizedModel(plan=None, bundle=None, layers=dict(enumerate(modules)), state=StepState(), weight_bytes=0)
    backend = model.compute(SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16))
    return backend, compute_badge(backend.name, backend.reason)


@pytest.mark.parametrize(("machine", "reason"), [
    ({"triton": False}, "Triton is not installed"),
    ({"capability": None}, "no CUDA device"),
    ({"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
])
def test_a_machine_without_kernels_is_the_reason_on_the_screen(machine, reason, gpu_of):
    gpu_of(**machine)
    assert ops.backend("cuda", torch.bfloat16) == ops.Backend("emulated", reason)
    backend, shown = on_gpu(layer(layer_index=0))
    assert backend == ops.Backend("emulated", reason) and reason in shown


@pytest.mark.parametrize(("device_type", "dtype", "reason"), [
    ("cuda", torch.float64, "float64 is not a format of the kernels"), ("cpu", torch.int8, "int8 is not a format of the kernels"),
    ("mps", torch.float32, "no kernel for mps devices")])
def test_another_type_or_device_is_the_reason(device_type, dtype, reason, gpu_of):
    gpu_of()
    assert ops.backend(device_type, dtype) == ops.Backend("emulated", reason)


def test_layers_that_the_kernels_of_a_gpu_leave_out_are_the_reason_on_the_screen(gpu_of, monkeypatch):
    gpu_of()
    plain = layer(layer_index=0)
    backend, _ = on_gpu(plain)
    assert backend == ops.Backend("kernel", "int8 matrix units, by Triton; not yet measured on a GPU")
    monkeypatch.setattr("lowbit.hadamard.triton.LARGEST_K", 128)  # a layer of more than 32768 features would be large
    backend, shown = on_gpu(plain, layer(layer_index=1), layer(layer_index=2, extras=Extras(act=ActFormat(grid="asymmetric"))))
    reason = "no kernel has asymmetric per-token activations; the kernels leave layers out: 160 features are more than 128"
    assert backend == ops.Backend("emulated", reason) and reason in shown
    alone = QuantizedModel(plan=None, bundle=None, layers={0: plain}, state=StepState(), weight_bytes=0)
    cpu = alone.compute(SimpleNamespace(device=torch.device("cpu"),
                                                                                                dtype=torch.float32))
    assert cpu == ops.backend(), "they are limits of a GPU"


@pytest.mark.parametrize(("sizes", "reason"), [
    ((3072, 256, 64), ""), ((3072, 256, 0), ""), ((96, 32, 48), "a group of 48 is not a power of two"),
    ((1 << 16, 256, 0), "65536 features are more than 32768"), ((1024, 512, 0), "a block of 512 is not a power of two up to 256")])
def test_sizes_that_the_kernels_of_a_gpu_do_not_take_are_the_reason(sizes, reason):
    assert ops.why_not_layer("cuda", *sizes) == reason
    assert ops.why_not_layer("cpu", *sizes) == ""


def test_units_that_were_asked_for_and_are_not_there_are_told(gpu_of, monkeypatch):
    gpu_of((8, 0))
    assert gpu.units() == "int8 matrix units"
    monkeypatch.setenv("LOWBIT_GPU", "fp8")
    assert "(FP8 ones were asked for: compute capability 8.0 has no FP8 units), by Triton" in ops.backend("cuda").reason
    gpu_of((9, 0))
    assert gpu.units() == "int8 matrix units (FP8 ones for activations up to 4 bits)"


def test_a_single_operation_without_its_kernel_says_so(gpu_of, monkeypatch):
    gpu_of()
    run, x = ops._on_gpu("block_hadamard"), torch.ones(2, 64)
    monkeypatch.setattr("lowbit.hadamard.triton.why_not", lambda *_: "the reason")
    with pytest.warns(RuntimeWarning, match="lowbit.block_hadamard runs without a kernel: the reason"):
        made = run(x, 32, torch.ones(64))
    assert torch.equal(made, ops._DEFAULT["block_hadamard"](x, 32, torch.ones(64)))
    assert wna16_triton.why_not(x, None, None, None, 4, 0, None, None, None, False) == "the tensor is not on a GPU"
