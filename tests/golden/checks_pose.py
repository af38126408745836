"""Checks of the pose renderer against frames that the official one drew.

A file holds the joints and key points of a few frames (the names of the arrays are in `scail/pose/io.py`), `mode` for
the palette, and what the official code made of them: `frames` RGBA, and with key points also `frames3d`, the bones
alone, and `canvas2d`, the overlay alone. The official renderer marches rays in float32: at joints, where two bones
share a sphere, rounding decides whose colour is seen, so that a few pixels of each frame cannot be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scail.pose.io import load_pose
from scail.pose.overlay import draw_overlay
from scail.pose.render import render_bones, render_pose
from scail.pose.skeleton import PoseSequence
from tests.golden.measure import Measured

Bytes = NDArray[np.uint8]


def is_pose_fixture(path: Path) -> bool:
    """Whether the file holds frames of the official renderer."""
    with np.load(path) as arrays:
        return "joints24" in arrays and "frames" in arrays


def check_npz(path: Path) -> list[Measured]:
    """Check a file of either kind; cases of the alignment are skipped by name until there is an alignment."""
    if is_pose_fixture(path):
        return check_pose_render(path)
    with np.load(path) as arrays:
        if "0_points3d" in arrays:
            pytest.skip(f"{path.name}: alignment is not yet supported")
    pytest.fail(f"{path.name} is of an unknown kind; known are rendered poses and cases of the alignment")


def check_pose_render(path: Path) -> list[Measured]:
    """Bones alone, overlay alone, and final frames."""
    sequence = load_pose(path)
    with np.load(path) as arrays:
        palette = str(arrays["mode"])
        frames = arrays["frames"]
        bones = arrays.get("frames3d", frames)
        canvas = arrays.get("canvas2d")
    ours = render_bones(sequence, palette=palette)
    measured = [
        Measured("bones", "1 - IoU of the alphas", _one_minus_iou(ours[..., 3] == 204, bones[..., 3] == 204), 3e-4),
        *_differences("bones", ours[..., :3], bones[..., :3]),
        *_differences("frames", render_pose(sequence, palette=palette), frames[..., :3]),
    ]
    if canvas is not None:
        measured.extend(_canvas_differences(_canvas(sequence), canvas, num_persons=sequence.num_persons))
    return measured


def _canvas(sequence: PoseSequence) -> Bytes:
    assert sequence.keypoints is not None
    canvas = np.zeros((sequence.num_frames, sequence.height, sequence.width, 3), np.uint8)
    painted = draw_overlay(sequence.keypoints, height=sequence.height, width=sequence.width)
    canvas.reshape(-1, 3)[painted.pixel] = painted.colour
    return canvas


def _differences(case: str, ours: Bytes, theirs: Bytes) -> Iterator[Measured]:
    error = np.abs(ours.astype(np.float64) - theirs)
    lit, their_lit = ours.any(axis=-1), theirs.any(axis=-1)
    common = error[lit & their_lit]
    yield Measured(case, "1 - IoU of the silhouettes", _one_minus_iou(lit, their_lit), 3e-4)
    yield Measured(case, "-PSNR in dB", 10 * np.log10(max(float((error**2).mean()), 1e-9) / 255**2), -52.0)
    yield Measured(case, "mean absolute error", float(common.mean()), 0.3)
    yield Measured(case, "99th percentile of the error", float(np.percentile(common, 99)), 2.0)
    yield Measured(case, "mean colour", _colour_distance(ours[lit], theirs[their_lit]), 0.5)


def _canvas_differences(ours: Bytes, theirs: Bytes, *, num_persons: int) -> Iterator[Measured]:
    """One person is equal to the byte. With two the official code swaps hands between the canvases that it adds."""
    lit, their_lit = ours.any(axis=-1), theirs.any(axis=-1)
    if num_persons == 1:
        yield Measured("overlay", "pixels that differ", float((ours != theirs).any(axis=-1).sum()), 0.0)
    yield Measured("overlay", "1 - IoU", _one_minus_iou(lit, their_lit), 0.10)
    yield Measured("overlay", "mean colour", _colour_distance(ours[lit], theirs[their_lit]), 3.0)


def _one_minus_iou(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    return 1.0 - float((ours & theirs).sum()) / float((ours | theirs).sum())


def _colour_distance(ours: Bytes, theirs: Bytes) -> float:
    return float(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max())
