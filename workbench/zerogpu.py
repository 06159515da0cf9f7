"""GPU work where the GPU belongs to a worker: `@spaces.GPU` of a ZeroGPU Space, and nothing at all elsewhere.

There a decorated function runs in a forked process: its arguments and what it yields are pickled, nothing else comes back, and no
event or lock reaches it. So a stage is sent as one message and answers with a stream of messages: every progress report, then its
result. Cancelling closes the stream, which stops the stage at its next report, as everywhere.

The GPU exists in the worker alone. `spaces` pretends one to the thread that imported it, but this program loads models in threads of
their own: here the app's process keeps its models on the CPU, and a worker loads its own. A tensor of the worker's device arrives in
the app as one of the CPU, and goes back to the device when it is sent to a worker again.

Import this before torch: `spaces` changes it. The pickles are made and read by this program alone; none comes from outside.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from workbench.options import BadInput, Cancelled, OnProgress, Progress, first_line

try:
    import spaces
except ImportError:  # any machine but a ZeroGPU Space
    spaces = None

PLAN_S, DRAW_S = 120, 60  # seconds of GPU that a visitor's quota is asked for at most
ON_ZERO_GPU = spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def gpu(duration: int) -> Callable[[Callable], Callable]:
    """`spaces.GPU` for `duration` seconds; where there is no `spaces`, the function as it is."""
    return spaces.GPU(duration=duration) if spaces is not None else lambda function: function


@gpu(PLAN_S)
def plan_on_gpu(message: bytes) -> Iterator[bytes]:
    """Profiling, searching, quantizing, and measuring a plan."""
    yield from answer(message)


@gpu(DRAW_S)
def draw_on_gpu(message: bytes) -> Iterator[bytes]:
    """Generating, comparing, and looking into a step or a layer."""
    yield from answer(message)


PIPELINE, CONTEST = "workbench.pipeline", "workbench.contest.compare"
# Every stage: who runs it, and the module whose function stage(bundle, ...) it is.
STAGES = {"profile": (plan_on_gpu, PIPELINE), "search": (plan_on_gpu, PIPELINE), "quantize": (plan_on_gpu, PIPELINE),
          "evaluate_plan": (plan_on_gpu, PIPELINE),
          "compare": (draw_on_gpu, PIPELINE), "solo_timing": (draw_on_gpu, PIPELINE), "draw": (draw_on_gpu, PIPELINE),
          "preview": (draw_on_gpu, PIPELINE),
          "inspect": (draw_on_gpu, PIPELINE), "evaluate_method": (plan_on_gpu, CONTEST), "float_run": (draw_on_gpu, CONTEST)}

OF_A_DEVICE = ("load", "is_loaded")  # functions of a model and a device; a worker's `load` finds the GPU by itself


class OnWorkers:
    """A module, its GPU stages run by workers and its models kept on the CPU; everything else is the module's own."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name: str):
        if name in STAGES:
            return functools.partial(ask, name)
        found = getattr(self._module, name)
        return functools.partial(found, device="cpu") if name in OF_A_DEVICE else found


def stages(module: str = PIPELINE):
    """The module, imported when first needed: it brings torch, and the port is bound before that. On a ZeroGPU Space its GPU stages are
    run by workers."""
    found = importlib.import_module(module)
    return OnWorkers(found) if ON_ZERO_GPU else found


def ask(stage: str, bundle, *args, on_progress: OnProgress | None = None, **kwargs):
    """Run a stage in a worker. Raises BadInput as the stage does, RuntimeError where the worker failed, and whatever
    `on_progress` raises, after telling the worker to stop."""
    named = bundle.source, bundle.generation
    stream = STAGES[stage][0](pickle.dumps((stage, named, on_progress is not None, dumps((args, kwargs), bundle))))
    kind, value = "failed", "the GPU worker ended without a result"
    try:
        for message in stream:
            kind, value = loads(message, bundle)
            if kind == "progress":
                on_progress(value)
    finally:
        stream.close()
    if kind == "refused":
        raise BadInput(value)
    if kind != "result":
        raise RuntimeError(value if kind == "failed" else "the GPU worker stopped before it had a result")
    return value


def answer(message: bytes) -> Iterator[bytes]:
    """In the worker: run the stage, yield ("progress", report) while it runs and in the end ("result", value), ("refused", line) for bad
    input or ("failed", line). The stage has a thread of its own, because it calls back where a generator must yield."""
    stage, (source, generation), reports_progress, arguments = pickle.loads(message)
    sent: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        bundle = None

        def send(kind: str, value: Any) -> None:
            sent.put((kind, dumps((kind, value), bundle)))

        def report(progress: Progress) -> None:
            if closed.is_set():
                raise Cancelled(f"{stage} was cancelled")
            send("progress", progress)

        try:
            bundle = importlib.import_module(PIPELINE).load(source).at(generation)
            bundle.renew_locks()  # one may have been held, at the fork, by a thread that is not here
            args, kwargs = loads(arguments, bundle)
            run = getattr(importlib.import_module(STAGES[stage][1]), stage)
            send("result", run(bundle, *args, **kwargs, **({"on_progress": report} if reports_progress else {})))
        except BadInput as error:
            send("refused", str(error))
        except BaseException as error:  # without an answer the app would wait for ever
            send("failed", f"{type(error).__name__}: {first_line(error)}")

    thread = threading.Thread(target=work, name=f"gpu-{stage}", daemon=True)
    thread.start()
    try:
        kind = "progress"
        while kind == "progress":
            kind, blob = sent.get()
            yield blob
    finally:
        closed.set()
        thread.join()


# A model never travels: both sides have it. What refers to it, or to a float layer of it, finds the other side's own.


class _Device:
    """Stands for the device of the bundle on the side that reads the message."""


_DEVICE = _Device()


def dumps(value, bundle) -> bytes:
    """Pickled, with the bundle, its float layers and its device as names."""
    import torch

    names = _names(bundle)

    class Pickler(pickle.Pickler):
        def persistent_id(self, each):
            return names.get(id(each))

        def reducer_override(self, each):
            if isinstance(each, torch.Tensor) and (each.device.type == "cuda" or hasattr(each, "_of_a_worker")):
                plain = each.detach().cpu()
                return _placed, (plain, isinstance(each, torch.nn.Parameter), each.requires_grad, _DEVICE)
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def loads(blob: bytes, bundle):
    """The value, referring to this process's bundle."""
    parts = _parts(bundle) | {"device": getattr(bundle, "device", "cpu")}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, name):
            return parts[name]

    return Unpickler(io.BytesIO(blob)).load()


def _names(bundle) -> dict[int, str]:
    return {id(part): name for name, part in (_parts(bundle) | {"device": _DEVICE}).items() if part is not None}


def _parts(bundle) -> dict[str, Any]:
    """What a message names instead of holding it: float layers with their parameters."""
    parts = {"bundle": bundle}
    for layer in (*getattr(bundle, "layers", ()), *getattr(bundle, "modulation", ())) if hasattr(bundle, "linear") else ():
        linear = bundle.linear(layer)
        parts |= {f"linear {layer.name}": linear, f"weight {layer.name}": linear.weight, f"bias {layer.name}": linear.bias}
    return parts


def _placed(tensor, is_parameter: bool, requires_grad: bool, device):
    import torch

    moved = tensor.to(device).requires_grad_(requires_grad)
    moved = torch.nn.Parameter(moved, requires_grad) if is_parameter else moved
    moved._of_a_worker = True
    return moved
