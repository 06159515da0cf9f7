"""One backward replay of the float trajectories; whoever wants something of it is a visitor.

    adjoint (default)  the scalar is <r, x_0>: the gradient that reaches a layer's output at step t says what an error there does to
                       the *final* latent, through all later steps, the sampler and the guidance.
    local              the scalar is <r, f(x_t)>, the reading of AdaTSQ (arXiv 2602.09883, section 3).

With r ~ N(0, I), the mean of (g . delta)^2 is the squared change that an error delta causes, to first order.
Dimension letters as in `types.py`: T steps, L layers, S samples, R probes, M tokens, N out features, K in features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.models.denoiser import Predictor
from workbench.models.integrator import Adjoint
from workbench.replay.taps import Taps
from workbench.replay.trace import Trace
from workbench.types import LayerInfo

TOKENS = 1024  # of a batch: every layer's inputs and outputs of one step are held at once
ESTIMATORS = ("adjoint", "local")


@dataclass(frozen=True)
class Seen:
    """A layer at one step, for the samples of a batch. Call by call: x (S, M, K) what it read, g (R, S, M, N) the gradients at its
    output."""

    layer: LayerInfo
    x: tuple[Tensor, ...]
    g: tuple[Tensor, ...]


class Visitor(Protocol):
    """Sees every layer of every step once for every sample; batches of samples one after the other, the latest step first."""

    def begin(self, step: int, rows: slice, adjoint: Adjoint) -> None:
        """A step begins; `adjoint` knows all that follows it."""

    def visit(self, step: int, rows: slice, group: Sequence[Seen]) -> None:
        """Siblings: layers of one block that read one tensor, and round it alike; those that do not run at this step are left out.
        Without gradients."""


def backward(bundle: Bundle, trace: Trace, probe: Tensor, visitors: Sequence[Visitor], *, estimator: str = "adjoint",
             on_step: Callable[[int, int, int], None] = lambda done, total, step: None) -> None:
    """Replay `trace` with the directions `probe` (R, S, *shape). `on_step(done, total, step)` hears of every step of every batch, with
    done counting from 0 before the first, and may raise to stop."""
    trace.check_is_of(bundle)
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; use one of {ESTIMATORS}")
    batches, taps, groups = list(trace.batches(tokens=TOKENS, device=bundle.device)), Taps(bundle), _siblings(bundle.layers)
    done, total = 0, len(batches) * trace.steps
    for batch in batches:
        predict = bundle.predictor(trace.integrator, batch.conditioning, modules=taps.modules)
        r = probe[:, batch.rows].to(bundle.device)
        adjoint = Adjoint(trace.integrator, r)
        for step in reversed(range(trace.steps)):
            on_step(done, total, step)
            for visitor in visitors:
                visitor.begin(step, batch.rows, adjoint)
            latent = trace.latent_ST[batch.rows, step].to(bundle.device)
            seed = adjoint.seed(step) if estimator == "adjoint" else r
            adjoint.add(step, _step(bundle, predict, taps, latent, step, seed, groups,
                                    lambda group, step=step, rows=batch.rows: [each.visit(step, rows, group) for each in visitors]))
            done += 1
    if batches:
        on_step(done, total, 0)


def _siblings(layers: Sequence[LayerInfo]) -> list[list[LayerInfo]]:
    found: dict[int, list[LayerInfo]] = {}
    for layer in layers:
        found.setdefault(layer.fused_with, []).append(layer)
    return list(found.values())


def _step(bundle: Bundle, predict: Predictor, taps: Taps, latent: Tensor, step: int, seed_R: Tensor, groups,
          visit: Callable[[list[Seen]], object]) -> Tensor:
    """Show every layer of one step; returns the gradients with respect to the latent (R, S, *shape)."""
    taps.clear()
    latent = latent.requires_grad_()
    with torch.enable_grad(), fast_arithmetic(bundle):
        returned = []
        for call in predict.calls(latent, step):
            taps.begin(call)
            returned.append(predict.run(call))
        output = predict.denoiser.combine(returned, step)
    wanted = [latent, *taps.outputs()]
    found_R = []
    for number, seed in enumerate(seed_R):
        last = number + 1 == len(seed_R)
        found = torch.autograd.grad(output, wanted, seed.to(output), retain_graph=not last, allow_unused=True)
        found_R.append([torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted)])
    by_module_R = [taps.gradients(found[1:]) for found in found_R]
    with torch.no_grad(), fast_arithmetic(bundle):
        for group in groups:
            seen = [Seen(layer, tuple(x), tuple(torch.stack(g_R) for g_R in zip(*(taps.gradients_of(layer, by_module)
                                                                               for by_module in by_module_R))))
                    for layer in group if (x := taps.inputs_of(layer))]
            if seen:
                visit(seen)
    taps.clear()
    return torch.stack([found[0] for found in found_R]).to(seed_R)


def fast_arithmetic(bundle: Bundle):
    """bfloat16 products on a CPU that has them: a gradient estimate with sampling noise of percents loses nothing."""
    fast = bundle.device.type == "cpu" and bundle.dtype == torch.float32 and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16) if fast else contextlib.nullcontext()


class Costates:
    """Visitor: the gradients of <r, x_0> with respect to the sampler's state after every step, on the CPU. `of(step)` has a tensor
    (R, S, *shape) for each part of that state, in the order of `Adjoint.costates`."""

    def __init__(self, steps: int):
        self._parts: list[list[tuple[Tensor, ...]]] = [[] for _ in range(steps)]

    def begin(self, step: int, rows: slice, adjoint: Adjoint) -> None:
        self._parts[step].append(tuple(part.cpu() for part in adjoint.costates(step)))

    def visit(self, step: int, rows: slice, group: Sequence[Seen]) -> None:
        """Layers do not matter here."""

    def result(self) -> tuple[tuple[Tensor, ...], ...]:
        """Of all steps, all samples together."""
        return tuple(tuple(torch.cat(pieces, 1) for pieces in zip(*parts)) for parts in self._parts)
