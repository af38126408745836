"""Good clips made bad on purpose, each in one way: what the numbers of `scail.quality` are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scail.quality import Frames

Pixels = NDArray[np.float32]  # levels, (T, H, W, 3)


@dataclass(frozen=True)
class Defect:
    """A way to spoil a clip.

    Attributes:
        spoil: Frames (T, H, W, 3) in, as many out.
        shows_in: The number that has to notice.
        related: Numbers that may notice too, since what they measure is changed as well.
    """

    name: str
    spoil: Callable[[Frames], Frames]
    shows_in: str
    related: frozenset[str] = frozenset()


def _levels(change: Callable[[Pixels], NDArray[np.floating]]) -> Callable[[Frames], Frames]:
    """A change of levels as one of frames."""
    return lambda frames: change(frames.astype(np.float32)).clip(0, 255).round().astype(np.uint8)


def _along(frames: Pixels) -> Pixels:
    """0 … 1 from the first frame to the last, (T, 1, 1, 1)."""
    return np.linspace(0, 1, len(frames), dtype=np.float32)[:, None, None, None]


def _odd(frames: Pixels) -> Pixels:
    """1 in every other frame, (T, 1, 1, 1)."""
    return (np.arange(len(frames), dtype=np.float32) % 2)[:, None, None, None]


def _grey(frames: Pixels) -> Pixels:
    return frames.mean(axis=-1, keepdims=True).repeat(3, axis=-1)


def _noise(frames: Pixels, cell: int) -> Pixels:
    """Unit noise, the same for the three colours, in squares of `cell` pixels."""
    num, height, width = frames.shape[:3]
    cells = np.random.default_rng(0).standard_normal((num, -(-height // cell), -(-width // cell), 1), np.float32)
    return cells.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width]


def _blur(frames: Pixels, radius: int = 2) -> Pixels:
    for axis in (1, 2, 1, 2):
        frames = np.mean([np.roll(frames, shift, axis) for shift in range(-radius, radius + 1)], axis=0)
    return frames


def _late(frames: Frames, num_frames: int = 8) -> Frames:
    """The same, half a second later."""
    return np.concatenate((frames[:1].repeat(num_frames, axis=0), frames[:-num_frames]))


def _slide(frames: Frames) -> Frames:
    """The first frame, pushed to and fro by as much as somebody moves."""
    shifts = (8 * np.sin(np.arange(len(frames)) / 2)).round().astype(int)
    return np.stack([np.roll(frames[0], shift, axis=1) for shift in shifts])


_CHANGES = frozenset({"motion_agreement"})  # a picture that changes everywhere does so also where nothing moves

DEFECTS = (
    Defect("black", _levels(lambda frames: frames * 0.02), "black_percent"),
    Defect(
        "frozen",
        lambda frames: frames[:1].repeat(len(frames), axis=0),
        "frozen_percent",
        frozenset({"motion_agreement"}),
    ),
    Defect("every other frame darker", _levels(lambda frames: frames * (1 - 0.12 * _odd(frames))), "flicker", _CHANGES),
    Defect(
        "boiling",
        _levels(lambda frames: frames * (1 - 0.2 * np.abs(_noise(frames, 8)))),
        "flicker",
        _CHANGES | {"saturation_shift"},
    ),
    Defect(
        "burnt", _levels(lambda frames: (frames - 90) * 4 + 190), "clipped_percent", frozenset({"saturation_shift"})
    ),
    Defect(
        "garish",
        _levels(lambda frames: _grey(frames) + (frames - _grey(frames)) * 2.5),
        "saturation_shift",
        frozenset({"clipped_percent"}),
    ),
    Defect("grey", _levels(_grey), "saturation_shift"),
    Defect(
        "turning yellow",
        _levels(lambda frames: frames * (1 - _along(frames) * np.array((0.1, 0.15, 0.8), np.float32))),
        "colour_drift",
        frozenset({"saturation_shift"}),
    ),
    Defect(
        "bluer from the middle on",
        _levels(lambda frames: frames + (_along(frames) > 0.5) * np.array((-14, 0, 14), np.float32)),
        "join_jump",
        frozenset({"colour_drift", "flicker", "saturation_shift", "clipped_percent"}),
    ),
    Defect("blurred", _levels(_blur), "sharpness"),
    Defect(
        "noise",
        _levels(lambda frames: frames + 10 * _noise(frames, 1)),
        "grain",
        frozenset({"clipped_percent", "flicker"}),
    ),
    Defect("sliding instead of moving", _slide, "motion_agreement"),
    Defect("played backwards", lambda frames: frames[::-1], "motion_agreement"),
    Defect("half a second late", _late, "motion_agreement", frozenset({"frozen_percent"})),
    Defect("mirrored", lambda frames: frames[:, :, ::-1], "motion_agreement"),
)
