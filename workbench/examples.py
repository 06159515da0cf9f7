"""A finished run that is shown before a visitor has made one: written by `assets/build/examples.py`, one file per embedded model.

It holds results and a few trajectories, but no solved weights, so it can be looked at and nothing can be made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from workbench import inspection
from workbench.options import QuantConfig
from workbench.plans import CostTable
from workbench.replay.trace import Trace
from workbench.resources import resource_folder
from workbench.runs import Run
from workbench.types import Comparison, DistortionTable, SearchResult, SensitivityMap

FOLDER = resource_folder("assets") / "examples"
LAYOUT = "example-2"  # counts up when the classes below change their fields
EVENTS_KEPT = 60  # of the search, the newest
TRAJECTORIES_KEPT = 2  # of the calibration, to look into layers


@dataclass(frozen=True, kw_only=True)
class Example:
    """`made` says where and when in one line; `seconds` is how long all of it took there."""

    made: str
    seconds: float
    sensitivity: SensitivityMap
    table: DistortionTable
    costs: CostTable
    quant: QuantConfig
    result: SearchResult
    comparison: Comparison
    trace: Trace
    layer_inspection: inspection.LayerStep  # at the most fragile layer and step


def save(example: Example, model: str, folder: Path = FOLDER) -> Path:
    """Write a model's example, without what is large and not shown. Latents are kept in half precision."""
    small = replace(example, result=replace(example.result, events=example.result.events[-EVENTS_KEPT:]),
                    trace=example.trace.head(TRAJECTORIES_KEPT))
    return Run(folder, LAYOUT).save("example", model, _with_latents(small, torch.float16))


def load(model: str, model_hash: str, folder: Path = FOLDER) -> Example | None:
    """The example of a model, if there is one and it was made with these very weights."""
    found = Run(folder, LAYOUT).load(Example, "example", model) if folder.is_dir() else None
    return _with_latents(found, torch.float32) if found is not None and found.sensitivity.model_hash == model_hash else None


def _with_latents(example: Example, dtype: torch.dtype) -> Example:
    trace, kept = example.trace, example.comparison.trajectories
    if kept is not None:
        kept = replace(kept, float_ST=kept.float_ST.to(dtype), quantized_ST=kept.quantized_ST.to(dtype))
    return replace(example, comparison=replace(example.comparison, trajectories=kept),
                   trace=replace(trace, latent_ST=trace.latent_ST.to(dtype), output_ST=trace.output_ST.to(dtype)))
