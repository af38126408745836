"""Numbers about a finished clip, and whether they are within their limits.

They compare a clip with what it was made of, its reference and its pose video, so that a dark reference is no black
clip and a pose that stands still no frozen one. All but the identity are taken from a thinned-out copy of the frames,
on the CPU and without torch, in well under a hundredth of a clip's time. A number is None where it cannot be told.

Frames are uint8 (F, H, W, 3); a thin copy is float32 in levels, 0 … 255; blocks are means over 8 × 8 of its pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scail.agreement import Array, block_means, has_moved, motion_agreement
from scail.geometry import cover_size

Frames = NDArray[np.uint8]

SHORT_SIDE = 112  # pixels looked at along the short side of a clip; those between are left out
NUM_SHARP_FRAMES = 6  # looked at in full resolution
BLACK_LEVEL = 16  # video black
STILL_LEVEL = 1.5  # two frames that differ by less, but for a pixel in 200, are the same frame
FRAMES_AT_A_JUMP = 2  # compared before and after it


class Verdict(StrEnum):
    OK = "ok"
    NEEDS_REVIEW = "needs_review"
    FAILED_QUALITY = "failed_quality"


@dataclass(frozen=True)
class QualityNumbers:
    """What is measured of one clip.

    Attributes:
        nonfinite_percent: Latents that are no number.
        black_percent: Frames in which nothing is brighter than video black.
        frozen_percent: Of the frames before which the pose moves, those in which the clip does not.
        flicker: Levels by which brightness jumps to and fro, where it does so least: in the background.
        clipped_percent: Pixels with a colour at either end of its range, more than in the reference.
        saturation_shift: Levels of colourfulness, more or less than in the reference.
        colour_drift: CIE76 between the first and the last second, of what is common to the picture.
        join_jump: The same between neighbouring frames, above what is usual in the clip; the largest. A clip has no
            cuts: where it jumps, pieces were joined that were made apart, whoever joined them.
        sharpness: Strength of the sharpest edges, by that of the reference's.
        grain: Levels of noise from pixel to pixel, more than in the reference.
        identity: Cosine between reference and frames as the image encoder sees them, plain grey being its zero.
        motion_agreement: Correlation of what moves, when, where and whereto, with the same in the pose video.
    """

    nonfinite_percent: float | None = None
    black_percent: float | None = None
    frozen_percent: float | None = None
    flicker: float | None = None
    clipped_percent: float | None = None
    saturation_shift: float | None = None
    colour_drift: float | None = None
    join_jump: float | None = None
    sharpness: float | None = None
    grain: float | None = None
    identity: float | None = None
    motion_agreement: float | None = None


class Limit(NamedTuple):
    """Beyond `review` somebody should look, beyond `fail` the clip is of no use; low values are bad if it falls."""

    review: float
    fail: float

    @property
    def falls(self) -> bool:
        return self.fail < self.review

    def is_passed(self, value: float, bound: float) -> bool:
        """Whether `value` is on the wrong side of `bound`; what is no number always is."""
        return not (value >= bound if self.falls else value <= bound)


class QualityLimits(NamedTuple):
    """The limits of `QualityNumbers`, by the same names. docs/quality.md says where they come from."""

    nonfinite_percent: Limit = Limit(0, 0)
    black_percent: Limit = Limit(0, 50)
    frozen_percent: Limit = Limit(20, 80)
    flicker: Limit = Limit(2, 8)
    clipped_percent: Limit = Limit(10, 50)
    saturation_shift: Limit = Limit(15, 45)
    colour_drift: Limit = Limit(5, 15)
    join_jump: Limit = Limit(3, 10)
    sharpness: Limit = Limit(0.5, 0.2)
    grain: Limit = Limit(3, 8)
    identity: Limit = Limit(0.65, 0.3)
    motion_agreement: Limit = Limit(0.35, 0.1)


FATAL = ("nonfinite_percent", "black_percent")  # beyond their `fail` there is nothing to see


@dataclass(frozen=True)
class Finding:
    """A number beyond its limit; `bound` is the one that decided the verdict."""

    name: str
    value: float
    bound: float
    verdict: Verdict
    falls: bool

    @property
    def is_fatal(self) -> bool:
        return self.name in FATAL and self.verdict is Verdict.FAILED_QUALITY

    def __str__(self) -> str:
        side = "below" if self.falls else "above"
        return f"{self.name.replace('_', ' ')} {self.value:.3g}, {side} {self.bound:g}"


def judge(numbers: QualityNumbers, limits: QualityLimits) -> tuple[Verdict, tuple[Finding, ...]]:
    """The worst that any number says, and every number that is beyond a limit.

    Of a clip that shows nothing this alone is told: that black neither moves nor is sharp is no news.
    """
    findings = tuple(_findings(numbers, limits))
    if fatal := tuple(finding for finding in findings if finding.is_fatal):
        return Verdict.FAILED_QUALITY, fatal
    for verdict in (Verdict.FAILED_QUALITY, Verdict.NEEDS_REVIEW):
        if any(finding.verdict is verdict for finding in findings):
            return verdict, findings
    return Verdict.OK, findings


def _findings(numbers: QualityNumbers, limits: QualityLimits) -> Iterator[Finding]:
    for name in QualityNumbers.__dataclass_fields__:
        value, limit = getattr(numbers, name), getattr(limits, name)
        if value is None:
            continue
        if limit.is_passed(value, limit.fail):
            yield Finding(name, value, limit.fail, Verdict.FAILED_QUALITY, limit.falls)
        elif limit.is_passed(value, limit.review):
            yield Finding(name, value, limit.review, Verdict.NEEDS_REVIEW, limit.falls)


def measure(
    frames: Frames,
    reference: Frames,
    pose: Frames,
    *,
    fps: float,
    latents: Array | None = None,
    identity: float | None = None,
) -> QualityNumbers:
    """The numbers of a clip.

    Args:
        frames: The clip, (F, H, W, 3).
        reference: (H', W', 3) as it came, of any size.
        pose: At least F frames as they came, of any size.
        fps: Of the clip.
        latents: What the frames were decoded from.
        identity: From `scail.identity`; it needs the image encoder.
    """
    height, width = frames.shape[1:3]
    step = max(1, min(height, width) // SHORT_SIDE)
    thin, thin_reference, thin_pose = (
        _sample(pictures, height, width, step) for pictures in (frames, reference[None], pose[: len(frames)])
    )
    blocks = block_means(thin)
    lab = _to_lab(blocks)
    sharpness, grain = _sharpness_and_grain(frames, reference)
    return QualityNumbers(
        nonfinite_percent=None if latents is None else 100 * float((~np.isfinite(latents)).mean()),
        black_percent=_black_percent(thin, thin_reference),
        frozen_percent=_frozen_percent(thin, thin_pose),
        flicker=_flicker(_luma(blocks)),
        clipped_percent=max(0.0, _clipped_percent(thin) - _clipped_percent(thin_reference)),
        saturation_shift=abs(_colourfulness(thin) - _colourfulness(thin_reference)),
        colour_drift=_colour_drift(lab, max(1, round(fps))),
        join_jump=_join_jump(lab),
        sharpness=sharpness,
        grain=grain,
        identity=identity,
        motion_agreement=motion_agreement(thin, thin_pose),
    )


def _sample(frames: Frames, height: int, width: int, step: int) -> Array:
    """Every `step`-th pixel, (F, h, w, 3), of frames as if they were scaled and cropped to a clip of that size."""
    full = (frames.shape[1], frames.shape[2])
    axes = zip(full, (height, width), cover_size(*full, height, width), strict=True)
    rows, columns = (
        ((np.arange(step // 2, size, step) + (cover - size) // 2 + 0.5) * length / cover)
        .astype(int)
        .clip(0, length - 1)
        for length, size, cover in axes
    )
    return frames[:, rows[:, None], columns[None]].astype(np.float32)


def _luma(pixels: Array) -> Array:
    return pixels @ np.array([0.299, 0.587, 0.114], np.float32)


def _black_percent(thin: Array, thin_reference: Array) -> float | None:
    def brightest(pictures: Array) -> Array:
        return np.percentile(_luma(pictures).reshape(len(pictures), -1), 99, axis=1)

    if brightest(thin_reference)[0] <= 2 * BLACK_LEVEL:
        return None
    return 100 * float((brightest(thin) <= BLACK_LEVEL).mean())


def _frozen_percent(thin: Array, thin_pose: Array) -> float | None:
    moving = has_moved(block_means(thin_pose))
    if not moving.any():
        return None
    changes = np.abs(np.diff(thin, axis=0)).max(axis=3).reshape(len(moving), -1)
    still = np.percentile(changes, 99.5, axis=1) < STILL_LEVEL
    return 100 * float(still[moving].mean())


def _flicker(brightness: Array) -> float | None:
    """The quietest quarter of the blocks decides: somebody who moves does not fill three quarters of a picture."""
    if len(brightness) < 3:
        return None
    jumps = np.abs(brightness[:-2] - 2 * brightness[1:-1] + brightness[2:]).mean(axis=0)
    return float(np.percentile(jumps, 25))


def _clipped_percent(thin: Array) -> float:
    return 100 * float(((thin <= 0) | (thin >= 255)).any(axis=-1).mean())


def _colourfulness(thin: Array) -> float:
    return float((thin.max(axis=-1) - thin.min(axis=-1)).mean())


def _colour_drift(lab: Array, num_frames: int) -> float | None:
    num_frames = min(num_frames, len(lab) // 2)
    return float(_common_change(lab[:num_frames].mean(axis=0), lab[-num_frames:].mean(axis=0))) if num_frames else None


def _join_jump(lab: Array) -> float | None:
    """What is usual in the clip is taken off: a light that turns slowly drifts and does not jump."""
    length = FRAMES_AT_A_JUMP
    if len(lab) < 2 * length:
        return None
    means = np.mean([lab[start : len(lab) - length + 1 + start] for start in range(length)], axis=0)
    jumps = _common_change(means[:-length], means[length:])
    return float(jumps.max() - np.median(jumps))


def _common_change(before: Array, after: Array) -> Array:
    """CIE76 (...) of the median change of a block (..., h, w, 3): what moves changes fewer than half of them."""
    change = (after - before).reshape(*before.shape[:-3], -1, 3)
    return np.linalg.norm(np.median(change, axis=-2), axis=-1)


def _sharpness_and_grain(frames: Frames, reference: Frames) -> tuple[float, float]:
    """What a Laplacian leaves of a picture: the strongest of it are edges, its median is noise."""
    height, width = frames.shape[1:3]
    chosen = frames[np.linspace(0, len(frames) - 1, min(NUM_SHARP_FRAMES, len(frames))).round().astype(int)]
    (edges, noise), (reference_edges, reference_noise) = (
        np.percentile(_laplacian(_luma(_sample(pictures, height, width, 1))), (98, 50))
        for pictures in (chosen, reference[None])
    )
    return float(edges / max(reference_edges, 1.0)), max(0.0, float(noise - reference_noise))


def _laplacian(y: Array) -> Array:
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return np.abs(y[:, 1:-1, 1:-1] - around / 4)


def _to_lab(rgb: Array) -> Array:
    """CIELAB under D65 of sRGB levels."""
    levels = (rgb / 255).clip(0, 1)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = (116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2]))
    return np.stack(lab, axis=-1).astype(np.float32)
