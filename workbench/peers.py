"""Other libraries' int8 transformers, where they are installed: the same model, the same lean forward, timed in turns.

None of them is needed: a library that is missing, or that does not run this model, is left out with the reason. They are given
the lean forward too, which is more than they have by themselves, and the float type that is faster for them.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Callable

import torch
from torch import nn

from workbench import bench
from workbench.families import Bundle
from workbench.options import OnProgress, Progress, ignore_progress


def _torchao(model: nn.Module) -> None:
    """Weights int8 per channel, activations int8 per token, dynamic."""
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())


def _quanto(model: nn.Module) -> None:
    """Weights int8 per channel; its activations are static and need a calibration, so they stay float here."""
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


# distribution: (label, what quantizes a model in place)
PEERS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "torchao": ("torchao int8 dynamic", _torchao),
    "optimum-quanto": ("optimum-quanto int8 weights", _quanto),
}


def measure(bundle: Bundle, steps: int, rounds: int, *, on_progress: OnProgress = ignore_progress) -> list[dict]:
    """One entry per peer: name, version, model_ms of one image's transformer calls, bytes of its tensors; or name and reason."""
    found, runs = [], {}
    for distribution, (label, quantize) in PEERS.items():
        on_progress(Progress(stage="bench peers", done=len(found), total=len(PEERS), message=label))
        entry = {"name": label, "version": None, "model_ms": None, "bytes": None}
        try:
            entry["version"] = importlib.metadata.version(distribution)
            for dtype in bench.FLOAT_TYPES:
                model = copy.deepcopy(bundle.transformer, {id(bundle): bundle}).to(dtype)
                quantize(model)
                run = bench.generation(bundle, steps, model, dtype)
                run()  # one that cannot run this model says so here
                runs[label, dtype], entry["bytes"] = run, sum(map(tensor_bytes, (*model.parameters(), *model.buffers())))
        except importlib.metadata.PackageNotFoundError:
            entry["reason"] = "not installed"
        except Exception as error:  # another library's failure is a row of the table, not ours
            entry["reason"] = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        found.append(entry)
    with bundle.lock:
        us = bench.in_turns(runs, rounds, bundle.device)
    for entry in found:
        times = [value for (label, _), value in us.items() if label == entry["name"]]
        entry["model_ms"] = min(times) / 1000 if times else None
    return found


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
