"""Checks of the pose renderer against frames that the official one drew, and of the alignment.

A file holds the joints and key points of a few frames (the names of the arrays are in `scail/pose/io.py`), `mode` for
the palette, and what the official code made of them: `frames` RGBA, and with key points also `frames3d`, the bones
alone, and `canvas2d`, the overlay alone. The official renderer marches rays in float32: at joints, where two bones
share a sphere, rounding decides whose colour is seen, so that a few pixels of each frame cannot be equal.

Cases of the alignment hold the points that the official solver was given, and the camera that it stopped at. Its two
scales trade off against each other, so that costs are compared; cameras too, where it stopped at the least cost and not
at a bound. In case 0 it stopped at a cost of 1,425 where 106.5 can be had, as SciPy's L-BFGS-B finds too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scail.pose.align import CameraFit, fit_camera, move_keypoints
from scail.pose.camera import project
from scail.pose.io import load_pose
from scail.pose.overlay import draw_overlay
from scail.pose.render import render_bones, render_pose
from scail.pose.skeleton import Keypoints2D, PoseSequence, hands_by_person
from tests.golden.measure import Measured

Bytes = NDArray[np.uint8]
Arrays = Mapping[str, NDArray[Any]]


def check_npz(path: Path) -> list[Measured]:
    """Check a file of either kind."""
    with np.load(path) as arrays:
        if "0_points3d" in arrays:
            return [entry for case in range(int(arrays["n"])) for entry in check_camera_fit(arrays, case)]
        if "joints24" in arrays and "frames" in arrays:
            moved = check_moved_points(arrays, path) if "dw_shifted_faces" in arrays else ()
            return [*check_pose_render(path), *moved]
    pytest.fail(f"{path.name} is of an unknown kind; known are rendered poses and cases of the alignment")


def check_camera_fit(arrays: Arrays, case: int) -> Iterator[Measured]:
    """Ours is at most as far from the targets as the official camera, and within its bounds."""
    points, targets, intrinsics = (arrays[f"{case}_{name}"] for name in ("points3d", "points2d", "K_out"))
    focal, (height, width) = float(arrays[f"{case}_focal"]), arrays[f"{case}_size_hw"]
    neck, others = (1.0, 4.0) if arrays[f"{case}_down"] else (8.0, 1.0)
    weights = np.array([neck, *[others] * (len(points) - 1)])
    before = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])

    fit = fit_camera(points, targets, weights, before, height=height, width=width)

    name = f"camera {case}"
    theirs = float(weights @ ((project(points, intrinsics) - targets) ** 2).sum(axis=1))
    yield Measured(name, "the cost as it is stated", abs(theirs / float(arrays[f"{case}_cost"]) - 1), 1e-6)
    yield Measured(name, "cost above the official one", fit.cost - 1.01 * theirs, 0.5)
    stretch = fit.scale_y / fit.scale_x
    outside = max(0.7 - fit.scale_x, fit.scale_x - 1.4, 0.8 - stretch, stretch - 1.15)
    yield Measured(name, "beyond the bounds", outside, 1e-9)
    if 0.7 < float(arrays[f"{case}_m"]) < 1.4 and fit.cost > 0.99 * theirs:
        scales = fit.intrinsics[[0, 1], [0, 1]] / intrinsics[[0, 1], [0, 1]]
        yield Measured(name, "focal lengths", float(np.abs(scales - 1).max()), 0.01)
        yield Measured(name, "centre in px", float(np.abs(fit.intrinsics[:2, 2] - intrinsics[:2, 2]).max()), 2.0)


def check_moved_points(arrays: Arrays, path: Path) -> Iterator[Measured]:
    """2D points under the official camera, as fractions; those that were not seen have no place."""
    sequence = replace(load_pose(path), intrinsics=arrays["K_default"])
    before = Keypoints2D(
        arrays["dw_candidate"], arrays["dw_subset"], hands_by_person(arrays["dw_hands"]), arrays["dw_faces"]
    )
    ours = move_keypoints(before, sequence, CameraFit(arrays["K"], *arrays["align_scale_xy"], cost=0.0))
    hands = hands_by_person(arrays["dw_shifted_hands"])
    for name, theirs in (
        ("candidate", arrays["dw_shifted_candidate"]), ("hands", hands), ("faces", arrays["dw_shifted_faces"]),
    ):  # fmt: skip
        seen = (getattr(before, name) != -1).any(axis=-1)
        assert seen.any()
        yield Measured("moved", name, float(np.abs(getattr(ours, name) - theirs)[seen].max()), 1e-6)


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
