"""The same prompts and seeds through float and quantized, and how far apart they come out.

Letters: S samples, T steps, M tokens, D channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench import lpips, metrics
from workbench.options import BadInput, OnProgress, Progress, TraceConfig, ignore_progress
from workbench.types import Comparison, Pair, Schedule, Trajectories

# Both models see the same batches: a matrix product may round differently at another batch size.
BATCH = 8
DRAFT_PX = 128  # edge of the small pictures that are shown before a run has ended
TRAJECTORY_BYTES = 256 << 20  # latents of a comparison that are kept so that its steps can be looked at


@dataclass(frozen=True, kw_only=True)
class Generated:
    """latent_STMD (S, T+1, M, D) float32 on the CPU; images uint8 (S, H, W, 3); seconds_per_image is of the transformer
    calls of all steps, without prompt encoding and image decoding."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    latent_STMD: Tensor
    images: Any
    seconds_per_image: float


@dataclass(frozen=True)
class Drafts:
    """Small pictures of the images that a batch has finished, uint8 (h, w, 3), for whoever waits; `first` is the number of the first."""

    first: int
    thumbnails: tuple[Any, ...]


def run(bundle, prompts: Sequence[str], seeds: Sequence[int], schedule: Schedule, *, quantized=None, drafts: bool = False,
        on_progress: OnProgress = ignore_progress) -> Generated:
    """Generate one image per (prompt, seed); `quantized` None means the float model. With `drafts` the report after a batch carries
    its images as `Drafts`."""
    prompts, seeds = tuple(prompts), tuple(seeds)
    if len(prompts) != len(seeds) or not prompts:
        raise BadInput(f"{len(prompts)} prompts and {len(seeds)} seeds; give at least one prompt and one seed for each")
    stage = "generate float" if quantized is None else "generate quantized"
    chunks = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
    total = len(chunks) * schedule.steps
    latents, images, seconds = [], [], 0.0
    for number, rows in enumerate(chunks):
        def report(step: int, number=number, detail=None):
            on_progress(Progress(stage=stage, done=number * schedule.steps + step, total=total, detail=detail,
                                 message=f"step {step} of {schedule.steps}, batch {number + 1} of {len(chunks)}"))

        latent_STMD, pictures, spent = _batch(bundle, prompts[rows], seeds[rows], schedule, quantized, report,
                                              warm_up=number == 0)
        latents.append(latent_STMD)
        images.append(pictures)
        seconds += spent
        if drafts:
            report(schedule.steps, detail=Drafts(rows.start, tuple(_thumbnail(image) for image in pictures)))
    return Generated(prompts=prompts, seeds=seeds, latent_STMD=torch.cat(latents), images=np.concatenate(images),
                     seconds_per_image=seconds / len(prompts))


def _thumbnail(image):
    """At most DRAFT_PX wide and high; smaller images as they are."""
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((DRAFT_PX, DRAFT_PX))
    return np.asarray(small)


@torch.no_grad()
def _batch(bundle, prompts, seeds, schedule: Schedule, quantized, report: Callable[[int], None], *, warm_up: bool):
    """(latent_STMD, images, seconds of transformer calls) of one batch."""
    # The lock is held for the whole batch, because the quantized layers sit in a transformer that others use too.
    with bundle.lock, quantized.attached(bundle) if quantized is not None else nullcontext():
        conditioning = bundle.encode(prompts)
        latent_SMD = bundle.initial_latents(seeds)
        seconds = 0.0
        if quantized is not None:  # with cached modulation a part of what an image costs; else nothing
            started = _now(bundle.device)
            quantized.cache_modulation(bundle, schedule, conditioning)
            seconds += _now(bundle.device) - started
        if warm_up:  # The first call pays for caches; it is not what a step costs.
            bundle.velocity(latent_SMD[:1], schedule, 0, conditioning.rows(slice(0, 1)))
        trajectory = [latent_SMD.float().cpu()]
        report(0)
        for step in range(schedule.steps):
            started = _now(bundle.device)
            velocity_SMD = bundle.velocity(latent_SMD, schedule, step, conditioning)
            seconds += _now(bundle.device) - started
            latent_SMD = bundle.advance(latent_SMD, velocity_SMD, schedule, step)
            trajectory.append(latent_SMD.float().cpu())
            report(step + 1)
        return torch.stack(trajectory, dim=1), np.asarray(bundle.decode(latent_SMD)), seconds


def _now(device) -> float:
    """Seconds of a clock, after the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(bundle, quantized, prompts: Sequence[str], seed: int, steps: int, *,
            on_progress: OnProgress = ignore_progress, float_run: Generated | None = None, drafts: bool = False) -> Comparison:
    """Prompt i with seed + i through both models. Pass `float_run` (an earlier float run of the same prompts, seed and
    steps) to compare several methods with one float generation; `drafts` as in `run`."""
    prompts, seeds = sample(prompts, seed, steps)
    schedule = bundle.schedule(steps)
    if float_run is None:
        float_run = run(bundle, prompts, seeds, schedule, drafts=drafts, on_progress=on_progress)
    if (float_run.prompts, float_run.seeds, float_run.latent_STMD.shape[1]) != (prompts, seeds, steps + 1):
        raise ValueError("the float run is of other prompts, seeds or steps")
    quantized_run = run(bundle, prompts, seeds, schedule, quantized=quantized, drafts=drafts, on_progress=on_progress)
    return _comparison(bundle, quantized, schedule, float_run, quantized_run)


def sample(prompts: Sequence[str], seed: int, steps: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(prompts, one seed for each), validated like a trace's."""
    config = TraceConfig.parse({"prompts": tuple(prompts), "seed": seed, "steps": steps}, "generation")
    if not config.prompts:
        raise BadInput("no prompt is given; give at least one")
    return config.prompts, tuple(range(config.seed, config.seed + len(config.prompts)))


def _comparison(bundle, quantized, schedule: Schedule, float_run: Generated, quantized_run: Generated) -> Comparison:
    pairs = tuple(_pair(index, float_run, quantized_run) for index in range(len(float_run.prompts)))
    backend = quantized.compute(bundle)
    kept = 2 * float_run.latent_STMD.nbytes <= TRAJECTORY_BYTES
    return Comparison(
        trajectories=Trajectories(sigma_T1=schedule.sigma_T1, float_STMD=float_run.latent_STMD,
                                  quantized_STMD=quantized_run.latent_STMD) if kept else None,
        pairs=pairs, metrics=summary(pairs), float_seconds_per_image=float_run.seconds_per_image,
        quantized_seconds_per_image=quantized_run.seconds_per_image, float_bytes=bundle.float_bytes,
        quantized_bytes=quantized.weight_bytes, compute=backend.name, reason=backend.reason, plan=quantized.plan)


def preview(bundle, kept: Trajectories, sample: int, step: int) -> tuple[Any, Any]:
    """What each model would draw if it stopped after `step`: images uint8 (H, W, 3) of the clean latent it predicts there,
    x_t - sigma_t v with v = (x_{t+1} - x_t) / (sigma_{t+1} - sigma_t). The last step's are the final images."""
    sigma, following = float(kept.sigma_T1[step]), float(kept.sigma_T1[step + 1])
    clean_2MD = []
    for latent_STMD in (kept.float_STMD, kept.quantized_STMD):
        now_MD, next_MD = latent_STMD[sample, step], latent_STMD[sample, step + 1]
        clean_2MD.append(next_MD if following == 0 else now_MD - sigma * (next_MD - now_MD) / (following - sigma))
    images = bundle.decode(torch.stack(clean_2MD))
    return images[0], images[1]


def summary(pairs: Sequence[Pair]) -> dict[str, metrics.Interval]:
    """Mean and interval of every metric over the pairs."""
    return {name: metrics.interval_of(name, [getattr(pair, name) for pair in pairs])
            for name in metrics.METRICS if all(getattr(pair, name) is not None for pair in pairs)}


def _pair(index: int, float_run: Generated, quantized_run: Generated) -> Pair:
    latent_TMD, reference_TMD = quantized_run.latent_STMD[index], float_run.latent_STMD[index]
    nmse_T = tuple(metrics.latent_nmse(latent_TMD[t], reference_TMD[t]) for t in range(1, len(reference_TMD)))
    image, reference = quantized_run.images[index], float_run.images[index]
    return Pair(prompt=float_run.prompts[index], seed=float_run.seeds[index], image_float=reference, image_quantized=image,
                psnr_db=metrics.psnr_db(image, reference), ssim=metrics.ssim(image, reference), vif=metrics.vif(image, reference),
                lpips=lpips.distance(image, reference), latent_nmse=nmse_T[-1], latent_nmse_T=nmse_T)
