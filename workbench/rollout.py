"""What a search asks of a model: extend a quantized rollout by one step, and say how bad it has become.

Implements `search.evaluation_cache.Evaluator`. Letters: S samples, R probes, T steps. Latents have any rank: (S, *shape).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from workbench.models import Bundle
from workbench.models.integrator import State, deviation
from workbench.options import BadInput, OnProgress, Progress, ignore_progress
from workbench.plans import BitPlan
from workbench.quant.quantize import QuantizedModel
from workbench.replay.trace import Trace, memory_batches

TOKENS = 2048  # per forward


class Rollout:
    """Quantized rollouts of a few traced samples.

    `model_of(weight_bits_L)` gives the quantized model of one width per layer. A state is the sampler's state of these samples before
    some step. `scoring` "adjoint": the mean over samples and probes of (lambda . delta)^2, the predicted squared change of
    the final latent; "raw": the squared deviation of this step itself. Both are divided by the float latent's energy."""

    def __init__(self, bundle: Bundle, trace: Trace, model_of: Callable[[tuple[int, ...]], QuantizedModel], *, samples: int, scoring: str,
                 costates_T: tuple[tuple[Tensor, ...], ...] | None = None, on_step: OnProgress = ignore_progress):
        if scoring == "adjoint" and costates_T is None:
            raise BadInput("adjoint scoring needs the adjoint estimator; profile with it, or score by raw deviation")
        self.bundle, self.trace, self._model_of, self.scoring = bundle, trace, model_of, scoring
        self.samples = min(samples, trace.samples)
        # Spread over the prompts, not the first few: neighbours in a prompt list tend to be alike.
        self.rows = torch.linspace(0, trace.samples - 1, self.samples).round().long()
        self._final = trace.latent_ST[self.rows, -1]
        self.energy_S = self._final.flatten(1).square().sum(1)
        self._costates_T = None if costates_T is None else [tuple(part[:, self.rows] for part in parts) for parts in costates_T]
        self._on_step = on_step
        conditioning = trace.conditioning.rows(self.rows).to(bundle.device)
        self._parts = memory_batches(self.samples, trace.tokens, limit=TOKENS)
        self._conditioning = [conditioning.rows(part) for part in self._parts]
        self._model: QuantizedModel | None = None
        self._predict = []

    def use_weights(self, weight_bits_L: tuple[int, ...]) -> None:
        """Go on with the model of these widths; rollouts started before belong to the old one."""
        self._model = self._model_of(weight_bits_L)
        self._model.state.plan = None  # rows are set step by step
        self._predict = [self._model.predictor(self.trace.integrator, conditioning) for conditioning in self._conditioning]

    def start(self) -> State:
        """Pure noise, the same as the float trajectories started from."""
        return self.at(0)

    def at(self, step: int) -> State:
        """The float trajectories before `step`."""
        return self.trace.state(step, self.rows)

    @torch.no_grad()
    def extend(self, state: State, step: int, act_bits_L: tuple[int, ...]) -> State:
        """One denoising step with these activation bits."""
        self._model.state.row = act_bits_L
        latent = state.latent.to(self.bundle.device)
        output = torch.cat([predict(latent[part], step) for part, predict in zip(self._parts, self._predict)])
        return self.trace.integrator.advance(state, output.to(state.latent.device), step)

    def score(self, state: State, step: int) -> float:
        """How much the deviation after `step` will matter (adjoint) or is (raw), as a normalised squared error."""
        reference = self.at(step + 1)
        if self.scoring == "raw":
            return float(((state.latent - reference.latent).flatten(1).square().sum(1) / self.energy_S).mean())
        return float((deviation(self._costates_T[step], state, reference).square() / self.energy_S).mean())

    def error(self, state: State) -> float:
        """Normalised mean squared error of the final latent against float."""
        return float(self._errors(state.latent).mean())

    def _errors(self, latent: Tensor) -> Tensor:
        return (latent - self._final).flatten(1).square().sum(1) / self.energy_S

    def change(self, before: State, after: State) -> float:
        """Relative L1 change of the latent over a step."""
        return float(((after.latent - before.latent).flatten(1).abs().sum(1) / before.latent.flatten(1).abs().sum(1)).mean())

    def error_of(self, plan: BitPlan) -> float:
        """`error` after running a whole plan."""
        return float(self.errors_of(plan).mean())

    def errors_of(self, plan: BitPlan) -> Tensor:
        """The error of every sample (S) after running a whole plan."""
        return self._errors(self.final_of(plan))

    def final_of(self, plan: BitPlan) -> Tensor:
        """The final latent (S, *shape) after running a whole plan."""
        self.use_weights(plan.weight_bits_L)
        state = self.start()
        for step, row in enumerate(plan.act_bits_TL):
            self._on_step(Progress(stage="rollout", done=step, total=len(plan.act_bits_TL), message=f"step {step + 1} of the plan"))
            state = self.extend(state, step, row)
        return state.latent

    def save(self, state: State) -> bytes:
        """The state as safetensors, newest parts last."""
        parts = {f"{name}_{number}": each.contiguous() for name, tensors in (("latent", state.latents), ("output", state.outputs))
                 for number, each in enumerate(tensors)}
        return save_safetensors(parts)

    def load(self, blob: bytes) -> State:
        """The inverse of `save`."""
        parts = load_safetensors(blob)
        return State(*(tuple(parts[f"{name}_{number}"] for number in range(sum(key.startswith(name) for key in parts)))
                       for name in ("latent", "output")))
