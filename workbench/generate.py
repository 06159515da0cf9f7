"""The same prompts and seeds through float and quantized, and how far apart they come out.

Letters: S samples, T steps, H height, W width. Latents have any rank: (S, *shape).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench import lpips, metrics
from workbench.models import Bundle
from workbench.models.denoiser import Model, denoise
from workbench.models.integrator import Integrator
from workbench.models.media import Media
from workbench.options import BadInput, OnProgress, Progress, TraceConfig, ignore_progress
from workbench.quant.quantize import QuantizedModel
from workbench.replay.trace import memory_batches
from workbench.types import Comparison, Pair, Trajectories

# Both models see the same batches: a matrix product may round differently at another batch size.
BATCH, TOKENS = 8, 1024  # samples and tokens at most
DRAFT_PX = 128  # edge of the small pictures that are shown before a run has ended
TRAJECTORY_BYTES = 256 << 20  # latents of a comparison that are kept so that its steps can be looked at


@dataclass(frozen=True, kw_only=True)
class Generated:
    """latent_ST (S, T+1, *shape) float32 on the CPU; clean_ST (S, T, *shape): at each step the final latent that the model predicts
    there, the last one the final latent itself. seconds_per_image is of the transformer calls of all steps, without prompt encoding and
    decoding."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    latent_ST: Tensor
    clean_ST: Tensor
    media: Media
    seconds_per_image: float

    @property
    def images(self):
        """uint8 (S, H, W, 3): of a video its first frame."""
        return self.media.images


@dataclass(frozen=True)
class Drafts:
    """Small pictures of the images that a batch has finished, uint8 (h, w, 3), for whoever waits; `first` is the number of the first."""

    first: int
    thumbnails: tuple[Any, ...]


def run(bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int], integrator: Integrator, *, quantized: QuantizedModel | None = None,
        drafts: bool = False, on_progress: OnProgress = ignore_progress) -> Generated:
    """Generate one sample per (prompt, seed); `quantized` None means the float model. With `drafts` the report after a batch carries
    its images as `Drafts`."""
    prompts, seeds = tuple(prompts), tuple(seeds)
    if len(prompts) != len(seeds) or not prompts:
        raise BadInput(f"{len(prompts)} prompts and {len(seeds)} seeds; give at least one prompt and one seed for each")
    stage = "generate float" if quantized is None else "generate quantized"
    chunks = memory_batches(len(prompts), bundle.tokens, limit=min(TOKENS, BATCH * bundle.tokens))
    total, model, made = len(chunks) * integrator.steps, _Timed(quantized or bundle, bundle.device), []
    for number, rows in enumerate(chunks):
        def report(step: int, number=number, detail=None):
            on_progress(Progress(stage=stage, done=number * integrator.steps + step, total=total, detail=detail,
                                 message=f"step {step} of {integrator.steps}, batch {number + 1} of {len(chunks)}"))

        made.append(_batch(bundle, model, prompts[rows], seeds[rows], integrator, report, warm_up=number == 0))
        if drafts:
            images = made[-1][2].images
            report(integrator.steps, detail=Drafts(rows.start, tuple(_thumbnail(image) for image in images)))
    latents, clean, media = zip(*made)
    return Generated(prompts=prompts, seeds=seeds, latent_ST=torch.cat(latents), clean_ST=torch.cat(clean), media=Media.joined(media),
                     seconds_per_image=model.seconds / len(prompts))


def _thumbnail(image):
    """At most DRAFT_PX wide and high; smaller images as they are."""
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((DRAFT_PX, DRAFT_PX))
    return np.asarray(small)


def _batch(bundle: Bundle, model: _Timed, prompts, seeds, integrator: Integrator, report: Callable[[int], None], *,
           warm_up: bool) -> tuple[Tensor, Tensor, Media]:
    """(latent_ST, clean_ST, media) of one batch."""
    conditioning, noise = bundle.encode(prompts), bundle.noise(seeds)
    if warm_up:  # The first call pays for caches; it is not what a step costs.
        with torch.no_grad():
            model.untimed.predictor(integrator, conditioning.rows(slice(0, 1)))(integrator.start(noise[:1]).latent, 0)
    latents, clean = [integrator.start(noise).latent.float().cpu()], []

    def on_step(step: int, latent: Tensor, output: Tensor, following: Tensor) -> None:
        latents.append(following.float().cpu())
        last = step + 1 == integrator.steps
        clean.append(latents[-1] if last else integrator.clean(latent, output, step).float().cpu())
        report(step + 1)

    report(0)
    final = denoise(model, integrator, noise, conditioning, on_step)
    return torch.stack(latents, 1), torch.stack(clean, 1), bundle.decode(final)


class _Timed:
    """A model whose transformer calls are timed, with what it computes once for a batch (cached modulation costs time, too)."""

    def __init__(self, model: Model, device: torch.device):
        self.untimed, self.seconds, self._device = model, 0.0, device

    def predictor(self, integrator: Integrator, conditioning) -> Callable[[Tensor, int], Tensor]:
        predict = self._measure(self.untimed.predictor, integrator, conditioning)
        return lambda x, step: self._measure(predict, x, step)

    def _measure(self, function: Callable, *args):
        started = _now(self._device)
        value = function(*args)
        self.seconds += _now(self._device) - started
        return value


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
    integrator = bundle.integrator(steps)
    if float_run is None:
        float_run = run(bundle, prompts, seeds, integrator, drafts=drafts, on_progress=on_progress)
    if (float_run.prompts, float_run.seeds, float_run.latent_ST.shape[1]) != (prompts, seeds, steps + 1):
        raise ValueError("the float run is of other prompts, seeds or steps")
    quantized_run = run(bundle, prompts, seeds, integrator, quantized=quantized, drafts=drafts, on_progress=on_progress)
    return _comparison(bundle, quantized, integrator, float_run, quantized_run)


def sample(prompts: Sequence[str], seed: int, steps: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(prompts, one seed for each), validated like a trace's."""
    config = TraceConfig.parse({"prompts": tuple(prompts), "seed": seed, "steps": steps}, "generation")
    if not config.prompts:
        raise BadInput("no prompt is given; give at least one")
    return config.prompts, tuple(range(config.seed, config.seed + len(config.prompts)))


def _comparison(bundle: Bundle, quantized: QuantizedModel, integrator: Integrator, float_run: Generated,
                quantized_run: Generated) -> Comparison:
    pairs = tuple(_pair(index, float_run, quantized_run) for index in range(len(float_run.prompts)))
    backend = quantized.compute(bundle)
    kept = 2 * float_run.clean_ST.nbytes <= TRAJECTORY_BYTES
    return Comparison(
        trajectories=Trajectories(sigma_T1=integrator.sigma_T1, float_ST=float_run.clean_ST,
                                  quantized_ST=quantized_run.clean_ST) if kept else None,
        pairs=pairs, metrics=summary(pairs), float_seconds_per_image=float_run.seconds_per_image,
        quantized_seconds_per_image=quantized_run.seconds_per_image, float_bytes=bundle.float_bytes,
        quantized_bytes=quantized.weight_bytes, compute=backend.name, reason=backend.reason, plan=quantized.plan)


def preview(bundle: Bundle, kept: Trajectories, sample: int, step: int) -> tuple[Any, Any]:
    """What each model would draw if it stopped after `step`: images uint8 (H, W, 3) of the final latent that it predicts there. The last
    step's are the final images."""
    images = bundle.decode(torch.stack([kept.float_ST[sample, step], kept.quantized_ST[sample, step]])).images
    return images[0], images[1]


def summary(pairs: Sequence[Pair]) -> dict[str, metrics.Interval]:
    """Mean and interval of every metric over the pairs."""
    return {name: metrics.interval_of(name, [getattr(pair, name) for pair in pairs])
            for name in metrics.METRICS if all(getattr(pair, name) is not None for pair in pairs)}


def _pair(index: int, float_run: Generated, quantized_run: Generated) -> Pair:
    latent_T, reference_T = quantized_run.latent_ST[index], float_run.latent_ST[index]
    nmse_T = tuple(metrics.latent_nmse(latent_T[t], reference_T[t]) for t in range(1, len(reference_T)))
    frames, references = quantized_run.media.frames[index], float_run.media.frames[index]

    def mean(metric: Callable) -> float | None:
        """Over the frames; None where it is not defined."""
        values = [metric(frame, reference) for frame, reference in zip(frames, references)]
        return None if None in values else float(np.mean(values))

    return Pair(prompt=float_run.prompts[index], seed=float_run.seeds[index], frames_float=references, frames_quantized=frames,
                psnr_db=mean(metrics.psnr_db), ssim=mean(metrics.ssim), vif=mean(metrics.vif), lpips=mean(lpips.distance),
                latent_nmse=nmse_T[-1], latent_nmse_T=nmse_T)
