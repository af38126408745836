"""Pose files: a `PoseSequence` as npz, and its rendered video as mp4.

An npz of ours has the keys `joints`, `height`, `width`, `fps`, `intrinsics` and, where 2D key points are known,
`candidate`, `subset`, `hands`, `faces`, in the shapes of `PoseSequence` and `Keypoints2D`. Files that hold the official
code's own arrays are read too: `joints24`, `size_hw`, `K` and `dw_candidate`, `dw_subset`, `dw_hands` (DWPose's rows),
`dw_faces`; where the alignment has moved points, `dw_shifted_candidate`, `dw_shifted_hands` and `dw_shifted_faces`.
Of a reference image, which has 2D points alone, joints and camera may be left out.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scail.errors import InvalidInputError
from scail.pose.align import align_to_reference
from scail.pose.render import Palette, View, render_chunks
from scail.pose.skeleton import NUM_JOINTS, POSE_FPS, Keypoints2D, PoseSequence, hands_by_person
from scail.video import VideoWriter

Arrays = Mapping[str, NDArray[Any]]


def load_pose(path: Path | str) -> PoseSequence:
    """Read a pose file of ours or of the official arrays.

    Raises:
        InvalidInputError: If the file is not an npz, a key is missing, or the arrays do not fit together.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: Arrays = {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise InvalidInputError(f"{path.name} cannot be read as a pose file (.npz): {error}") from error
    try:
        return _from_official(arrays) if {"joints24", "dw_candidate"} & arrays.keys() else _from_ours(arrays)
    except KeyError as error:
        raise InvalidInputError(f"{path.name} has no {error}; it has {', '.join(sorted(arrays))}.") from error


def save_pose(sequence: PoseSequence, path: Path | str) -> None:
    """Write a pose file that `load_pose` reads back exactly."""
    arrays: dict[str, Any] = {
        "joints": sequence.joints,
        "height": sequence.height,
        "width": sequence.width,
        "fps": sequence.fps,
        "intrinsics": sequence.camera_matrix,
    }
    if sequence.keypoints is not None:
        arrays |= vars(sequence.keypoints)
    with Path(path).open("wb") as file:
        np.savez_compressed(file, **arrays)


def render_to_mp4(
    pose_path: Path | str,
    mp4_path: Path | str,
    *,
    size: tuple[int, int] | None = None,
    palette: Palette = "single",
    align_to: Path | str | None = None,
    device: str | torch.device = "cpu",
    frames_per_chunk: int = 8,
) -> int:
    """Render a pose file into the video that SCAIL is conditioned on, a chunk at a time.

    Args:
        pose_path: The npz.
        mp4_path: The mp4 to write, at the sequence's rate.
        size: Height and width, both even; left out, those of the sequence.
        palette: As for `render_pose`.
        align_to: The pose file of a reference image, to which the first person is aligned; the others are left out.
        device: As for `render_pose`.
        frames_per_chunk: As for `render_pose`.

    Returns:
        The number of frames.

    Raises:
        InvalidInputError: If a pose file cannot be read, the size cannot be written, or the two cannot be aligned.
        EncodeError: If ffmpeg fails.
    """
    sequence = load_pose(pose_path)
    metadata = {"pose": Path(pose_path).name, "palette": palette}
    if align_to is not None:
        sequence = align_to_reference(sequence, load_pose(align_to))
        metadata["aligned_to"] = Path(align_to).name
    view = View.of(sequence, size)
    chunks = render_chunks(sequence, size=size, palette=palette, device=device, frames_per_chunk=frames_per_chunk)
    with VideoWriter(mp4_path, width=view.width, height=view.height, fps=sequence.fps, metadata=metadata) as writer:
        for frames in chunks:
            writer.write(frames)
    return sequence.num_frames


def _from_ours(arrays: Arrays) -> PoseSequence:
    return PoseSequence(
        joints=_joints(arrays, "joints", "candidate"),
        height=int(arrays["height"]),
        width=int(arrays["width"]),
        fps=float(arrays.get("fps", POSE_FPS)),
        intrinsics=_intrinsics(arrays, "intrinsics"),
        keypoints=Keypoints2D(*(arrays[key].astype(np.float64) for key in ("candidate", "subset", "hands", "faces")))
        if "candidate" in arrays
        else None,
    )


def _from_official(arrays: Arrays) -> PoseSequence:
    height, width = (int(side) for side in arrays["size_hw"])
    return PoseSequence(
        joints=_joints(arrays, "joints24", "dw_candidate"),
        height=height,
        width=width,
        fps=POSE_FPS,
        intrinsics=_intrinsics(arrays, "K"),
        keypoints=_official_keypoints(arrays) if "dw_candidate" in arrays else None,
    )


def _joints(arrays: Arrays, name: str, points: str) -> NDArray[np.float32]:
    """As named; all missing where there are 2D points alone."""
    if name not in arrays and points in arrays:
        return np.zeros((*arrays[points].shape[:2], NUM_JOINTS, 3), np.float32)
    return arrays[name].astype(np.float32)


def _intrinsics(arrays: Arrays, name: str) -> NDArray[np.float64] | None:
    return arrays[name].astype(np.float64) if name in arrays else None


def _official_keypoints(arrays: Arrays) -> Keypoints2D:
    candidate, hands, faces = (
        arrays.get(f"dw_shifted_{name}", arrays[f"dw_{name}"]).astype(np.float64)
        for name in ("candidate", "hands", "faces")
    )
    return Keypoints2D(candidate, arrays["dw_subset"].astype(np.float64), hands_by_person(hands), faces)
