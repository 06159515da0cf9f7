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


def _in_place(quantize: Callable[[nn.Module], None]):
    """A peer that quantizes a torch module where it stands."""
    def made(bundle: Bundle, steps: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
        model = copy.deepcopy(bundle.transformer, {id(bundle): bundle}).to(dtype)
        quantize(model)
        return bench.generation(bundle, steps, model, dtype), sum(map(tensor_bytes, (*model.parameters(), *model.buffers())))
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


# distribution: (label, what makes (run, bytes) of a bundle, a number of steps and a float type)
PEERS: dict[str, tuple[str, Callable]] = {
    "torchao": ("torchao int8 dynamic", _in_place(_torchao)),
    "optimum-quanto": ("optimum-quanto int8 weights", _in_place(_quanto)),
}


def prepare(bundle: Bundle, steps: int, *, on_progress: OnProgress = ignore_progress) -> tuple[list[dict], dict[tuple[str, str], Callable]]:
    """(an entry per peer: name, version, bytes of its tensors and model_ms None, or a reason; runs of one image's transformer calls
    by (peer, float type)). Each run has been tried once."""
    found, runs = [], {}
    for distribution, (label, quantize) in PEERS.items():
        on_progress(Progress(stage="bench peers", done=len(found), total=len(PEERS), message=label))
        entry = {"name": label, "version": None, "model_ms": None, "bytes": None}
        found.append(entry)
        try:
            entry["version"] = importlib.metadata.version(distribution)
            for dtype in bench.FLOAT_TYPES:
                run, entry["bytes"] = quantize(bundle, steps, dtype)
                run()  # one that cannot run this model says so here
                runs[label, str(dtype)] = run
        except importlib.metadata.PackageNotFoundError:
            entry["reason"] = "not installed"
        except Exception as error:  # another library's failure is a row of the table, not ours
            entry["reason"] = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return found, runs


def with_times(entries: list[dict], us: dict[tuple[str, str], float]) -> list[dict]:
    """The entries with the milliseconds of each peer's faster float type."""
    times = {entry["name"]: [value / 1000 for (label, _), value in us.items() if label == entry["name"]] for entry in entries}
    return [{**entry, "model_ms": min(times[entry["name"]], default=None)} for entry in entries]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
