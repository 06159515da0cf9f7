"""What every choice costs in time: measured on this machine or on another, or modelled from published peak rates (`roofline.py`).

A measured table times the real modules, one per distinct layer shape and choice, and a whole image, all in turns; what a
step of the image takes beyond its layers (attention, norms, its share of modulation and text projection) is the fixed part.
Layers that read one tensor run in one pass, and share its quantization and the call: each after the first is charged what it adds.
Measurements are kept in the user's cache under the machine, the kernels and the versions they hold for.

Dimension letters: L layers, W weight widths, A activation widths, M tokens, N out features, K in features.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lowbit import build, ops
from torch import Tensor, nn

from workbench import roofline
from workbench.models import Bundle
from workbench.models.denoiser import denoise
from workbench.models.tree import with_modules
from workbench.options import (
    ACT_BITS,
    LATENCY_TABLES,
    MEASURED_TARGETS,
    MODELLED_TARGETS,
    WEIGHT_BITS,
    BadInput,
    LatencyConfig,
    OnProgress,
    Progress,
    QuantConfig,
    ignore_progress,
)
from workbench.plans import BitChoice, LatencyTable, usual_bits
from workbench.quant import grids, sizes, transforms
from workbench.quant.activations import format_of
from workbench.quant.lowrank import Branch, Down
from workbench.quant.qlinear import Extras, FloatLinear, QuantLinear
from workbench.quant.segments import in_place
from workbench.types import LayerInfo

THIS_MACHINE = LatencyConfig().target
STEPS_OF_SCHEDULE, FEW_STEPS, LARGE_MODEL = 20, 4, 1e9  # steps of the image that is timed; few where a model is large, in parameters
ROUNDS, WARM_UP, SECONDS = 9, 2, 60.0  # turns that medians are taken over, turns before them, and when to stop early
CACHE_LAYOUT = "one layer, two of one input"  # what a cell holds: measurements of another kind are not read
IDLE_QUANTILE = 0.25  # quantile of the turns that says what the machine does where other programs, such as a browser, leave it alone
STORAGE_BITS = {act_bits: 16 if act_bits == 16 else 8 for act_bits in ACT_BITS}  # bits that activations are held in
REMEASURE_RATIO, RECHECKED_US, RECHECKS = 0.75, 1e6, 3  # a table is made anew if its image, not longer, takes less than this share
SMALL_MACS, SMALL_CALLS = 1 << 28, 5  # a layer below that is called so often in a turn: as warm as in a model, whose steps repeat it


def tabulate(bundle: Bundle, quant: QuantConfig, target: str = THIS_MACHINE, *, on_progress: OnProgress = ignore_progress) -> LatencyTable:
    """The table of a target. Raises BadInput for an unknown one."""
    LatencyConfig.parse({"target": target}, "latency")
    if target == THIS_MACHINE:
        return measure(bundle, quant, on_progress=on_progress)
    return (shipped if target in MEASURED_TARGETS else roofline.model)(bundle, quant, target)


def shipped(bundle: Bundle, quant: QuantConfig, target: str) -> LatencyTable:
    """A table that was measured on another machine (`benchmarks/latency_table.py`). Raises BadInput for a model or for settings that
    were not measured there."""
    stored = json.loads((LATENCY_TABLES / f"{target}.json").read_text(encoding="utf-8"))
    try:
        return _table(bundle, quant, stored["cells"], f"{stored['label']} (measured elsewhere)", stored["provenance"])
    except KeyError:
        raise BadInput(f"target {target}: layers of {bundle.name} were not measured there at these settings; use {THIS_MACHINE} or "
                       f"one of {', '.join(MODELLED_TARGETS)}") from None


def measure(bundle: Bundle, quant: QuantConfig, *, on_progress: OnProgress = ignore_progress) -> LatencyTable:
    """Times of the real modules on the bundle's device, for one image at a time; read where they were measured before, unless the machine
    turns out to have been busy then."""
    return measure_beside({}, bundle, quant, refresh=_was_busy(bundle, quant), on_progress=on_progress)[0]


def _was_busy(bundle: Bundle, quant: QuantConfig) -> bool:
    """Does the image that the kept table rests on take much less time now? Not asked where that would be a wait."""
    kept = reference(bundle, quant)
    if kept is None or kept[1] > RECHECKED_US:
        return False
    now_us = interleaved_timing({"image": kept[0]}, RECHECKS, bundle.device, quantile=IDLE_QUANTILE)["image"]
    return now_us < REMEASURE_RATIO * kept[1]


def measure_beside(runs: Mapping[str, Callable[[], object]], bundle: Bundle, quant: QuantConfig, *, refresh: bool = True,
                   rounds: int = ROUNDS, on_progress: OnProgress = ignore_progress) -> tuple[LatencyTable, dict[str, float]]:
    """(the table, median microseconds of `runs`), all timed in the same turns: what slows the machine down slows both.
    `refresh` forgets earlier measurements.

    Activations of 3 to 8 bits are held in the same 8 bits and run the same instructions: they share one measurement."""
    cache, layer_cells, image_cell = _Cache(bundle, refresh), _layer_cells(bundle, quant), _image_cell(bundle, quant)
    timed = {}
    for asked, cell in layer_cells.items():
        if cell not in cache:
            timed[cell, 1], timed[cell, 2] = (_layer_run(bundle, quant, *asked, count=count) for count in (1, 2))
    if image_cell not in cache:
        timed[image_cell, 1] = _image_run(bundle, quant)

    def report(done: int) -> None:
        on_progress(Progress(stage="latency", done=done, total=rounds, message=f"{len(timed)} timings, in turns"))
    us = {}
    if timed or runs:  # a table alone is of the machine, not of what else it is doing
        us = interleaved_timing({**timed, **runs}, rounds, bundle.device, seconds=None if runs else SECONDS,
                                quantile=0.5 if runs else IDLE_QUANTILE, report=report)
    report(rounds)
    for cell in dict.fromkeys(cell for cell, _ in timed):
        cache.cells[cache.key_of(cell)] = [us.get((cell, count), 0.0) / _calls(cell) for count in (1, 2)]
    cache.save()
    table = _table(bundle, quant, cache.cells, f"{THIS_MACHINE} (measured): {device_name(bundle)}", cache.provenance)
    return table, {name: us[name] for name in runs}


def measured_cells(bundle: Bundle, quant: QuantConfig) -> dict[str, list[float]]:
    """Measured anew: microseconds of one layer and of each further of one input, by cell."""
    measure_beside({}, bundle, quant)
    return _Cache(bundle, refresh=False).cells


def _table(bundle: Bundle, quant: QuantConfig, cells: Mapping[str, Sequence[float]], target: str, provenance: str) -> LatencyTable:
    """What measured cells say about a model. Raises KeyError where one is missing."""
    found = {asked: cells[_Cache.key_of(cell)] for asked, cell in _layer_cells(bundle, quant).items()}
    shapes = _shapes(bundle, quant)
    # modulation is computed once for all steps: its time is in what a step takes beyond its layers
    us_LWA = torch.tensor([[[_charged(layer, found[shapes[layer.index], weight_bits, STORAGE_BITS[act_bits]]) if layer.has_act_bits else 0.0
                             for act_bits in ACT_BITS] for weight_bits in WEIGHT_BITS] for layer in bundle.layers], dtype=torch.float64)
    step_us = cells[_Cache.key_of(_image_cell(bundle, quant))][0] / _steps_of_image(bundle)
    four, eight = WEIGHT_BITS.index(4), ACT_BITS.index(8)
    return LatencyTable(target=target, measured=True, provenance=provenance, weight_bits_W=WEIGHT_BITS, act_bits_A=ACT_BITS, us_LWA=us_LWA,
                        fixed_us=max(0.0, step_us - float(us_LWA[:, four, eight].sum())))


def _shapes(bundle: Bundle, quant: QuantConfig) -> dict[int, tuple]:
    """Of the layers with activation bits, by index."""
    ranks = sizes.ranks(bundle.layers, quant)
    return {layer.index: (*shape_of(layer), ranks[layer.name]) for layer in bundle.layers if layer.has_act_bits}


def _layer_cells(bundle: Bundle, quant: QuantConfig) -> dict[tuple, tuple]:
    """Cell by (shape, weight bits, bits that activations are held in)."""
    return {(shape, weight_bits, bits): (*shape, weight_bits, bits, *_form(quant))
            for shape in dict.fromkeys(_shapes(bundle, quant).values())
            for weight_bits in WEIGHT_BITS for bits in dict.fromkeys(STORAGE_BITS.values())}


def reference(bundle: Bundle, quant: QuantConfig) -> tuple[Callable[[], None], float] | None:
    """(the image that this machine's table rests on, the microseconds it took then): timed again, it says how fast the machine is now.
    None where no table has been measured."""
    cache, cell = _Cache(bundle, refresh=False), _image_cell(bundle, quant)
    return (_image_run(bundle, quant), cache.cells[cache.key_of(cell)][0]) if cell in cache else None


def _form(quant: QuantConfig) -> tuple:
    return quant.group_size, quant.transform, quant.act_scale, quant.act_grid, quant.act_clip


def _image_cell(bundle: Bundle, quant: QuantConfig) -> tuple:
    asked = bundle.generation.model_dump_json(exclude_defaults=True)
    return ("image", bundle.model_hash, *_form(quant), quant.branch_bits, quant.modulation, quant.modulation_bits,
            *([] if asked == "{}" else [asked]))


def interleaved_timing(runs: Mapping[Hashable, Callable[[], object]], rounds: int, device: torch.device, *, calls: int = 1,
                       seconds: float | None = None, quantile: float = 0.5,
                       report: Callable[[int], None] = lambda _: None) -> dict[Hashable, float]:
    """Median (or another quantile's) microseconds of each, taken one after another in every round, as the mean of `calls` in a row. After
    `seconds` three rounds are enough."""
    taken: dict[Hashable, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for number in range(-WARM_UP, rounds):
        report(max(0, number))
        for name, run in runs.items():
            before = time.perf_counter()
            for _ in range(calls):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 0:
                taken[name].append((time.perf_counter() - before) * 1e6 / calls)
        if seconds is not None and number >= 2 and time.perf_counter() - started > seconds:
            break
    return {name: float(np.quantile(times, quantile)) for name, times in taken.items()}


def device_name(bundle: Bundle) -> str:
    """The processor as it names itself, with its threads or its backend."""
    if bundle.device.type == "cuda":
        return torch.cuda.get_device_name(bundle.device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def shape_of(layer: LayerInfo) -> tuple[int, int, int, bool]:
    """(M, N, K, bias): layers of one shape cost the same, unless their branches differ in rank."""
    return layer.tokens, layer.n_out, layer.k_in, layer.has_bias


def _charged(layer: LayerInfo, cost_us: tuple[float, float]) -> float:
    one_us, two_us = cost_us
    # the smallest layer of the embedded model adds 0.28 of one: noise must not make a layer free
    return one_us if layer.fused_with == layer.index else max(two_us - one_us, one_us / 8)


def _calls(cell: tuple) -> int:
    """Of a cell's run in one turn."""
    if cell[0] == "image":
        return 1
    tokens, n_out, k_in, *_ = cell
    return SMALL_CALLS if tokens * n_out * k_in < SMALL_MACS else 1


class _Row:
    """Stands in for the step state: every layer at one width."""

    def __init__(self, act_bits: int):
        self.row = (act_bits,)


def _layer_run(bundle: Bundle, quant: QuantConfig, shape: tuple, weight_bits: int, act_bits: int, count: int) -> Callable[[], object]:
    """Runs `count` layers of a shape that read one tensor."""
    tokens, n_out, k_in, bias, rank = shape
    modules = []
    for _ in range(count):
        linear = nn.Linear(k_in, n_out, bias=bias, device=bundle.device, dtype=bundle.dtype).requires_grad_(False)
        modules.append(module_of(linear, quant, weight_bits, act_bits, rank))
    for module in modules[1:]:  # as layers of one input have it, where smoothing made one for each
        module.transform = modules[0].transform
    once = as_in_a_model(modules, torch.randn(1, tokens, k_in, device=bundle.device, dtype=bundle.dtype))
    return lambda: [once() for _ in range(_calls(shape))]


def as_in_a_model(modules: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    """Runs layers that read one tensor, in one pass where they allow it; a new tensor each time, so that nothing is remembered."""
    fused_linears, others = getattr(modules[0], "run_fused", None), tuple(modules[1:])

    @torch.no_grad()
    def run() -> None:
        seen = x.view(x.shape)
        if fused_linears is None or fused_linears(others, (seen,)) is None:
            for module in modules:
                module(seen)
    return run


def module_of(linear: nn.Linear, quant: QuantConfig, weight_bits: int, act_bits: int, rank: int = 0) -> nn.Module:
    """A layer at one choice, rounded to nearest, smoothed by ones, with a branch of noise: its numbers cost what solved ones do."""
    k_in, device = linear.in_features, linear.weight.device
    transform = transforms.make(quant.transform, k_in, quant.seed, torch.ones(k_in, dtype=torch.float16, device=device))
    noise = [torch.randn(shape, device=device).half() for shape in ((linear.out_features, rank), (rank, k_in))]
    extras = Extras(act=format_of(quant, quant.group_size), range_2=torch.tensor([-4.0, 4.0], dtype=torch.float16, device=device),
                    branch=Branch(up_NR=noise[0], down=Down(noise[1])) if rank else None)
    kwargs = {"step_state": _Row(act_bits), "layer_index": 0, "extras": extras}
    if weight_bits == 16:
        return FloatLinear(linear, transform, **kwargs)
    choice = BitChoice.of(weight_bits, quant)
    return QuantLinear(grids.quantize_nearest(linear.weight, choice), linear.bias, transform, **kwargs)


def _image_run(bundle: Bundle, quant: QuantConfig) -> Callable[[], None]:
    """All steps of one image, W4 A8 everywhere, with what the steps share (text projection, modulation) computed anew."""
    ranks = sizes.ranks(bundle.layers, quant)
    layers, stored_bits = {}, usual_bits(quant)
    for layer in bundle.layers:
        if layer.has_act_bits:
            layers[layer.name] = module_of(bundle.float_layer(layer), quant, 4, 8, ranks[layer.name])
        elif stored_bits != 16:
            weight = grids.quantize_nearest(bundle.weight(layer), BitChoice.of(stored_bits, quant, layer))
            layers[layer.name] = QuantLinear(weight, bundle.bias(layer), transforms.make("none", layer.k_in, 0))
    placed = in_place(bundle.layers, layers)
    modules = {name: with_modules(module, placed.get(name, {})) for name, module in bundle.modules.items()}
    integrator, conditioning = bundle.integrator(_steps_of_image(bundle)), bundle.encode(bundle.prompts("showcase")[:1])
    noise, model = bundle.noise([0]), SimpleNamespace(predictor=functools.partial(bundle.predictor, modules=modules))
    return lambda: denoise(model, integrator, noise, conditioning)


def _steps_of_image(bundle: Bundle) -> int:
    return STEPS_OF_SCHEDULE if bundle.parameters < LARGE_MODEL else FEW_STEPS


class _Cache:
    """Measured cells of this machine, kernel and versions, in one JSON file of the user's cache."""

    def __init__(self, bundle: Bundle, refresh: bool):
        backend = ops.backend(bundle.device.type, bundle.dtype)
        built = build.result().library if backend.is_kernel else None
        self.key = {"device": device_name(bundle), "cores": os.cpu_count(), "torch": torch.__version__, "dtype": str(bundle.dtype),
                    "backend": backend.name, "reason": backend.reason, "kernels": Path(built._name).name if built else ""}
        self.provenance = ", ".join(str(value) for value in self.key.values() if value)
        digest = hashlib.sha256(json.dumps([self.key, CACHE_LAYOUT]).encode()).hexdigest()[:16]
        self.path = build.cache_folder() / f"latency-{digest}.json"
        self.cells: dict[str, list[float]] = {} if refresh else self._read()

    def _read(self) -> dict[str, list[float]]:
        try:
            cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
            return {key: [float(value) for value in pair] for key, pair in cells.items() if len(pair) == 2}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    @staticmethod
    def key_of(cell: Sequence) -> str:
        return json.dumps(cell)

    def __contains__(self, cell: Sequence) -> bool:
        return self.key_of(cell) in self.cells

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            json.dump({"machine": self.key, "cells": self.cells}, part)
        Path(part.name).replace(self.path)
