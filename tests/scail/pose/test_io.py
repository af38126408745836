"""Pose files: the round trip, the official arrays, what is refused, and the rendered mp4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scail.errors import InvalidInputError
from scail.pose.io import load_pose, render_to_mp4, save_pose
from scail.pose.render import render_pose
from scail.probe import probe_video
from scail.video import read_video
from tests.scail.pose.figures import unseen_keypoints, walk

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("keypoints", [None, unseen_keypoints(9, 1)])
def test_a_saved_sequence_is_read_back_exactly(tmp_path, keypoints):
    sequence = walk(9, fps=24.0, keypoints=keypoints)

    save_pose(sequence, tmp_path / "walk.npz")
    loaded = load_pose(tmp_path / "walk.npz")

    assert (loaded.joints == sequence.joints).all()
    assert (loaded.camera_matrix == sequence.camera_matrix).all()
    assert (loaded.height, loaded.width, loaded.fps) == (64, 112, 24.0)
    assert (loaded.keypoints is None) == (keypoints is None)
    if keypoints is not None:
        assert all((value == vars(loaded.keypoints)[name]).all() for name, value in vars(keypoints).items())


def test_official_arrays_are_read_with_moved_points_and_hands_by_person():
    path = GOLDEN / "p04_aligned_portrait_448x256_2d.npz"
    arrays = np.load(path)

    sequence = load_pose(path)

    assert (sequence.height, sequence.width, sequence.fps) == (448, 256, 16.0)
    assert (sequence.camera_matrix == arrays["K"]).all()
    assert (sequence.keypoints.faces == arrays["dw_shifted_faces"]).all()
    assert (sequence.keypoints.hands[:, 0, 1] == arrays["dw_shifted_hands"][:, 1]).all()


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "half.npz", joints=walk(2).joints, height=64)

    with pytest.raises(InvalidInputError, match=r"half\.npz has no 'width'; it has height, joints"):
        load_pose(tmp_path / "half.npz")


def test_key_points_come_whole_or_not_at_all(tmp_path):
    save_pose(walk(2, keypoints=unseen_keypoints(2, 1)), tmp_path / "walk.npz")
    arrays = dict(np.load(tmp_path / "walk.npz"))
    del arrays["faces"]
    np.savez(tmp_path / "walk.npz", **arrays)

    with pytest.raises(InvalidInputError, match="'faces'"):
        load_pose(tmp_path / "walk.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", np.float32(1).tobytes() * 100])
def test_what_is_not_an_npz_is_refused(tmp_path, content):
    (tmp_path / "odd.npz").write_bytes(content)

    with pytest.raises(InvalidInputError, match=r"odd\.npz cannot be read"):
        load_pose(tmp_path / "odd.npz")


def test_a_pose_file_becomes_a_video_of_its_rate_and_length(tmp_path):
    sequence = walk(9)
    save_pose(sequence, tmp_path / "walk.npz")

    num_frames = render_to_mp4(tmp_path / "walk.npz", tmp_path / "walk.mp4", frames_per_chunk=4)

    assert num_frames == 9
    assert probe_video(tmp_path / "walk.mp4").fps == 16.0
    decoded = read_video(tmp_path / "walk.mp4")
    assert np.abs(decoded.astype(int) - render_pose(sequence)).mean() < 3  # 4:2:0 blurs the colour of thin bones
