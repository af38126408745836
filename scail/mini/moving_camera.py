"""Good clips as a camera in somebody's hand would see them: the persons as they are, the background on its way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scail.quality import Frames

WAVES = ((0.31, 0.07, 0.0), (-0.12, 0.23, 1.0), (0.05, -0.17, 2.0))  # radians a pixel to the right and down; phase
LEVELS = 15.0  # of each wave: a wall with something on it
ROOM = 48  # levels to either end that the waves need
RIM = 2  # pixels around a person that are hers still, shades of the edge among them


def with_moving_background(frames: Frames, somebody: NDArray[np.bool_]) -> Frames:
    """The clip before a patterned background that goes by and sways.

    Args:
        frames: (F, H, W, 3), before a background that stands still.
        somebody: (F, H, W), where a person is.
    """
    time = np.arange(len(frames), dtype=np.float32)[:, None, None]
    right, down = time + 3 * np.sin(time / 4), 2 * np.sin(time / 3)  # pixels
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)
    pattern = sum(np.sin(a * (x + right) + b * (y + down) + phase) for a, b, phase in WAVES)  # (F, H, W)
    behind = _background(frames, somebody).clip(ROOM, 255 - ROOM) + LEVELS * pattern[..., None]
    return np.where(_grown(somebody)[..., None], frames, behind.round()).astype(np.uint8)


def _background(frames: Frames, somebody: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W, 3): each pixel when nobody is before it; the picture's mean where always somebody is."""
    free = ~_grown(somebody)[..., None]
    seen = (frames * free).sum(axis=0) / free.sum(axis=0).clip(min=1)
    return np.where(free.any(axis=0), seen, frames.mean(axis=(0, 1, 2))).astype(np.float32)


def _grown(somebody: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = somebody
    for axis in (1, 2):
        grown = np.any([np.roll(grown, shift, axis) for shift in range(-RIM, RIM + 1)], axis=0)
    return grown
