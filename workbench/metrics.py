"""How far apart two images or latents are, and how sure we are: every mean comes with its 95 % interval over prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from workbench.types import Interval

# Identical images have an infinite PSNR, which no mean and no JSON can hold. One value off by one in a 1024 x 1024 image
# is 113 dB, so this ceiling is reached by identical images alone.
PSNR_CEILING_DB = 120.0


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Unit, direction, and the values that the metric can take."""

    unit: str = ""
    higher_is_better: bool
    least: float = 0.0
    most: float = math.inf


METRICS = {
    "psnr_db": Metric(unit="dB", higher_is_better=True, most=PSNR_CEILING_DB),
    "ssim": Metric(higher_is_better=True, least=-1.0, most=1.0),
    "vif": Metric(higher_is_better=True),
    "lpips": Metric(higher_is_better=False),
    "latent_nmse": Metric(higher_is_better=False),
}

_VIF_LEAST_PX = 41  # the metric's coarsest scale needs this much
_LUMA = (0.299, 0.587, 0.114)


def psnr_db(image, reference) -> float:
    """Peak signal-to-noise ratio of two uint8 images (H, W, 3)."""
    _check_images(image, reference)
    difference = np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    mse = float(np.mean(difference * difference))
    return PSNR_CEILING_DB if mse == 0 else min(PSNR_CEILING_DB, 10 * math.log10(255.0**2 / mse))


def ssim(image, reference) -> float:
    """Structural similarity of two uint8 images (H, W, 3): Gaussian window of 11, sigma 1.5, mean over channels."""
    # torchmetrics takes a second to import, and most callers of this module need only intervals.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_images(image, reference)
    first, second = (torch.from_numpy(np.array(i)).permute(2, 0, 1)[None].double() / 255 for i in (image, reference))
    return float(structural_similarity_index_measure(first, second, data_range=1.0))


def vif(image, reference) -> float | None:
    """Visual information fidelity (Sheikh and Bovik 2006, pixel domain) of two uint8 images (H, W, 3), on their luminance: the
    share of the information in `reference` that is left in `image`, 1 where nothing is lost. The perceptual metric here: it needs
    no downloaded weights. None for images under 41 pixels, which it is not defined for."""
    from torchmetrics.functional.image import visual_information_fidelity

    _check_images(image, reference)
    if min(np.shape(image)[:2]) < _VIF_LEAST_PX:
        return None
    first, second = (torch.from_numpy(np.asarray(i, dtype=np.float32) @ np.array(_LUMA, dtype=np.float32))[None, None]
                     for i in (image, reference))
    return float(visual_information_fidelity(first, second))


def latent_nmse(latent: Tensor, reference: Tensor) -> float:
    """Squared error of a latent over the squared norm of the float one."""
    error = (latent.double() - reference.double()).square().sum()
    return float(error / reference.double().square().sum())


def interval_of(name: str, values) -> Interval:
    """`interval` of a metric of METRICS, cut to the values that the metric can take: the mean lies among them, so no coverage is lost."""
    metric = METRICS[name]
    found = interval(values, unit=metric.unit, higher_is_better=metric.higher_is_better)
    return cut(found, metric.least, metric.most)


def cut(found: Interval, least: float, most: float) -> Interval:
    """An interval without what its quantity cannot be; of one value it stays unbounded."""
    return found if found.n == 1 else replace(found, low=max(found.low, least), high=min(found.high, most))


def interval(values, *, unit: str = "", higher_is_better: bool | None = True) -> Interval:
    """Mean with a 95 % interval (Student's t). One value says nothing about spread: its interval is unbounded."""
    from scipy.stats import t as student

    values = np.asarray(list(values), dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    half = math.inf
    if values.size > 1:
        half = float(student.ppf(0.975, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return Interval(mean=mean, low=mean - half, high=mean + half, n=int(values.size), unit=unit,
                    higher_is_better=higher_is_better)


def paired(first, second, *, unit: str = "", higher_is_better: bool | None = True) -> Interval:
    """Interval of first - second, prompt by prompt. Prompts differ more than methods do, so this one is much tighter
    than two intervals side by side."""
    first, second = np.asarray(list(first), dtype=np.float64), np.asarray(list(second), dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} values cannot be paired with {second.size}")
    return interval(first - second, unit=unit, higher_is_better=higher_is_better)


def proportion(hits) -> Interval:
    """Share of successes with its 95 % Wilson score interval, which stays within [0, 1] also at 0 and at n successes."""
    hits = [bool(hit) for hit in hits]
    if not hits:
        raise ValueError("an interval needs at least one value")
    n, share, z = len(hits), sum(hits) / len(hits), 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(mean=share, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n, higher_is_better=True)


def _check_images(image, reference) -> None:
    if np.shape(image) != np.shape(reference) or np.ndim(image) != 3:
        raise ValueError(f"images of shape {np.shape(image)} and {np.shape(reference)} cannot be compared")
    for each in (image, reference):
        if np.asarray(each).dtype != np.uint8:
            raise ValueError(f"images must be uint8, not {np.asarray(each).dtype}")
