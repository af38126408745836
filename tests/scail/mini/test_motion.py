from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from scail.errors import InvalidInputError
from scail.mini.motion import (
    L_FOOT,
    L_HIP,
    L_KNEE,
    MOTIONS,
    NECK,
    OFFSETS,
    PARENTS,
    R_FOOT,
    R_HIP,
    R_KNEE,
    joints_of_motion,
)
from scail.pose.skeleton import NUM_JOINTS

HEAD, L_ANKLE, R_ANKLE, R_HAND = 15, 7, 8, 23
X, Y, Z = 0, 1, 2

every_motion = pytest.mark.parametrize("name", MOTIONS)


def bone_lengths(joints: np.ndarray) -> np.ndarray:
    """(T, 23): every joint but the pelvis, from its parent."""
    return np.linalg.norm(joints[:, 1:] - joints[:, PARENTS[1:]], axis=-1)


def body_axis(joints: np.ndarray) -> np.ndarray:
    """(T, 3) unit vectors to the person's left."""
    left = (joints[:, L_HIP] - joints[:, R_HIP]).astype(np.float64)
    return left / np.linalg.norm(left, axis=-1, keepdims=True)


@every_motion
def test_a_clip_has_every_joint_in_every_frame(name):
    joints = joints_of_motion(name, 17)

    assert joints.shape == (17, NUM_JOINTS, 3)
    assert joints.dtype == np.float32
    assert np.isfinite(joints).all()


@every_motion
def test_bones_keep_their_lengths(name):
    lengths = bone_lengths(joints_of_motion(name, 33, cycles=2, yaw=0.5))

    np.testing.assert_allclose(lengths, np.broadcast_to(np.linalg.norm(OFFSETS[1:], axis=-1), lengths.shape), atol=0.01)


def test_proportions_scale_their_own_bones_and_no_others():
    proportions = np.ones(NUM_JOINTS)
    proportions[L_ANKLE] = 1.3

    ratio = bone_lengths(joints_of_motion("walk", 5, proportions=proportions)) / bone_lengths(
        joints_of_motion("walk", 5)
    )

    np.testing.assert_allclose(ratio, np.broadcast_to(proportions[1:], ratio.shape), atol=1e-4)


@every_motion
def test_a_motion_is_a_cycle(name):
    joints = joints_of_motion(name, 12)

    np.testing.assert_allclose(joints_of_motion(name, 12, phase=1.0), joints, atol=0.01)
    np.testing.assert_allclose(joints_of_motion(name, 12, phase=0.25), np.roll(joints, -3, axis=0), atol=0.01)


@every_motion
def test_two_cycles_are_one_cycle_twice(name):
    twice = joints_of_motion(name, 24, cycles=2)

    np.testing.assert_allclose(twice[:12], twice[12:], atol=0.01)
    np.testing.assert_allclose(twice[:12], joints_of_motion(name, 12), atol=0.01)


@every_motion
def test_a_motion_moves_smoothly(name):
    joints = joints_of_motion(name, 81)

    steps = np.linalg.norm(np.diff(joints, axis=0), axis=-1)
    assert steps.max() < 200  # millimetres a frame
    assert steps.max(axis=0).max() > 5


@pytest.mark.parametrize(("name", "other"), list(combinations(MOTIONS, 2)))
def test_no_two_motions_are_alike(name, other):
    difference = joints_of_motion(name, 16) - joints_of_motion(other, 16)

    assert np.abs(difference).max() > 100


@every_motion
def test_knees_bend_backwards_only(name):
    joints = joints_of_motion(name, 48).astype(np.float64)
    left = body_axis(joints)

    for hip, knee, ankle in ((L_HIP, L_KNEE, L_ANKLE), (R_HIP, R_KNEE, R_ANKLE)):
        thigh, shin = joints[:, knee] - joints[:, hip], joints[:, ankle] - joints[:, knee]
        bend = np.arctan2(np.sum(np.cross(thigh, shin) * left, axis=-1), np.sum(thigh * shin, axis=-1))
        assert bend.min() > -0.15  # a straight leg's shin leans a little forwards: its offset says so
        assert bend.max() < 2.7


def test_a_standing_body_is_about_a_metre_and_seventy_tall_and_faces_the_camera():
    joints = joints_of_motion("wave", 1, phase=0.0)[0]

    assert 1450 < max(joints[L_FOOT, Y], joints[R_FOOT, Y]) - joints[HEAD, Y] < 1700  # the head's joint is not its top
    assert joints[L_HIP, X] > joints[R_HIP, X]  # the person's left is the picture's right
    assert joints[L_FOOT, Z] < joints[L_ANKLE, Z]  # toes point to the camera


@every_motion
def test_a_body_stands_where_it_is_put(name):
    there = joints_of_motion(name, 5, centre=(100.0, -200.0, 4000.0))

    moved = there - joints_of_motion(name, 5, centre=(0.0, 0.0, 3000.0))

    np.testing.assert_allclose(moved, np.broadcast_to((100.0, -200.0, 1000.0), moved.shape), atol=0.01)


@every_motion
def test_yaw_turns_the_body_about_its_vertical(name):
    centre = np.array([0.0, 0.0, 3000.0])
    joints = joints_of_motion(name, 5, centre=tuple(centre)) - centre

    turned = joints_of_motion(name, 5, centre=tuple(centre), yaw=np.pi) - centre

    np.testing.assert_allclose(turned, joints * (-1, 1, -1), atol=0.01)


def test_waving_raises_the_right_hand_above_the_head():
    joints = joints_of_motion("wave", 24)

    assert (joints[:, R_HAND, Y] < joints[:, HEAD, Y]).all()


def test_a_squat_lowers_the_head_and_leaves_the_feet_on_the_ground():
    joints = joints_of_motion("squat", 24)

    assert np.ptp(joints[:, HEAD, Y]) > 300
    assert np.ptp(joints[:, [L_ANKLE, R_ANKLE], Y]) < 60


def test_a_kick_raises_the_right_foot_to_the_front_and_leaves_the_left_one():
    joints = joints_of_motion("kick", 24)

    assert np.ptp(joints[:, R_FOOT, Y]) > 500
    assert np.ptp(joints[:, L_FOOT, Y]) < 150
    highest = joints[joints[:, R_FOOT, Y].argmin()]
    assert highest[R_FOOT, Z] < highest[NECK, Z] - 300


def test_walking_swings_the_legs_in_turn():
    joints = joints_of_motion("walk", 24)

    ahead = joints[:, R_FOOT, Z] - joints[:, L_FOOT, Z]
    assert ahead.max() > 300
    np.testing.assert_allclose(ahead, -np.roll(ahead, 12), atol=1)  # half a cycle later the other one


def test_turning_faces_every_side_once():
    left = body_axis(joints_of_motion("turn", 48))

    heading = np.unwrap(np.arctan2(left[:, Z], left[:, X]))
    assert abs(heading[-1] - heading[0]) == pytest.approx(2 * np.pi * 47 / 48, abs=0.05)


def test_an_unknown_motion_is_refused_with_those_that_there_are():
    with pytest.raises(InvalidInputError, match="motion is 'fly'; expected one of walk, wave, squat"):
        joints_of_motion("fly", 5)
