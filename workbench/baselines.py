"""Other libraries' int8 transformers, where they are installed: the same model, timed in turns.

None of them is needed: a library that is missing, or that does not run this model, is left out with the reason. Those that
quantize a torch module are given the lean forward too, which is more than they have by themselves, and the float type that is
faster for them. ONNX Runtime has a graph of its own, made of diffusers' forward, which computes every step whole.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from workbench import bench
from workbench.models import Bundle
from workbench.options import OnProgress, Progress, ignore_progress

LARGEST = 1_000_000_000  # parameters that are exported: in float32 that is 4 GB, written to a folder and read again


def _in_place(quantize: Callable[[nn.Module], None]):
    """A library that quantizes a torch module where it stands."""
    def made(bundle: Bundle, steps: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
        model = copy.deepcopy(bundle.transformer).to(dtype)
        quantize(model)
        tensors = (*model.parameters(), *model.buffers())
        return bench.generation(bundle, steps, bundle.with_modules({"transformer": model}, dtype)), sum(map(tensor_bytes, tensors))
    return made


def _torchao(model: nn.Module) -> None:
    """Weights int8 per channel, activations int8 per token, dynamic."""
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())


def _quanto(model: nn.Module) -> None:
    """Weights int8 per channel; its activations are static and need a calibration, so they stay float here."""
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


class _Exported(nn.Module):
    """Stands in a transformer's place. Its first call exports the transformer for inputs of these shapes and quantizes it: weights
    int8 per channel, activations 8 bits per tensor, dynamic. ONNX Runtime computes that call and all that follow."""

    is_cache_enabled = True  # what makes a bundle call the whole forward, not the lean one

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer, self.session, self.bytes = transformer, None, 0

    def forward(self, *, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        given = {name: value for name, value in inputs.items() if not name.endswith("_ids")}
        if self.session is None:
            self._export(given, {name: value for name, value in inputs.items() if name not in given})
        return (torch.from_numpy(self.session.run(None, {name: value.numpy() for name, value in given.items()})[0]),)

    def _export(self, given: dict[str, torch.Tensor], positions: dict[str, torch.Tensor]) -> None:
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
        quantization = importlib.import_module("onnxruntime.quantization")
        with tempfile.TemporaryDirectory() as folder:
            whole, quantized = str(Path(folder, "float.onnx")), str(Path(folder, "int8.onnx"))
            torch.onnx.export(_Placed(self.transformer, positions).eval(), kwargs=given, f=whole, input_names=list(given), dynamo=True,
                              verbose=False)
            quantization.quantize_dynamic(whole, quantized, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                                          weight_type=quantization.QuantType.QInt8)
            self.bytes = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in onnx.load(quantized).graph.initializer)
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down whoever is timed next
            self.session = runtime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
        self.transformer = None


class _Placed(nn.Module):
    """A transformer whose token positions are constants, so that rotations are computed once, at export."""

    def __init__(self, transformer: nn.Module, positions: dict[str, torch.Tensor]):
        super().__init__()
        self.transformer, self.positions = transformer, positions

    def forward(self, **given: torch.Tensor) -> torch.Tensor:
        return self.transformer.forward(**given, **self.positions, return_dict=False)[0]


def _onnxruntime(bundle: Bundle, steps: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Its int8 products take and give float32, and run on a CPU."""
    if dtype != torch.float32 or bundle.device.type != "cpu":
        raise ValueError(f"runs in float32 on a CPU, not in {str(dtype).removeprefix('torch.')} on {bundle.device.type}")
    if bundle.parameters > LARGEST:
        raise ValueError(f"{bundle.parameters / 1e9:.1f}e9 parameters; models above {LARGEST / 1e9:.0f}e9 are not exported")
    exported = _Exported(bundle.transformer)
    run = bench.generation(bundle, steps, bundle.with_modules({"transformer": exported}, dtype))
    run()
    return run, exported.bytes


class Baseline(NamedTuple):
    """make: (run of one image's transformer calls, bytes of the model's tensors) of a bundle, a number of steps and a float type."""

    label: str
    make: Callable[[Bundle, int, torch.dtype], tuple[Callable[[], None], int]]
    float_types: tuple[torch.dtype, ...] = bench.FLOAT_TYPES


BASELINES: dict[str, Baseline] = {  # by distribution
    "torchao": Baseline("torchao int8 dynamic", _in_place(_torchao)),
    "optimum-quanto": Baseline("optimum-quanto int8 weights", _in_place(_quanto)),
    "onnxruntime": Baseline("ONNX Runtime int8 dynamic", _onnxruntime, (torch.float32,)),
}


def prepare(bundle: Bundle, steps: int, *, on_progress: OnProgress = ignore_progress) -> tuple[list[dict], dict[tuple[str, str], Callable]]:
    """(an entry per library: name, version, bytes of its tensors and model_ms None, or a reason; runs of one image's transformer calls
    by (library, float type)). Each run has been tried once."""
    found, runs = [], {}
    for distribution, (label, make, float_types) in BASELINES.items():
        on_progress(Progress(stage="bench baselines", done=len(found), total=len(BASELINES), message=label))
        entry = {"name": label, "version": None, "model_ms": None, "bytes": None}
        found.append(entry)
        try:
            entry["version"] = importlib.metadata.version(distribution)
            for dtype in float_types:
                run, entry["bytes"] = make(bundle, steps, dtype)
                run()  # one that cannot run this model says so here
                runs[label, str(dtype)] = run
        except importlib.metadata.PackageNotFoundError:
            entry["reason"] = "not installed"
        except Exception as error:  # another library's failure is a row of the table, not ours
            entry["reason"] = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return found, runs


def with_times(entries: list[dict], us: dict[tuple[str, str], float]) -> list[dict]:
    """The entries with the milliseconds of each library's faster float type."""
    times = {entry["name"]: [value / 1000 for (label, _), value in us.items() if label == entry["name"]] for entry in entries}
    return [{**entry, "model_ms": min(times[entry["name"]], default=None)} for entry in entries]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
