"""The capsule caster: geometry against a plain marcher, shading by hand, and what must not change a pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scail.errors import InvalidInputError
from scail.pose.camera import default_intrinsics
from scail.pose.render import clip_z_range, render_bones, render_chunks, render_pose
from scail.pose.skeleton import BONE_JOINTS, BONES, PoseSequence
from tests.scail.pose.figures import clip, march, person, single_bone, unseen_keypoints, walk


@pytest.fixture
def two_persons() -> PoseSequence:
    frames = [np.stack([person(-300 + 60 * i, 0, 2400), person(250 - 60 * i, 0, 2700, turn=0.4 * i)]) for i in range(5)]
    return PoseSequence(np.stack(frames), 64, 112, keypoints=unseen_keypoints(5, 2))


def silhouette(joints, height=64, width=112):
    return render_bones(PoseSequence(joints[None], height, width))[0, ..., 3] > 0


@pytest.mark.parametrize("seed", range(6))
def test_silhouettes_are_those_of_a_march(seed):
    rng = np.random.default_rng(seed)
    joints = np.stack([person(-200, 0, 1800, turn=seed), person(200, 100, 2500)])
    joints += rng.normal(size=joints.shape).astype(np.float32) * 80

    assert (silhouette(joints) != march(joints, 64, 112)).sum() <= 1  # a ray that grazes two bones


@pytest.mark.parametrize("z", [60.0, 120.0, 300.0, 700.0])
def test_close_ups_lose_no_pixel(z):
    joints = person(30, 60, z)[None]  # arms and legs reach behind the camera
    joints[0, 20] = (200, 10, -80)
    joints[0, 7] = (100, 300, -40)

    ours, marched = silhouette(joints), march(joints, 64, 112)

    assert marched.mean() > 0.05
    assert (ours != marched).sum() <= 1


def test_a_bone_that_passes_the_camera_is_drawn_as_far_as_it_is_in_front():
    joints = single_bone((300, 0, -500), (100, 20, 1000))[None]

    lit = silhouette(joints)

    assert lit[:, -1].any()
    assert (lit != march(joints, 64, 112)).sum() <= 1


@pytest.mark.parametrize("column", [56, 75, 100])
@pytest.mark.parametrize(("clearance", "is_seen"), [(-0.05, True), (0.002, False), (0.02, True)])
def test_a_ray_that_grazes_a_bone_is_lost_to_what_is_behind(column, clearance, is_seen):
    direction = np.array([(column - 56) / default_intrinsics(64, 112)[0, 0], 0, 1])
    direction /= np.linalg.norm(direction)
    beside = 2000 * direction + (21.5 + clearance) * np.array([direction[2], 0, -direction[0]])
    grazed = single_bone((beside[0], -100, beside[2]), (beside[0], 100, beside[2])).astype(np.float64)
    behind = single_bone((-2000, 0.5, 2600), (4000, 0.5, 2600))
    exact = np.stack([grazed, behind])
    joints = exact.astype(np.float32)
    exact_clearance = clearance + float((joints - exact)[0, 4] @ (direction[2], 0, -direction[0]))

    assert abs(exact_clearance - clearance) < 2e-4  # what float32 coordinates leave of it
    assert silhouette(joints)[32, column] == is_seen
    assert march(joints, 64, 112)[32, column] == is_seen


@pytest.mark.parametrize("z", [9000.0, 15000.0])
def test_far_bodies_are_thinner_than_a_pixel_and_still_there(z):
    height, width = 256, 448
    joints = person(0, 0, z)[None]

    ours = silhouette(joints, height, width)

    assert ours.sum() > 0
    if z < 10_000:
        assert (ours != march(joints, height, width)).sum() == 0


def test_a_bone_that_points_at_the_camera_is_a_disc():
    away, here = single_bone((0, 0, 500), (0, 0, 3000)), single_bone((0, 0, 3000), (0, 0, 500))

    lit = silhouette(away[None])

    assert (lit != march(away[None], 64, 112)).sum() == 0
    frames = render_pose(clip(away, here))
    assert (frames[0] == frames[1]).all()
    assert frames[0, 32, 56].tolist() == [255, 165, 255]  # this ray is parallel to the bone and meets its near end


def test_a_bone_without_length_is_a_sphere():
    joints = single_bone((10, 20, 800), (10, 20, 800))[None]

    assert (silhouette(joints) != march(joints, 64, 112)).sum() == 0


def test_what_is_behind_the_camera_is_not_drawn():
    assert not silhouette(person(0, 0, -2000)[None]).any()


def test_pixel_centres_are_at_integer_coordinates():
    lit = silhouette(single_bone((0, -30, 1000), (0, 30, 1000))[None])  # centred on W/2, H/2

    columns, rows = np.flatnonzero(lit.any(axis=0)), np.flatnonzero(lit.any(axis=1))
    assert columns[0] + columns[-1] == 112
    assert rows[0] + rows[-1] == 64


@pytest.mark.parametrize("bone", range(13))
def test_every_bone_has_its_colour_of_the_table(bone):
    joints = np.zeros((24, 3), np.float32)
    joints[BONE_JOINTS[bone, 0]], joints[BONE_JOINTS[bone, 1]] = (-200, 0, 2000), (200, 0, 2000)
    sequence = PoseSequence(np.stack([[joints, 0 * joints, 0 * joints], [0 * joints, joints, joints]]), 64, 112)
    fade = 1 - (2000 - 21.5 - 2000) / (8000 - 0.1)  # the surface is nearer than the nearest bone end

    single = render_pose(sequence)[0, 32, 56]
    multi = render_pose(sequence, palette="multi")[:, 32, 56]

    def shaded(colour):  # seen head-on: diffuse 1, highlight 0.5
        return np.minimum((np.array(colour) / 300 + 0.15 + 0.5) * min(fade, 1), 1) * 255

    assert np.abs(single - shaded(BONES[bone].single)).max() <= 1
    assert np.abs(multi[0] - shaded(BONES[bone].first)).max() <= 1
    assert np.abs(multi[1] - shaded(BONES[bone].second)).max() <= 1


def test_a_third_person_has_the_colours_of_the_second():
    joints, nobody = person(), np.zeros((24, 3), np.float32)
    frames = np.stack([[joints, nobody, nobody], [nobody, joints, nobody], [nobody, nobody, joints]])

    first, second, third = render_pose(PoseSequence(frames, 64, 112), palette="multi")

    assert (second == third).all()
    assert (first != second).any()


def test_brightness_falls_with_depth():
    frames = render_pose(
        clip(single_bone((-200, 0, 1500), (200, 0, 1500)), single_bone((-200, 0, 6500), (200, 0, 6500)))
    )

    expected = 1 - (6500 - 21.5 - 1500) / (12500 - 0.1)  # near 1500, far 6500 + 6000
    brightest = (170 / 300 + 0.15 + 0.5) * expected * 255
    assert abs(float(frames[1, 32, 56, 0]) - brightest) <= 1
    assert frames[0, 32, 56, 0] == 255


def test_bones_lit_from_the_side_are_darker():
    lit = render_pose(clip(single_bone((-300, 0, 600), (300, 0, 600)), height=128, width=224))[0, :, 112, 2]

    rows = np.flatnonzero(lit)
    assert lit[rows[0]] < 0.7 * lit[64]
    assert lit[rows[-1]] < 0.7 * lit[64]


def test_every_pixel_of_a_sphere_is_shaded_by_the_official_formula():
    centre = np.array([40.0, -20.0, 400.0])
    frame = render_pose(clip(single_bone(centre, centre), height=128, width=224))[0].astype(float)

    matrix = default_intrinsics(128, 224)
    rows, columns = np.nonzero(frame.any(axis=-1))
    ray = np.stack([(columns - 112) / matrix[0, 0], (rows - 64) / matrix[1, 1], np.ones(len(rows))], axis=1)
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    towards = ray @ centre
    point = ray * (towards - np.sqrt(21.5**2 - centre @ centre + towards**2))[:, None]
    normal = (point - centre) / 21.5
    half = -ray - (0, 0, 1)
    highlight = np.einsum("ij,ij->i", normal, half / np.linalg.norm(half, axis=1, keepdims=True)).clip(0) ** 32
    diffuse = 0.3 + 0.7 * (-normal[:, 2]).clip(0)
    fade = (1 - (point[:, 2] - 400) / (6400 - 0.1)).clip(0, 1)
    albedo = np.array((170, 0, 255)) / 300 + 0.15
    expected = ((albedo * diffuse[:, None] + 0.5 * highlight[:, None]) * fade[:, None]).clip(0, 1) * 255

    error = np.abs(frame[rows, columns] - expected)
    assert len(rows) > 200
    assert error.mean() < 1.5
    assert error.max() < 6  # at the rim, where the float32 step of the official normal shows


def test_a_joint_behind_the_camera_does_not_brighten_what_is_in_front():
    both = np.stack([single_bone((-200, 0, 2000), (200, 0, 2000)), single_bone((0, 900, -950), (0, 900, -850))])

    frame = render_pose(PoseSequence(both[None], 64, 112))[0, 32, 56, 0]

    fade = 1 - (2000 - 21.5 - 0.1) / (8000 - 0.1)
    assert abs(float(frame) - (170 / 300 + 0.15 + 0.5) * fade * 255) <= 1


def test_the_nearer_person_covers_the_farther():
    near, far = person(0, 0, 2000), person(0, 0, 3000)
    sequence = PoseSequence(np.stack([[far, near], [near, far]]), 64, 112)

    torso = render_pose(sequence, palette="multi")[:, 28:36, 50:62]

    alone = PoseSequence(np.stack([[0 * far, near], [near, 0 * far]]), 64, 112)
    covered = render_pose(alone, palette="multi", z_range=clip_z_range(sequence))[:, 28:36, 50:62]
    lit = covered.any(axis=-1)
    assert lit.any()
    assert (torso[lit] == covered[lit]).all()


def test_alpha_is_constant_and_not_multiplied_in():
    rgba = render_bones(walk())

    assert set(np.unique(rgba[..., 3])) == {0, 204}
    assert rgba[..., :3].max() > 204
    assert (rgba[..., :3].any(axis=-1) == (rgba[..., 3] > 0)).all()


@pytest.mark.parametrize("frames_per_chunk", [1, 2, 3, 100])
def test_chunks_leave_no_seam(two_persons, frames_per_chunk):
    whole = render_pose(two_persons, palette="multi", frames_per_chunk=5)

    assert (render_pose(two_persons, palette="multi", frames_per_chunk=frames_per_chunk) == whole).all()


def test_streamed_chunks_are_the_whole_clip():
    chunks = list(render_chunks(walk(9), frames_per_chunk=4))

    assert [len(chunk) for chunk in chunks] == [4, 4, 1]
    assert (np.concatenate(chunks) == render_pose(walk(9))).all()


def test_pieces_of_a_clip_match_only_with_the_depth_range_of_the_whole():
    sequence = walk(9)
    whole = render_pose(sequence)
    pieces = [replace(sequence, joints=sequence.joints[part]) for part in (slice(0, 4), slice(4, 9))]

    together = np.concatenate([render_pose(piece, z_range=clip_z_range(sequence)) for piece in pieces])
    apart = np.concatenate([render_pose(piece) for piece in pieces])

    assert (together == whole).all()
    assert np.abs(apart.astype(int) - whole).max() > 10


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_change_no_pixel(num_threads):
    sequence = walk(3, height=256, width=448)
    expected = render_pose(sequence)
    before = torch.get_num_threads()

    torch.set_num_threads(num_threads)
    try:
        rendered = render_pose(sequence)
    finally:
        torch.set_num_threads(before)

    assert (rendered == expected).all()


def test_a_clip_without_a_body_is_black():
    frames = render_pose(PoseSequence(np.zeros((3, 2, 24, 3), np.float32), 64, 112, keypoints=unseen_keypoints(3, 2)))

    assert frames.shape == (3, 64, 112, 3)
    assert not frames.any()


def test_someone_who_appears_later_is_lit_by_the_range_of_the_whole_clip():
    nobody = np.zeros((24, 3), np.float32)
    near = person(0, 0, 2000)
    late = render_pose(clip(nobody, nobody, near, person(0, 0, 5000)))
    alone = render_pose(clip(near, person(0, 0, 5000)))

    assert not late[:2].any()
    assert (late[2:] == alone).all()


def test_a_missing_joint_takes_away_its_bones_and_no_other():
    complete = person()
    missing = complete.copy()
    missing[19] = 0  # right elbow
    sequence = clip(complete, missing)
    z_range = clip_z_range(sequence)
    without = [bone for bone, joints in enumerate(BONE_JOINTS) if 19 in joints]

    both = render_bones(sequence)

    assert sequence.bone_mask[1, 0].sum() == 11
    assert without == [1, 2]
    left = slice(56, None)
    assert (both[1, :, left] == both[0, :, left]).all()
    assert both[1, ..., 3].sum() < both[0, ..., 3].sum()
    assert z_range == clip_z_range(clip(complete))


def test_a_joint_whose_coordinates_sum_to_zero_counts_as_missing():
    assert not silhouette(single_bone((-1000, 0, 1000), (0, 0, 1000))[None]).any()
    assert silhouette(single_bone((-1000, 1, 1000), (0, 0, 1000))[None]).any()


@pytest.mark.parametrize(("z_max", "is_seen"), [(9900.0, False), (15000.0, True)])
def test_the_limit_of_a_ray_is_one_of_its_length(z_max, is_seen):
    joints = np.stack([single_bone((4800, 0, 9800), (4900, 0, 9800)), single_bone((0, 0, z_max), (0, 10, z_max))])
    sequence = PoseSequence(joints[None], 256, 448)  # the first bone is 10.9 m away and 9.8 m deep

    rightmost = render_bones(sequence)[0, :, 400:, 3]

    assert rightmost.any() == is_seen


def test_another_size_shows_the_same_view():
    sequence = walk(3, height=128, width=224)

    small, large = render_pose(sequence, size=(64, 112)), render_pose(sequence)

    assert small.shape == (3, 64, 112, 3)
    common = small.any(axis=-1) & large[:, ::2, ::2].any(axis=-1)
    either = small.any(axis=-1) | large[:, ::2, ::2].any(axis=-1)
    assert common.sum() == either.sum()


def test_intrinsics_move_the_picture():
    moved = default_intrinsics(64, 112) + np.array([[0, 0, 7.0], [0, 0, -3.0], [0, 0, 0]])
    plain, shifted = render_pose(clip(person())), render_pose(clip(person(), intrinsics=moved))

    assert (shifted[:, :-3, 7:] == plain[:, 3:, :-7]).mean() > 0.999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"palette": "rainbow"}, "rainbow"),
        ({"size": (0, 112)}, "0x112"),
        ({"frames_per_chunk": 0}, "frames_per_chunk is 0"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(InvalidInputError, match=message):
        render_pose(walk(2), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_draws_what_the_cpu_draws(two_persons):
    on_gpu = render_pose(two_persons, palette="multi", device="cuda")

    assert np.abs(on_gpu.astype(int) - render_pose(two_persons, palette="multi")).max() <= 1
