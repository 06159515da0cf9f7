"""What a model draws: images and videos are frames.

Letters: S samples, F frames (1 for images), H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Media:
    """frames uint8 (S, F, H, W, 3); F = 1 for images. fps: frames a second of a video, None for images."""

    frames: Any
    fps: float | None = None

    def __post_init__(self):
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[1] < 1:
            raise ValueError(f"frames must be uint8 (S, F, H, W, 3), not {frames.dtype} {tuple(frames.shape)}")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def images(self):
        """The first frame of every sample, uint8 (S, H, W, 3): the image, where a sample is one."""
        return self.frames[:, 0]

    @classmethod
    def of_images(cls, images) -> Media:
        """Images uint8 (S, H, W, 3)."""
        return cls(frames=np.asarray(images)[:, None])

    @classmethod
    def joined(cls, parts: Sequence[Media]) -> Media:
        """All samples of all parts, in order."""
        return cls(frames=np.concatenate([part.frames for part in parts]), fps=parts[0].fps)
