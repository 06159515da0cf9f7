"""The gate of emoji-flux: draw captions through the real pipeline and ask a nearest-image judge what they show.

`python assets/build/evaluate.py` reports, over 200 trained captions and the held-out (emoji, style) pairs,
- retrieval: the nearest of all source images, trained on or held out, shows the same emoji (in any style);
- style: the nearest source image has the style asked for;
- the autoencoder's mean PSNR over the source images;
and writes a grid of 48 samples. Figures carry 95 % Wilson intervals.

Features: the image is shrunk to 32 x 32, in three planes of opponent colour, each pixel minus the set's mean, and
whitened by the principal components of the source images down to `FEATURES` numbers; similarity is the cosine.
Whitening keeps the white ground and the large yellow disc that most faces share from deciding everything.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
from common import CACHE_FOLDER, MODEL_FOLDER, prepare_process, write_json
from diffusers import FluxPipeline
from images import load_records, trained_rows
from PIL import Image

FEATURES = 256
FEATURE_PX = 32
GRID_COLUMNS, GRID_ROWS = 8, 6
SAMPLE_SEED = 3


@dataclass(frozen=True)
class Judge:
    """A fitted feature space: mean_F, basis_FK and the unit features of the source images."""

    mean_F: np.ndarray
    basis_FK: np.ndarray
    source_IK: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Score:
    """Hits out of `count` with the Wilson interval's bounds, all shares in [0, 1]."""

    hits: int
    count: int
    share: float
    low: float
    high: float


def planes(images: np.ndarray) -> np.ndarray:
    """uint8 (I, 128, 128, 3) -> float (I, F): shrunken luminance and two opponent colours."""
    side = images.shape[1] // FEATURE_PX
    small = images.reshape(len(images), FEATURE_PX, side, FEATURE_PX, side, 3).mean((2, 4)) / 255
    red, green, blue = np.moveaxis(small, -1, 0)
    stacked = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], axis=1)
    return stacked.reshape(len(images), -1).astype(np.float32)


def project(images: np.ndarray, mean_F: np.ndarray, basis_FK: np.ndarray) -> np.ndarray:
    """Unit features (I, K)."""
    features = (planes(images) - mean_F) @ basis_FK
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def fit_judge(sources: np.ndarray) -> Judge:
    """Half-whitened principal components: between raw pixels (shared ground decides) and full whitening (noise decides)."""
    flat = planes(sources)
    mean = flat.mean(0)
    _, spread, axes = np.linalg.svd(flat - mean, full_matrices=False)
    basis = axes[:FEATURES].T / np.sqrt(spread[:FEATURES])
    return Judge(mean, basis, project(sources, mean, basis))


def wilson(hits: int, count: int) -> Score:
    """Share with its 95 % Wilson score interval."""
    z = 1.96
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Score(hits=hits, count=count, share=share, low=centre - half, high=centre + half)


def judge_samples(judge: Judge, candidates: list[dict], asked: list[dict], samples: np.ndarray) -> dict[str, Score]:
    """Scores of uint8 samples (I, 128, 128, 3) drawn for the `asked` records; `candidates` are the judge's sources."""
    similarity = project(samples, judge.mean_F, judge.basis_FK) @ judge.source_IK.T
    nearest = [candidates[index] for index in similarity.argmax(1)]
    pairs = list(zip(asked, nearest, strict=True))
    return {
        "retrieval": wilson(sum(want["name"] == found["name"] for want, found in pairs), len(pairs)),
        "style": wilson(sum(want["style"] == found["style"] for want, found in pairs), len(pairs)),
    }


def draw(pipe: FluxPipeline, captions: list[str], steps: int, batch: int = 25) -> np.ndarray:
    """uint8 (captions, 128, 128, 3), each caption with its own seed."""
    images = []
    for first in range(0, len(captions), batch):
        chosen = captions[first : first + batch]
        seeds = [torch.Generator().manual_seed(SAMPLE_SEED + first + i) for i in range(len(chosen))]
        images += pipe(chosen, height=128, width=128, num_inference_steps=steps, max_sequence_length=16, generator=seeds).images
    return np.stack([np.asarray(image) for image in images])


@torch.inference_mode()
def reconstruction_psnr(pipe: FluxPipeline, sources: np.ndarray) -> np.ndarray:
    """PSNR in dB of every source image through the autoencoder."""
    psnr = []
    for first in range(0, len(sources), 32):
        image = torch.from_numpy(sources[first : first + 32]).permute(0, 3, 1, 2).float() / 127.5 - 1
        out = pipe.vae.decode(pipe.vae.encode(image).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(-10 * torch.log10((out - image).square().mean((1, 2, 3)) / 4))
    return torch.cat(psnr).numpy()


def write_grid(samples: np.ndarray, path) -> None:
    """Tile 48 samples row by row into one PNG."""
    rows = samples.reshape(GRID_ROWS, GRID_COLUMNS, *samples.shape[1:])
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="trained captions to draw")
    parser.add_argument("--held-out", type=int, default=100, help="held-out pairs to draw")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--psnr-count", type=int, default=None, help="source images to reconstruct (default: all)")
    options = parser.parse_args()
    prepare_process()
    records = load_records()
    sources = np.load(CACHE_FOLDER / "images.npy")
    judge = fit_judge(sources)
    pipe = FluxPipeline.from_pretrained(MODEL_FOLDER, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(SAMPLE_SEED)
    asked = [records[i] for i in rng.choice(trained_rows(records), options.count, replace=False)]
    held_out = [r for r in records if r["held_out"]][: options.held_out]
    report = {}
    for label, chosen in (("trained", asked), ("held_out", held_out)):
        if not chosen:
            continue
        samples = draw(pipe, [r["caption"] for r in chosen], options.steps)
        for kind, score in judge_samples(judge, records, chosen, samples).items():
            report[f"{label} {kind}"] = vars(score)
            print(f"{label} {kind}: {score.hits}/{score.count} = {score.share:.1%} [{score.low:.1%}, {score.high:.1%}]")
        if label == "trained":
            write_grid(samples[: GRID_COLUMNS * GRID_ROWS], MODEL_FOLDER / "grid.png")
            report["grid"] = [r["caption"] for r in chosen[: GRID_COLUMNS * GRID_ROWS]]
        np.save(CACHE_FOLDER / f"samples_{label}.npy", samples)
    psnr = reconstruction_psnr(pipe, sources[:: max(1, len(sources) // (options.psnr_count or len(sources)))])
    report["psnr_db"] = {"mean": float(psnr.mean()), "least": float(psnr.min()), "count": len(psnr)}
    print(f"autoencoder: {psnr.mean():.2f} dB mean, {psnr.min():.2f} dB least, {len(psnr)} images")
    write_json(MODEL_FOLDER / "evaluation.json", report)


if __name__ == "__main__":
    main()
