"""What an integrator integrates: one step's forwards, each of a transformer on named inputs, combined into the model's output.

The loop knows neither guidance nor families: it asks a `Denoiser` which calls a step takes and how their outputs combine. `Predictor`
runs them on module trees, float or quantized; `denoise` is the only loop over steps.

Letters: S samples, T steps, L layers. Latents have any rank: (S, *shape).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from workbench.models.integrator import Integrator
from workbench.plans import BitPlan
from workbench.types import Conditioning

Value = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward. module: the tree it runs on, "transformer" or "transformer_2". branch: "cond", "uncond" or "batched". rows: how
    often each sample occurs along the batch axis of the layers' inputs, one block of S rows after the other (2 where guidance doubles
    the batch)."""

    module: str = "transformer"
    branch: str = "cond"
    rows: int = 1
    inputs: Mapping[str, Value]


class Denoiser(abc.ABC):
    """One schedule's calls. Everything is differentiable with respect to the latent."""

    @abc.abstractmethod
    def calls(self, x: Tensor, step: int, conditioning: Conditioning) -> tuple[Call, ...]:
        """The forwards of a step at the latent x (S, *shape), in order."""

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        """The model's output (S, *shape) from those of the calls: guidance, rescaling, sign. By default the only one's."""
        [output] = outputs
        return output

    def output_of(self, returned) -> Tensor:
        """The output tensor (S or rows S, *shape) from what a transformer returned."""
        return returned[0]

    def fast(self, modules: Mapping[str, nn.Module], conditioning: Conditioning) -> Callable[[Tensor, int], Tensor] | None:
        """output(x, step) without gradients by a forward of the family's own, equal to the calls up to rounding; None where it has
        none."""
        return None


class StepState:
    """Where a quantized model is in its denoising loop; its layers read `row`.

    sigma: noise level of the running step. row: activation bits of every layer there, None where all are float. A plan, if there is
    one, gives the row of a noise level; a search sets rows itself."""

    def __init__(self, plan: BitPlan | None = None):
        self.plan, self.sigma = plan, math.nan
        self.row: Sequence[int] | None = None
        self.driven = False  # by a predictor, which knows its step; else by the time that the transformer is told

    def follow(self, time: Tensor) -> None:
        """The step that a transformer is told, as a noise level in whatever type the model computes in: the plan's levels are rounded
        alike before the nearest is taken, or neighbouring steps would be confused from about 64 steps on. Of levels that the type
        cannot tell apart it is the first."""
        time = time.detach().flatten()[0].cpu()
        if self.plan is None:
            return self.move_to(float(time))
        told_T = torch.tensor(self.plan.sigma_T, dtype=torch.float64).to(time.dtype).double()
        return self.move_to(self.plan.sigma_T[int((told_T - time.double()).abs().argmin())])

    def move_to(self, sigma: float) -> None:
        """A step begins. Without a plan the row stays what it was set to."""
        self.sigma = sigma
        if self.plan is not None:
            self.row = self.plan.act_bits_at(sigma)


class Predictor:
    """The model's output at a latent and a step, for one batch: its calls on these module trees, combined.

    What the steps of a batch share (modulation, text projection) is computed once and kept as long as the predictor."""

    def __init__(self, modules: Mapping[str, nn.Module], denoiser: Denoiser, integrator: Integrator, conditioning: Conditioning,
                 state: StepState | None = None):
        self.modules, self.denoiser, self.integrator, self.conditioning, self.state = modules, denoiser, integrator, conditioning, state
        self._sigma_T, self._scale_T = integrator.sigma_T1[:-1].tolist(), integrator.input_scale_T.tolist()
        self._fast = denoiser.fast(modules, conditioning)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """(S, *shape); float32, or float64 where the model computes in it. Differentiable with respect to x."""
        if self.state is None:
            return self._output(x, step)
        self.state.move_to(self._sigma_T[step])
        self.state.driven = True
        try:
            return self._output(x, step)
        finally:
            self.state.driven = False

    def calls(self, x: Tensor, step: int) -> tuple[Call, ...]:
        """The forwards of a step at the latent x."""
        return self.denoiser.calls(self._scaled(x, step), step, self.conditioning)

    def _scaled(self, x: Tensor, step: int) -> Tensor:
        """As the sampler wants the model to see it."""
        return x if self._scale_T[step] == 1.0 else self._scale_T[step] * x

    def _output(self, x: Tensor, step: int) -> Tensor:
        if self._fast is not None and not torch.is_grad_enabled():
            return self._fast(self._scaled(x, step), step)
        return self.denoiser.combine([self.run(call) for call in self.calls(x, step)], step)

    def run(self, call: Call) -> Tensor:
        """One call's output."""
        return self.denoiser.output_of(self.modules[call.module](**call.inputs))


class Model(Protocol):
    """What can be integrated: the float model (a bundle) or a quantized one."""

    def predictor(self, integrator: Integrator, conditioning: Conditioning) -> Predictor:
        """The output at (latent, step) for one batch."""


OnStep = Callable[[int, Tensor, Tensor, Tensor], None]  # step, latent before it, model's output there, latent after it


@torch.no_grad()
def denoise(model: Model, integrator: Integrator, noise: Tensor, conditioning: Conditioning, on_step: OnStep | None = None) -> Tensor:
    """The final latent (S, *shape) from unit noise: the scheduler's own arithmetic, as the diffusers pipeline runs it. `on_step` hears
    of every step, and may raise to stop."""
    predict, stepper, latent = model.predictor(integrator, conditioning), integrator.exact(), integrator.start(noise).latent
    for step in range(integrator.steps):
        output = predict(latent, step)
        following = stepper.step(output, latent)
        if on_step is not None:
            on_step(step, latent, output, following)
        latent = following
    return latent
