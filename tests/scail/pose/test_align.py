"""The alignment: a known camera is found again, what moves with it, and what cannot be aligned."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

from scail.errors import InvalidInputError
from scail.pose.align import CameraFit, align_to_reference, face_scale, fit_camera, move_keypoints
from scail.pose.camera import default_intrinsics, project
from scail.pose.io import load_pose, render_to_mp4, save_pose
from scail.pose.render import render_pose
from scail.pose.skeleton import JOINT_OF_SLOT, LEFT, NOSE, RIGHT, PoseSequence
from scail.video import read_video
from tests.scail.pose.figures import clip, person, unseen_keypoints, walk

HEIGHT, WIDTH = 192, 320
SIZE = {"height": HEIGHT, "width": WIDTH}


def camera(*, scale=1.0, stretch=1.0, right=0.0, down=0.0):
    before = default_intrinsics(HEIGHT, WIDTH)
    return before * [[scale, 1, 1], [1, scale * stretch, 1], [1, 1, 1]] + [[0, 0, right], [0, 0, down], [0, 0, 0]]


def seen_by(joints, intrinsics, *, hidden=()):
    """A reference whose 2D points are the joints under a camera; no joints in space."""
    points = project(joints[list(JOINT_OF_SLOT)], intrinsics) / (WIDTH, HEIGHT)
    keypoints = unseen_keypoints(1, 1)
    keypoints.candidate[0, 0, : len(points)] = points
    keypoints.subset[0, 0, : len(points)] = np.arange(len(points))
    keypoints.subset[0, 0, list(hidden)] = -1
    return PoseSequence(np.zeros((1, 1, 24, 3), np.float32), HEIGHT, WIDTH, keypoints=keypoints)


def with_points(sequence):
    """The sequence with hands at the wrists, and a face at the head, in every frame."""
    keypoints = unseen_keypoints(sequence.num_frames, 1)
    rng = np.random.default_rng(0)

    def around(joint, num_points):
        centre = project(sequence.joints[:, 0, joint], sequence.camera_matrix) / (WIDTH, HEIGHT)
        return centre[:, None] + 0.02 * rng.standard_normal((1, num_points, 2))

    keypoints.faces[:, 0], keypoints.candidate[:, 0] = around(15, 68), around(15, 24)
    keypoints.hands[:, 0, LEFT], keypoints.hands[:, 0, RIGHT] = around(20, 21), around(21, 21)
    return replace(sequence, keypoints=keypoints)


@pytest.mark.parametrize("hidden", [(), (10,), (9, 10, 12, 13, 3)])  # legs, or arms where a leg is hidden
@pytest.mark.parametrize(
    "there",
    [
        {},
        {"scale": 1.3, "stretch": 0.9, "right": -40.0, "down": 25.0},
        {"scale": 0.75, "stretch": 1.1, "right": 11.0, "down": -60.0},
    ],
)
def test_the_camera_of_the_reference_is_found(there, hidden):
    sequence = walk(5, **SIZE)
    target = camera(**there)

    aligned = align_to_reference(sequence, seen_by(sequence.joints[0, 0], target, hidden=hidden))

    np.testing.assert_allclose(aligned.camera_matrix, target, rtol=1e-3, atol=0.05)
    assert (aligned.joints == sequence.joints).all()
    assert (aligned.height, aligned.width, aligned.fps) == (HEIGHT, WIDTH, sequence.fps)


def test_the_picture_shows_the_person_where_the_reference_has_them():
    sequence = clip(person(400, 100, 3200), **SIZE)
    reference = clip(person(-200, 0, 2600), **SIZE)

    aligned = align_to_reference(sequence, seen_by(reference.joints[0, 0], reference.camera_matrix))

    lit, wanted, before = (render_pose(one)[0].any(axis=-1) for one in (aligned, reference, sequence))
    overlap, overlap_before = ((one & wanted).sum() / (one | wanted).sum() for one in (lit, before))
    assert overlap > 0.8  # seen from another side, as they stood to the right
    assert overlap_before < 0.1


def test_scales_stay_within_their_bounds_and_the_shift_makes_the_best_of_it():
    joints = person(0, 0, 3000)
    sequence = clip(joints, **SIZE)

    aligned = align_to_reference(sequence, seen_by(joints, camera(scale=3.0, stretch=2.0, right=20.0)))

    before = sequence.camera_matrix
    assert aligned.camera_matrix[0, 0] / before[0, 0] == pytest.approx(1.4)
    assert aligned.camera_matrix[1, 1] / before[1, 1] == pytest.approx(1.4 * 1.15)
    assert aligned.camera_matrix[0, 2] - before[0, 2] == pytest.approx(20, abs=3)


def test_no_camera_within_the_bounds_comes_nearer():
    rng = np.random.default_rng(1)
    points = person(100, 50, 2800)[[12, 5, 8, 4, 7]].astype(np.float64)
    before = default_intrinsics(HEIGHT, WIDTH)
    targets = project(points, camera(scale=1.2, stretch=1.3)) + 6 * rng.standard_normal((5, 2))
    weights = np.array([1.0, 4, 4, 4, 4])

    fit = fit_camera(points, targets, weights, before, height=HEIGHT, width=WIDTH)

    scale = rng.uniform(0.7, 1.4, 4000)
    stretch = rng.uniform(0.8, 1.15, 4000)
    others = [scale, scale * stretch]
    others = np.stack([fit.scale_x + 0.02 * (others[0] - fit.scale_x), fit.scale_y + 0.02 * (others[1] - fit.scale_y)])
    allowed = (others[1] / others[0] <= 1.15) & (others[0] <= 1.4)
    for scale_x, scale_y in others.T[allowed][:500]:
        near = fit.intrinsics.copy()
        near[[0, 1], [0, 1]] = before[[0, 1], [0, 1]] * (scale_x, scale_y)
        near[:2, 2] += np.average(targets - project(points, near), weights=weights, axis=0)
        assert weights @ ((project(points, near) - targets) ** 2).sum(axis=1) >= fit.cost - 1e-3


def test_two_points_one_above_the_other_leave_the_width_as_it_was():
    points = np.array([[0.0, -500, 2500], [0, -100, 2500], [0, 300, 2500]])
    before = default_intrinsics(HEIGHT, WIDTH)

    fit = fit_camera(points, project(points, before) + 7, np.ones(3), before, height=HEIGHT, width=WIDTH)

    assert (fit.scale_x, fit.scale_y) == pytest.approx((1, 1), abs=1e-3)
    assert fit.intrinsics[:2, 2] == pytest.approx(before[:2, 2] + 7, abs=0.01)


def test_the_first_frame_that_shows_the_person_decides():
    shown = person(200, 0, 2500)
    absent = np.zeros_like(shown)
    headless = shown.copy()
    headless[12] = 0  # without the neck there is nothing to go by

    aligned = align_to_reference(clip(absent, headless, shown, **SIZE), seen_by(shown, camera(scale=1.2)))

    np.testing.assert_allclose(aligned.camera_matrix, camera(scale=1.2), rtol=1e-3, atol=0.05)


def test_of_several_persons_the_first_is_kept():
    one, other = person(-300), person(500)
    both = PoseSequence(np.stack([one, other])[None], HEIGHT, WIDTH, keypoints=unseen_keypoints(1, 2))

    aligned = align_to_reference(both, seen_by(one, camera()))

    assert aligned.num_persons == 1
    assert (aligned.joints[0, 0] == one).all()
    assert aligned.keypoints.candidate.shape[1] == 1


def test_points_move_with_the_head_and_the_wrists():
    sequence = with_points(walk(4, **SIZE))
    fit = CameraFit(camera(scale=1.2, stretch=0.9, right=10, down=-5), 1.2, 1.08, 0.0)

    moved = move_keypoints(sequence.keypoints, sequence, fit, face_scale=1.5)

    def shift(joint):
        points = sequence.joints[:, 0, joint]
        return (project(points, fit.intrinsics) - project(points, sequence.camera_matrix)) / (WIDTH, HEIGHT)

    for side, joint in ((LEFT, 20), (RIGHT, 21)):
        before, after = sequence.keypoints.hands[:, 0, side], moved.hands[:, 0, side]
        np.testing.assert_allclose(after[:, 0] - before[:, 0], shift(joint))
        np.testing.assert_allclose(after - after[:, :1], (before - before[:, :1]) * (1.2, 1.08))
    for name, about in (("faces", 30), ("candidate", NOSE)):
        before, after = (getattr(points, name)[:, 0] for points in (sequence.keypoints, moved))
        np.testing.assert_allclose(after[:, about] - before[:, about], shift(15))
        np.testing.assert_allclose(after - after[:, about, None], 1.5 * (before - before[:, about, None]))


def test_points_that_nobody_saw_stay_unseen():
    sequence = with_points(walk(3, **SIZE))
    keypoints = deepcopy(sequence.keypoints)
    keypoints.faces[0, 0, 30] = keypoints.faces[1, 0, 5] = keypoints.hands[2, 0, LEFT, 0] = -1
    fit = CameraFit(camera(scale=1.3, right=50), 1.3, 1.3, 0.0)

    moved = move_keypoints(keypoints, sequence, fit, face_scale=1.2)

    hidden = keypoints.faces == -1
    assert (moved.faces[hidden] == -1).all()
    assert (moved.hands[2, 0, LEFT, 0] == -1).all()
    whole = move_keypoints(sequence.keypoints, sequence, fit, face_scale=1.2)
    np.testing.assert_allclose(moved.faces[1][~hidden[1]], whole.faces[1][~hidden[1]])
    # Without the tip of the nose there is nothing to scale about: the face is moved alone.
    np.testing.assert_allclose(np.diff(moved.faces[0, 0, :30], axis=0), np.diff(keypoints.faces[0, 0, :30], axis=0))


def test_points_of_a_joint_that_is_missing_stay_where_they_are():
    sequence = with_points(walk(2, **SIZE))
    sequence.joints[1, 0, 20] = 0

    moved = move_keypoints(sequence.keypoints, sequence, CameraFit(camera(right=50), 1.0, 1.0, 0.0))

    assert (moved.hands[1, 0, LEFT] == sequence.keypoints.hands[1, 0, LEFT]).all()
    assert (moved.hands[0, 0, LEFT, :, 0] > sequence.keypoints.hands[0, 0, LEFT, :, 0]).all()


def test_the_face_grows_as_the_reference_has_it_within_bounds():
    face = np.random.default_rng(0).uniform(0.4, 0.6, (68, 2))
    hidden = face.copy()
    hidden[:20] = -1
    nothing = np.full((68, 2), -1.0)

    assert face_scale(face, 0.1 + 1.25 * face) == pytest.approx(1.25)
    assert face_scale(face, 3 * face) == 1.5
    assert face_scale(face, 0.1 * face) == 0.8
    assert face_scale(hidden, 1.25 * face) == pytest.approx(1.25)
    assert face_scale(face, nothing) == face_scale(nothing, face) == 1.0


def test_nothing_that_was_given_is_changed():
    sequence = with_points(walk(3, **SIZE))
    reference = seen_by(sequence.joints[0, 0], camera(scale=1.2))
    before = deepcopy((sequence, reference))

    align_to_reference(sequence, reference)

    for now, then in zip((sequence, reference), before, strict=True):
        assert (now.joints == then.joints).all()
        assert all((value == vars(then.keypoints)[name]).all() for name, value in vars(now.keypoints).items())


def test_what_cannot_be_aligned_is_refused_with_the_reason():
    sequence = walk(2, **SIZE)
    reference = seen_by(sequence.joints[0, 0], camera())
    arms_only = seen_by(sequence.joints[0, 0], camera(), hidden=(0, 2, 3, 5, 9, 10, 12, 13))
    nobody = replace(reference, keypoints=unseen_keypoints(1, 1))

    for other in (sequence, nobody):
        with pytest.raises(InvalidInputError, match="the reference has no 2D points of a person"):
            align_to_reference(sequence, other)
    with pytest.raises(InvalidInputError, match="the reference is 192x192 and the motion 192x320"):
        align_to_reference(sequence, replace(reference, width=192))
    with pytest.raises(InvalidInputError, match="share too little to be aligned"):
        align_to_reference(sequence, arms_only)
    with pytest.raises(InvalidInputError, match="share too little to be aligned"):
        align_to_reference(clip(np.zeros((24, 3), np.float32), **SIZE), reference)


@pytest.mark.parametrize("official", [False, True])
def test_a_reference_file_needs_no_joints(tmp_path, official):
    sequence = walk(2, **SIZE)
    reference = seen_by(sequence.joints[0, 0], camera(scale=1.25, right=15))
    points = vars(reference.keypoints)
    if official:
        arrays = {f"dw_{name}": value for name, value in points.items()} | {"size_hw": [HEIGHT, WIDTH]}
        arrays["dw_hands"] = points["hands"][:, 0]
    else:
        arrays = dict(points, height=HEIGHT, width=WIDTH)
    np.savez(tmp_path / "reference.npz", **arrays)
    save_pose(sequence, tmp_path / "walk.npz")

    render_to_mp4(tmp_path / "walk.npz", tmp_path / "walk.mp4", align_to=tmp_path / "reference.npz")

    aligned = align_to_reference(sequence, load_pose(tmp_path / "reference.npz"))
    drawn = read_video(tmp_path / "walk.mp4")
    assert np.abs(drawn.astype(int) - render_pose(aligned)).mean() < 2
    assert np.abs(drawn.astype(int) - render_pose(sequence)).mean() > 5
