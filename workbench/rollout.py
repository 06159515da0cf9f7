"""What a search asks of a model: extend a quantized rollout by one step, and say how bad it has become.

Implements `search.ledger.Evaluator`. Letters: S samples, M tokens, D latent channels, R probes, T steps.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from workbench.models import Bundle
from workbench.options import BadInput, OnProgress, Progress, ignore_progress
from workbench.plans import BitPlan
from workbench.types import Trace


class Rollout:
    """Quantized rollouts of a few traced samples. Use in a `with` block: it lends the transformer quantized layers.

    `modules_for(weight_bits_L)` gives the quantized model of one width per layer. A state is the latent (S, M, D) after
    some step. `scoring` "adjoint": the mean over samples and probes of (lambda . delta)^2, the predicted squared change of
    the final latent; "raw": the squared deviation of this step itself. Both are divided by the float latent's energy."""

    def __init__(self, bundle: Bundle, trace: Trace, modules_for, *, samples: int, scoring: str, adjoint_RSTMD: Tensor | None = None,
                 on_step: OnProgress = ignore_progress):
        if scoring == "adjoint" and adjoint_RSTMD is None:
            raise BadInput("adjoint scoring needs the adjoint estimator; profile with it, or score by raw deviation")
        self.bundle, self.trace, self._modules_for, self.scoring = bundle, trace, modules_for, scoring
        self.samples = min(samples, trace.samples)
        # Spread over the prompts, not the first few: neighbours in a prompt list tend to be alike.
        self.rows = torch.linspace(0, trace.samples - 1, self.samples).round().long()
        self.conditioning = trace.conditioning.rows(self.rows.to(bundle.device))
        self.latent_STMD = trace.latent_STMD[self.rows]
        self.energy_S = self.latent_STMD[:, -1].square().sum((1, 2))
        self.adjoint_RSTMD = None if adjoint_RSTMD is None else adjoint_RSTMD[:, self.rows]
        self._stack, self._on_step = ExitStack(), on_step

    def __enter__(self):
        self._stack.enter_context(self.bundle.lock)
        return self

    def __exit__(self, *error):
        self._stack.close()
        self.bundle.cursor.row = self.bundle.cursor.plan = None

    def use_weights(self, weight_bits_L: tuple[int, ...]) -> None:
        """Swap in the layers of these widths; rollouts started before belong to the old ones."""
        self._stack.close()
        self._stack.enter_context(self.bundle.lock)
        self._stack.enter_context(self._modules_for(weight_bits_L).attached(self.bundle))
        self.bundle.cursor.plan = None

    def start(self) -> Tensor:
        """Pure noise, the same as the float trajectories started from."""
        return self.at(0)

    def at(self, step: int) -> Tensor:
        """The float trajectories before `step`."""
        return self.latent_STMD[:, step]

    @torch.no_grad()
    def extend(self, state: Tensor, step: int, act_bits_L: tuple[int, ...]) -> Tensor:
        """One denoising step with these activation bits."""
        self.bundle.cursor.row = act_bits_L
        latent_SMD = state.to(self.bundle.device)
        velocity_SMD = self.bundle.velocity(latent_SMD, self.trace.schedule, step, self.conditioning)
        return self.bundle.advance(latent_SMD, velocity_SMD, self.trace.schedule, step).cpu()

    def score(self, state: Tensor, step: int) -> float:
        """How much the deviation after `step` will matter (adjoint) or is (raw), as a normalised squared error."""
        delta_SMD = state - self.latent_STMD[:, step + 1]
        if self.scoring == "raw":
            return float((delta_SMD.square().sum((1, 2)) / self.energy_S).mean())
        projected_RS = (self.adjoint_RSTMD[:, :, step] * delta_SMD).sum((2, 3))
        return float((projected_RS.square() / self.energy_S).mean())

    def error(self, state: Tensor) -> float:
        """Normalised mean squared error of the final latent against float."""
        return float(self._errors(state).mean())

    def _errors(self, state: Tensor) -> Tensor:
        return (state - self.latent_STMD[:, -1]).square().sum((1, 2)) / self.energy_S

    def change(self, before: Tensor, after: Tensor) -> float:
        """Relative L1 change of the latent over a step."""
        return float(((after - before).abs().sum((1, 2)) / before.abs().sum((1, 2))).mean())

    def error_of(self, plan: BitPlan) -> float:
        """`error` after running a whole plan."""
        return float(self.errors_of(plan).mean())

    def errors_of(self, plan: BitPlan) -> Tensor:
        """The error of every sample (S) after running a whole plan."""
        return self._errors(self.final_of(plan))

    def final_of(self, plan: BitPlan) -> Tensor:
        """The final latent (S, M, D) after running a whole plan."""
        self.use_weights(plan.weight_bits_L)
        state = self.start()
        for step, row in enumerate(plan.act_bits_TL):
            self._on_step(Progress(stage="rollout", done=step, total=len(plan.act_bits_TL), message=f"step {step + 1} of the plan"))
            state = self.extend(state, step, row)
        return state

    def save(self, state: Tensor) -> bytes:
        return save_safetensors({"latent_SMD": state.contiguous()})

    def load(self, blob: bytes) -> Tensor:
        return load_safetensors(blob)["latent_SMD"]
