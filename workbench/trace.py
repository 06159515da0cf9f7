"""Record the float model's trajectories once; every later stage replays them.

What is stored is the trajectory, not Gram matrices: a Hessian needs alpha before it can be accumulated.
"""

from __future__ import annotations

import torch

from workbench.models import Bundle
from workbench.options import BadInput, OnProgress, Progress, TraceConfig, ignore_progress
from workbench.types import Trace

CHUNK = 16  # samples per forward


def record(bundle: Bundle, config: TraceConfig, *, on_progress: OnProgress = ignore_progress) -> Trace:
    """Run the float model over the prompts of `config` and keep every latent (S, T+1, M, D) and output (S, T, M, D).

    Prompt i uses seed `config.seed + i`. Raises BadInput when there is no prompt."""
    prompts = config.prompts or bundle.prompts("calibration")[:16]
    if not prompts:
        raise BadInput("there is no calibration prompt; give at least one")
    seeds = tuple(config.seed + i for i in range(len(prompts)))
    schedule = bundle.schedule(config.steps)
    conditioning = bundle.encode(prompts)
    latent_SMD = bundle.initial_latents(seeds)
    latents, targets = [latent_SMD], []
    for step in range(schedule.steps):
        on_progress(Progress(stage="trace", done=step, total=schedule.steps, message=f"float step {step + 1} of {schedule.steps}"))
        target_SMD = forward(bundle, latents[-1], schedule, step, conditioning)
        targets.append(target_SMD)
        latents.append(bundle.advance(latents[-1], target_SMD, schedule, step))
    on_progress(Progress(stage="trace", done=schedule.steps, total=schedule.steps, message="float trajectories recorded"))
    return Trace(schedule=schedule, latent_STMD=torch.stack(latents, 1).cpu(), target_STMD=torch.stack(targets, 1).cpu(),
                 conditioning=conditioning, prompts=tuple(prompts), seeds=seeds, model_hash=bundle.model_hash)


@torch.no_grad()
def forward(bundle: Bundle, latent_SMD, schedule, step: int, conditioning):
    """The model's output at one step, in chunks of samples so that memory stays bounded. Whoever looks into a layer meanwhile waits."""
    with bundle.lock:
        return torch.cat([bundle.velocity(latent_SMD[i:i + CHUNK], schedule, step, conditioning.rows(slice(i, i + CHUNK)))
                          for i in range(0, len(latent_SMD), CHUNK)])
