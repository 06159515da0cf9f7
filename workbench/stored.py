"""Stages whose results a run folder keeps, under the hash of what they were made from: read where it holds them, made and kept else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from workbench import sensitivity
from workbench.models import Bundle
from workbench.options import OnProgress, QuantConfig, SensitivityConfig, TraceConfig, ignore_progress
from workbench.quant.activations import format_of
from workbench.quant.bank import WeightBank
from workbench.quant.transforms import Transform
from workbench.replay import trace
from workbench.replay.trace import Trace
from workbench.runs import Run
from workbench.sensitivity.signed import SignedErrors, project
from workbench.types import SensitivityMap


def record(bundle: Bundle, config: TraceConfig, *, run: Run | None = None, on_progress: OnProgress = ignore_progress) -> Trace:
    """The float trajectories; read from `run` where it holds them."""
    made_from = (bundle.model_hash, bundle.generation, config, config.prompts or bundle.prompts("calibration"))
    return kept(run, Trace, "trace", made_from, lambda: trace.record(bundle, config, on_progress=on_progress))


def _basis(quant: QuantConfig) -> tuple:
    """The options that decide what a sensitivity map is measured in: the transform and the activation quantizer."""
    if quant.transform.startswith("smooth"):
        return (quant,)
    return (quant.transform, quant.seed, format_of(quant, quant.group_size))


def kept(run: Run | None, cls: type, stage: str, made_from: tuple, make: Callable):
    """The result of a stage, from the run folder or made."""
    return make() if run is None else run.resume(cls, stage, Run.key(*made_from), make)


def mapped(bundle: Bundle, recorded: Trace, config: SensitivityConfig, quant: QuantConfig, fitted: Mapping[str, Transform],
           run: Run | None, on_progress: OnProgress) -> SensitivityMap:
    """The sensitivity map along a trace; read from `run` where it holds it."""
    return kept(run, SensitivityMap, "sensitivity", (recorded, config, *_basis(quant)),
                   lambda: sensitivity.profile(bundle, recorded, config, quant, fitted=fitted, on_progress=on_progress))


def signed_errors(bundle: Bundle, fresh: Trace, bank: WeightBank, made_from: tuple, run: Run | None,
                  on_progress: OnProgress) -> SignedErrors:
    """Signed errors of a bank's weights, and of activations, on other prompts; `made_from` is what the bank was made from."""
    return kept(run, SignedErrors, "signed", (fresh, *made_from, bank.quant, bank.weight_bits_C),
                lambda: project(bundle, fresh, bank, on_progress=on_progress))
