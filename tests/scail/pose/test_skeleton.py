"""The tables, the camera's numbers, and what a sequence refuses to hold."""

from __future__ import annotations

import numpy as np
import pytest

from scail.errors import InvalidInputError
from scail.pose.camera import default_intrinsics, project, scale_intrinsics
from scail.pose.skeleton import BONE_JOINTS, BONES, Keypoints2D, PoseSequence, hands_by_person, slots_from_joints
from tests.scail.pose.figures import person, unseen_keypoints


@pytest.mark.parametrize(("larger", "focal"), [(896, 860.60), (448, 430.30), (224, 215.15)])
def test_the_focal_length_is_that_of_55_degrees_over_the_larger_side(larger, focal):
    for height, width in ((larger, larger // 2), (larger // 2, larger)):
        matrix = default_intrinsics(height, width)

        assert matrix[0, 0] == matrix[1, 1] == pytest.approx(focal, abs=0.005)
        assert matrix[:2, 2].tolist() == [width / 2, height / 2]


def test_projection_follows_the_axes_of_the_picture():
    matrix = default_intrinsics(512, 896)

    points = project(np.array([(0, 0, 1000), (100, 200, 1000), (0, 0, 0), (0, 0, -5)]), matrix)

    assert points[0].tolist() == [448, 256]
    assert points[1] == pytest.approx((448 + 86.06, 256 + 172.12), abs=0.01)
    assert np.isnan(points[2:]).all()


def test_scaled_intrinsics_project_to_the_scaled_point():
    matrix = default_intrinsics(512, 896)
    point = np.array([300.0, -200.0, 2500.0])

    scaled = scale_intrinsics(matrix, from_size=(512, 896), to_size=(256, 1792))

    assert project(point, scaled) == pytest.approx(project(point, matrix) * (2, 0.5))


def test_right_slots_hold_the_right_side_of_the_body():
    slots = slots_from_joints(person())  # faces the camera: the right side is at negative x here

    assert (slots[[2, 3, 4, 8, 9, 10], 0] < 0).all()
    assert (slots[[5, 6, 7, 11, 12, 13], 0] > 0).all()
    assert not slots[14:].any()


def test_bones_join_the_joints_of_their_slots():
    slots = slots_from_joints(person())

    for bone, (start, end) in zip(BONES, BONE_JOINTS, strict=True):
        assert (slots[bone.start] == person()[start]).all()
        assert (slots[bone.end] == person()[end]).all()


def test_a_bone_needs_both_of_its_ends():
    joints = person()
    joints[12] = 0  # neck: shoulders, torso and head hang on it

    mask = PoseSequence(joints[None, None], 64, 112).bone_mask[0, 0]

    assert [bone.name for bone, known in zip(BONES, mask, strict=True) if not known] == [
        "right shoulder",
        "left shoulder",
        "right torso",
        "left torso",
        "neck",
    ]


@pytest.mark.parametrize("shape", [(3, 24, 3), (3, 1, 17, 3), (0, 1, 24, 3), (3, 0, 24, 3)])
def test_joints_of_another_shape_are_refused(shape):
    with pytest.raises(InvalidInputError, match="joints have shape"):
        PoseSequence(np.zeros(shape, np.float32), 64, 112)


def test_joints_that_are_not_finite_are_refused_with_their_frame():
    joints = np.stack([person()[None], person()[None]])
    joints[1, 0, 4, 2] = np.nan

    with pytest.raises(InvalidInputError, match="frame 1"):
        PoseSequence(joints, 64, 112)


def test_key_points_of_another_clip_are_refused():
    with pytest.raises(InvalidInputError, match=r"\(3, 1\)"):
        PoseSequence(person()[None, None], 64, 112, keypoints=unseen_keypoints(3, 1))


def test_rows_of_hands_are_not_taken_for_hands_by_person():
    unseen = unseen_keypoints(2, 2)

    with pytest.raises(InvalidInputError, match="hands has shape"):
        Keypoints2D(unseen.candidate, unseen.subset, np.zeros((2, 4, 21, 2)), unseen.faces)


def test_an_odd_number_of_hand_rows_is_refused():
    with pytest.raises(InvalidInputError, match="2P"):
        hands_by_person(np.zeros((2, 3, 21, 2)))
