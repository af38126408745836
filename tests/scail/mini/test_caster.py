from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scail.mini.caster import Capsules, cast, default_view
from scail.mini.data import LANDSCAPE, PORTRAIT, draw_scenes, render_pose_pictures
from scail.pose.render import render_pose
from scail.pose.skeleton import PoseSequence

CPU = torch.device("cpu")


def sphere(x: float, y: float, z: float, radius: float, dtype: torch.dtype = torch.float64) -> Capsules:
    centre = torch.tensor([[x, y, z]], dtype=dtype)
    return Capsules(torch.zeros(1, dtype=torch.int64), centre, centre, torch.tensor([radius], dtype=dtype))


@pytest.mark.parametrize("size", [PORTRAIT, LANDSCAPE])
def test_pose_pictures_are_those_of_the_pose_renderer(size):
    scenes = draw_scenes(5, 6, num_frames=3, size=size, held_out=False, device=CPU)
    assert 0 < (scenes.palette_row >= 0).sum() < len(scenes.palette_row)  # somebody alone and a pair

    pictures = render_pose_pictures(scenes).permute(0, 2, 3, 4, 1).numpy()

    for n, frames in enumerate(pictures):
        persons = (scenes.clip == n).nonzero()[:, 0]
        joints = scenes.joints[persons].transpose(0, 1).float().numpy()
        palette = "multi" if len(persons) > 1 else "single"
        expected = render_pose(PoseSequence(joints, *size), palette=palette).astype(np.float64)
        assert 10 * math.log10(255**2 / ((frames - expected) ** 2).mean()) > 50


def test_a_sphere_covers_the_pixels_whose_rays_meet_it():
    view = default_view(*PORTRAIT)
    row, column = np.mgrid[: view.height, : view.width]
    rays = np.stack(((column - view.centre_x) / view.focal_x, (row - view.centre_y) / view.focal_y, np.ones(row.shape)))
    centre = np.array([130.0, -210.0, 1500.0])
    along = np.tensordot(centre, rays, 1) / (rays**2).sum(axis=0)
    expected = ((centre[:, None, None] - along * rays) ** 2).sum(axis=0) < 120.0**2

    hits = cast(sphere(*centre, 120.0), 1, view)

    assert set(hits.pixel.tolist()) == set(np.flatnonzero(expected).tolist())


def test_points_lie_on_the_surface_and_normals_point_towards_the_camera():
    capsules = Capsules(
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([[-200.0, 100.0, 2000.0]], dtype=torch.float64),
        torch.tensor([[150.0, -300.0, 2600.0]], dtype=torch.float64),
        torch.tensor([90.0], dtype=torch.float64),
    )

    hits = cast(capsules, 1, default_view(*PORTRAIT))

    assert len(hits.pixel) > 500
    torch.testing.assert_close(
        hits.normal.norm(dim=1), torch.ones(len(hits.pixel), dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert ((hits.normal * hits.point).sum(dim=1) <= 1e-6).all()


def test_the_nearer_of_two_capsules_is_seen_whatever_their_order():
    near, far = sphere(0, 0, 1500, 100), sphere(0, 0, 2000, 100)
    middle = PORTRAIT[0] // 2 * PORTRAIT[1] + PORTRAIT[1] // 2

    for order, expected in (((near, far), 0), ((far, near), 1)):
        hits = cast(Capsules(*(torch.cat(values) for values in zip(*order, strict=True))), 1, default_view(*PORTRAIT))
        assert hits.capsule[hits.pixel == middle].tolist() == [expected]


def test_capsules_are_seen_in_their_own_pictures_only():
    first, second = sphere(0, 0, 1500, 100), sphere(0, 0, 1500, 100)._replace(image=torch.tensor([2]))

    hits = cast(
        Capsules(*(torch.cat(values) for values in zip(first, second, strict=True))), 3, default_view(*PORTRAIT)
    )

    assert set((hits.pixel // (PORTRAIT[0] * PORTRAIT[1])).tolist()) == {0, 2}


def test_what_is_behind_or_around_the_camera_is_not_seen():
    hidden = [sphere(0, 0, -1500, 100), sphere(0, 0, 50, 100)]

    hits = cast(Capsules(*(torch.cat(values) for values in zip(*hidden, strict=True))), 1, default_view(*PORTRAIT))

    assert len(hits.pixel) == 0


def test_single_precision_finds_the_same_silhouette():
    double = cast(sphere(300, -400, 3800, 95), 1, default_view(*PORTRAIT, 2))
    single = cast(sphere(300, -400, 3800, 95, torch.float32), 1, default_view(*PORTRAIT, 2))

    assert len(set(double.pixel.tolist()) ^ set(single.pixel.tolist())) <= 1
    assert single.normal.dtype == torch.float32
