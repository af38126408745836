"""Head, hands and face: whose they are, in which order they are painted, and how they are laid over the bones."""

from __future__ import annotations

import colorsys

import numpy as np

from scail.pose.overlay import draw_overlay, lay_over
from scail.pose.render import render_pose
from scail.pose.skeleton import LEFT, LEFT_EAR, LEFT_EYE, NOSE, RIGHT, Keypoints2D, PoseSequence, hands_by_person
from tests.scail.pose.figures import clip, single_bone, unseen_keypoints

HEIGHT, WIDTH = 64, 112


def canvas_of(keypoints: Keypoints2D, height: int = HEIGHT, width: int = WIDTH):
    canvas = np.zeros((len(keypoints.candidate), height, width, 3), np.uint8)
    painted = draw_overlay(keypoints, height=height, width=width)
    canvas.reshape(-1, 3)[painted.pixel] = painted.colour
    return canvas


def fan(x: float, y: float):
    """A hand (21, 2) in fractions: the wrist at a pixel, each finger a straight run of four points downwards."""
    points = np.array([(x, y)] + [(x + 2 * finger, y + 3 + 2 * joint) for finger in range(5) for joint in range(4)])
    return (points + 0.5) / (WIDTH, HEIGHT)


def see(keypoints: Keypoints2D, person: int, point: int, x: float, y: float) -> None:
    keypoints.candidate[0, person, point] = ((x + 0.5) / WIDTH, (y + 0.5) / HEIGHT)
    keypoints.subset[0, person, point] = point


def test_two_detections_keep_their_own_hands():
    left_0, left_1, right_0, right_1 = (fan(x, 20) for x in (5, 30, 55, 80))
    rows = np.stack([left_0, left_1, right_0, right_1])[None]  # DWPose: all left hands, then all right

    hands = hands_by_person(rows)

    assert (hands[0, 0, LEFT] == left_0).all()
    assert (hands[0, 0, RIGHT] == right_0).all()
    assert (hands[0, 1, LEFT] == left_1).all()
    assert (hands[0, 1, RIGHT] == right_1).all()


def test_a_single_person_of_two_detections_is_drawn_with_both_of_their_hands():
    rows = np.stack([fan(x, 20) for x in (5, 30, 55, 80)])[None]
    keypoints = unseen_keypoints(1, 1)
    keypoints.hands[:] = hands_by_person(rows)[:, :1]

    columns = np.flatnonzero(canvas_of(keypoints).any(axis=(0, 1, 3)))

    assert ((columns < 20) | ((columns > 50) & (columns < 75))).all()
    assert columns.min() < 20
    assert columns.max() > 50


def test_hand_lines_run_through_the_hues_and_dots_are_blue():
    keypoints = unseen_keypoints(1, 1)
    points = np.zeros((21, 2)) - 1
    points[:5] = (np.array([(10, 10), (20, 10), (30, 10), (40, 10), (50, 10)]) + 0.5) / (WIDTH, HEIGHT)
    keypoints.hands[0, 0, LEFT] = points

    row = canvas_of(keypoints)[0, 10]

    for edge, column in enumerate((15, 25, 35, 45)):
        expected = np.rint(255 * np.array(colorsys.hsv_to_rgb(edge / 20, 1, 1)))
        assert (row[column] == expected).all()
    assert (row[[9, 10, 11, 30, 51]] == (0, 0, 255)).all()


def test_a_point_counts_from_the_first_pixel_on():
    keypoints = unseen_keypoints(1, 1)
    keypoints.faces[0, 0, [40, 41, 42]] = np.array([(0.9, 30), (30, 0.9), (1, 1)]) / (WIDTH, HEIGHT)

    lit = np.argwhere(canvas_of(keypoints)[0].any(axis=-1))

    assert lit.tolist() == [[0, 1], [1, 0], [1, 1], [1, 2], [2, 1]]


def test_the_jaw_and_the_nose_are_not_drawn():
    keypoints = unseen_keypoints(1, 1)
    keypoints.faces[0, 0, [*range(17), *range(27, 36)]] = 0.5

    assert not canvas_of(keypoints).any()


def test_sticks_are_dimmed_and_dots_are_not():
    keypoints = unseen_keypoints(1, 1)
    see(keypoints, 0, LEFT_EYE, 30, 30)
    see(keypoints, 0, LEFT_EAR, 70, 30)

    canvas = canvas_of(keypoints)[0]

    assert canvas[30, 50].tolist() == [153, 0, 102]  # 0.6 of 255, 0, 170
    assert canvas[30, 30].tolist() == [255, 0, 255]
    assert canvas[30, 70].tolist() == [255, 0, 85]
    assert canvas[:, 50].any(axis=-1).sum() == 9  # four pixels to either side


def test_an_untrusted_point_is_neither_drawn_nor_connected():
    keypoints = unseen_keypoints(1, 1)
    see(keypoints, 0, NOSE, 30, 30)
    see(keypoints, 0, LEFT_EYE, 50, 30)
    keypoints.subset[0, 0, LEFT_EYE] = -1

    canvas = canvas_of(keypoints)[0]

    assert canvas[30, 30].tolist() == [255, 0, 0]
    assert not canvas[:, 36:].any()


def test_face_covers_hands_and_hands_cover_the_head():
    keypoints = unseen_keypoints(1, 1)
    see(keypoints, 0, NOSE, 30, 30)
    keypoints.hands[0, 0, LEFT, 0] = (30.5 / WIDTH, 30.5 / HEIGHT)
    keypoints.faces[0, 0, 40] = (32.5 / WIDTH, 30.5 / HEIGHT)

    row = canvas_of(keypoints)[0, 30]

    assert row[[28, 29, 30, 31, 33]].tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 255], [255] * 3, [255] * 3]


def test_a_red_dot_on_a_cyan_bone_is_white():
    frames = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    frames[:] = (0, 255, 255)
    keypoints = unseen_keypoints(1, 1)
    see(keypoints, 0, NOSE, 30, 30)

    lay_over(frames, draw_overlay(keypoints, height=HEIGHT, width=WIDTH))

    assert frames[0, 30, 30].tolist() == [255, 255, 255]
    assert frames[0, 30, 40].tolist() == [0, 255, 255]


def test_where_two_persons_overlap_bytes_wrap():
    keypoints = unseen_keypoints(1, 2)
    see(keypoints, 0, NOSE, 30, 30)
    see(keypoints, 1, LEFT_EAR, 32, 30)

    row = canvas_of(keypoints)[0, 30]

    assert row[26].tolist() == [255, 0, 0]
    assert row[31].tolist() == [254, 0, 85]  # 255 + 255 in a byte
    assert row[36].tolist() == [255, 0, 85]


def test_hands_and_face_lie_over_the_bones_and_cannot_be_told_from_their_depth():
    keypoints = unseen_keypoints(1, 1)
    keypoints.faces[0, 0, 40] = (56.5 / WIDTH, 32.5 / HEIGHT)

    frame = render_pose(clip(single_bone((-100, 0, 300), (100, 0, 300)), keypoints=keypoints))[0]

    assert frame[32, 56].tolist() == [255, 255, 255]
    assert frame[32, 50, 1] < 255


def test_larger_pictures_have_thicker_hands_and_equal_cheeks():
    keypoints = unseen_keypoints(1, 1)
    keypoints.subset[0, 0, NOSE] = NOSE
    keypoints.candidate[0, 0, NOSE] = 0.25
    keypoints.faces[0, 0, 40] = 0.75

    small, large = canvas_of(keypoints, 512, 896)[0], canvas_of(keypoints, 640, 896)[0]

    assert (small.sum(axis=-1) == 255).sum() == (large.sum(axis=-1) == 255).sum()
    assert (small.sum(axis=-1) == 765).sum() == 5
    assert (large.sum(axis=-1) == 765).sum() == 13


def test_points_outside_the_picture_are_cut_off():
    keypoints = unseen_keypoints(1, 1)
    see(keypoints, 0, NOSE, WIDTH + 1, HEIGHT + 1)
    see(keypoints, 0, LEFT_EYE, WIDTH + 40, -30)
    keypoints.hands[0, 0, LEFT] = fan(WIDTH - 3, HEIGHT - 4)

    lit = np.argwhere(canvas_of(keypoints)[0].any(axis=-1))

    assert len(lit)
    assert lit.min() > 30


def test_frames_do_not_share_their_overlay():
    keypoints = unseen_keypoints(5, 1)
    keypoints.faces[[1, 3], 0, 40] = 0.5
    sequence = PoseSequence(np.zeros((5, 1, 24, 3), np.float32), HEIGHT, WIDTH, keypoints=keypoints)

    frames = render_pose(sequence, frames_per_chunk=2)

    assert [bool(frame.any()) for frame in frames] == [False, True, False, True, False]
