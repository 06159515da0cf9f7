"""Record the float model's trajectories once; every later stage replays them.

What is stored is the trajectory, not Gram matrices: a Hessian needs alpha before it can be accumulated.
Dimension letters as in `types.py`: S samples, T steps. Latents have any rank: (S, *shape).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.models.denoiser import denoise
from workbench.models.integrator import Integrator, State
from workbench.options import PIPELINES_OWN, BadInput, GenerationConfig, OnProgress, Progress, TraceConfig, ignore_progress
from workbench.types import Conditioning

RECORD_TOKENS = 2048  # tokens per forward when trajectories are recorded: one batch for most small models


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together; conditioning on the model's device."""

    rows: slice
    conditioning: Conditioning

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Float trajectories: latent_ST (S, T+1, *shape), entry 0 pure noise, entry T the final latent; output_ST (S, T, *shape), the model's
    output at each step. float32 on the CPU, and so is the conditioning. tokens: the most rows a sample brings to any layer."""

    integrator: Integrator
    latent_ST: Tensor
    output_ST: Tensor
    conditioning: Conditioning
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    model_hash: str
    tokens: int
    generation: GenerationConfig = PIPELINES_OWN

    def __post_init__(self):
        samples, points = self.latent_ST.shape[:2]
        if points != self.integrator.steps + 1 or self.output_ST.shape[:2] != (samples, points - 1):
            raise ValueError(f"latents {tuple(self.latent_ST.shape)} and outputs {tuple(self.output_ST.shape)} disagree")
        if not (len(self.prompts) == len(self.seeds) == samples):
            raise ValueError(f"{len(self.prompts)} prompts and {len(self.seeds)} seeds for {samples} samples")
        if not bool(torch.isfinite(self.latent_ST).all() and torch.isfinite(self.output_ST).all()):
            raise ValueError("the float model produced NaN or infinity")

    def check_is_of(self, bundle: Bundle) -> None:
        """Raises BadInput where the trace belongs to another model, or to this one set to generate something else."""
        if self.model_hash != bundle.model_hash:
            raise BadInput(f"the trace belongs to model {self.model_hash}, not to {bundle.model_hash}; record it again")
        if self.generation != bundle.generation:
            raise BadInput(f"the trace was recorded for {self.generation.words}, the model is set to {bundle.generation.words}; "
                           "record it again")

    @property
    def samples(self) -> int:
        return len(self.prompts)

    @property
    def steps(self) -> int:
        return self.integrator.steps

    @property
    def sigma_T(self) -> tuple[float, ...]:
        """Noise levels of the steps, without the last one's end: the keys of plans."""
        return tuple(self.integrator.sigma_T1[:-1].tolist())

    def batches(self, *, tokens: int, device: torch.device | str) -> Iterator[Batch]:
        """The samples in batches of at most so many tokens each (one sample at least), as even as can be. The only way a stage goes
        through a trace: all steps of a batch, then the next batch, so that what the steps share is computed once."""
        for rows in memory_batches(self.samples, self.tokens, limit=tokens):
            yield Batch(rows=rows, conditioning=self.conditioning.rows(rows).to(device))

    def state(self, step: int, rows: Tensor | None = None) -> State:
        """Where the float trajectories are before `step`, as the integrator's state; of some samples by number."""
        latent_ST, output_ST = (x if rows is None else x[rows] for x in (self.latent_ST, self.output_ST))
        first = max(0, step - self.integrator.order + 1)
        return State(latents=tuple(latent_ST[:, t] for t in range(first, step + 1)),
                     outputs=tuple(output_ST[:, t] for t in range(first, step)))

    def head(self, samples: int) -> Trace:
        """The first trajectories alone, in memory of their own."""
        return replace(self, latent_ST=self.latent_ST[:samples].clone(), output_ST=self.output_ST[:samples].clone(),
                       conditioning=self.conditioning.rows(slice(0, samples)).clone(), prompts=self.prompts[:samples],
                       seeds=self.seeds[:samples])


def memory_batches(samples: int, tokens: int, *, limit: int) -> list[slice]:
    """Samples of so many tokens each, split into as few even parts of at most `limit` tokens as there can be."""
    most = max(1, limit // tokens)
    parts = -(-samples // most)
    ends = [samples * part // parts for part in range(parts + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def record(bundle: Bundle, config: TraceConfig, *, on_progress: OnProgress = ignore_progress) -> Trace:
    """Run the float model over the prompts of `config` and keep every latent and output.

    Prompt i uses seed `config.seed + i`. Raises BadInput when there is no prompt."""
    prompts = config.prompts or bundle.prompts("calibration")[:16]
    if not prompts:
        raise BadInput("there is no calibration prompt; give at least one")
    return trajectories(bundle, prompts, tuple(config.seed + i for i in range(len(prompts))), bundle.integrator(config.steps),
                        on_progress=on_progress)


def trajectories(bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int], integrator: Integrator, *,
                 on_progress: OnProgress = ignore_progress) -> Trace:
    """The float model from the noise of each seed to the final latent."""
    conditioning, noise = bundle.encode(prompts), bundle.noise(seeds)
    parts = memory_batches(len(prompts), bundle.tokens, limit=RECORD_TOKENS)
    total, latents, outputs = integrator.steps * len(parts), [], []
    for number, rows in enumerate(parts):
        latents_T, outputs_T = [integrator.start(noise[rows]).latent.cpu()], []

        def on_step(step: int, _latent, output: Tensor, following: Tensor, number=number, latents_T=latents_T, outputs_T=outputs_T):
            latents_T.append(following.cpu())
            outputs_T.append(output.cpu())
            on_progress(Progress(stage="trace", done=number * integrator.steps + step + 1, total=total,
                                 message=f"float step {step + 1} of {integrator.steps}"))

        on_progress(Progress(stage="trace", done=number * integrator.steps, total=total, message=f"batch {number + 1} of {len(parts)}"))
        denoise(bundle, integrator, noise[rows], conditioning.rows(rows), on_step)
        latents.append(torch.stack(latents_T, 1))
        outputs.append(torch.stack(outputs_T, 1))
    return Trace(integrator=integrator, latent_ST=torch.cat(latents), output_ST=torch.cat(outputs), conditioning=conditioning.to("cpu"),
                 prompts=tuple(prompts), seeds=tuple(seeds), model_hash=bundle.model_hash, tokens=bundle.tokens,
                 generation=bundle.generation)
