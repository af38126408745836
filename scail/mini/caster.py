"""Capsules seen by a pinhole camera, many clips at once: what draws both the characters and their pose pictures.

A capsule is bounded by a rectangle on the screen; the pixels of all rectangles are one flat list of candidates, and the
nearest one of a pixel is an integer minimum, exact in any order. There is no matrix product in it, so that no setting
of a GPU's precision reaches it. Capsules are millimetres in camera axes; rays run through integer pixel coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scail.pose.camera import default_intrinsics
from scail.pose.ragged import pieces, ranges
from scail.pose.render import View

# A candidate's key is its depth as float64 with the capsule's index in the low bits: of equal depths, the earlier
# capsule is seen, as in the pose renderer.
_CAPSULE_BITS = 20
_CAPSULE_MASK = (1 << _CAPSULE_BITS) - 1
_NOTHING = 0x7FF0_0000_0000_0000  # the bits of an infinite depth

_CANDIDATES = {"cpu": 1 << 17, "cuda": 1 << 24}  # worked on at once


class Capsules(NamedTuple):
    """N capsules; a sphere is one without length. At most 2^20 at once."""

    image: Tensor  # (N,), the picture that it is in
    start: Tensor  # (N, 3)
    end: Tensor  # (N, 3)
    radius: Tensor  # (N,)


class Hits(NamedTuple):
    """M pixels in which a capsule is seen."""

    pixel: Tensor  # (M,), flat position in (images, H, W)
    capsule: Tensor  # (M,)
    point: Tensor  # (M, 3), on the surface
    normal: Tensor  # (M, 3), outwards


class _Rectangles(NamedTuple):
    """The pixels that each of N capsules can cover."""

    row: Tensor
    column: Tensor
    num_rows: Tensor
    num_columns: Tensor


def default_view(height: int, width: int, supersampling: int = 1) -> View:
    """The pose side's camera; with supersampling s, s · s rays spread evenly over each pixel."""
    matrix = default_intrinsics(height, width)
    s = supersampling
    focal, centres = float(matrix[0, 0]) * s, [float(matrix[axis, 2]) * s + (s - 1) / 2 for axis in (0, 1)]
    return View(height * s, width * s, focal, focal, *centres)


def cast(capsules: Capsules, num_images: int, view: View) -> Hits:
    """The nearest surface of every pixel, in the precision of the capsules."""
    keys = _nearest(capsules, num_images, view)
    pixel = (keys < _NOTHING).nonzero().squeeze(1)
    key = keys[pixel]
    capsule = key & _CAPSULE_MASK
    depth = (key & ~_CAPSULE_MASK).view(torch.float64).to(capsules.start.dtype)
    u, v = _ray(pixel // view.width % view.height, pixel % view.width, view, depth.dtype)
    point = torch.stack((u, v, torch.ones_like(u)), dim=-1) * depth[:, None]
    start, axis, length = capsules.start[capsule], *_axes(capsules, capsule)
    along = ((point - start) * axis).sum(-1).clamp(min=0)
    along = torch.minimum(along, length)
    normal = (point - start - along[:, None] * axis) / capsules.radius[capsule, None]
    return Hits(pixel, capsule, point, normal)


def _nearest(capsules: Capsules, num_images: int, view: View) -> Tensor:
    """Key of the nearest capsule of every pixel, int64 (images · H · W,)."""
    start = capsules.start
    keys = torch.full((num_images * view.height * view.width,), _NOTHING, dtype=torch.int64, device=start.device)
    rectangles = _rectangles(capsules, view)
    axis, length = _axes(capsules)
    along_start = (axis * start).sum(-1)
    across_start = start - along_start[:, None] * axis
    rows = torch.stack((*start.T, *axis.T, *across_start.T, along_start, length, capsules.radius**2))  # (12, N)
    budget = _CANDIDATES["cpu" if start.device.type == "cpu" else "cuda"]
    for part in pieces(rectangles.num_rows * rectangles.num_columns, budget):
        row, column, num_rows, num_columns = (values[part] for values in rectangles)
        owner, position = ranges(num_rows * num_columns)
        row = row[owner] + position // num_columns[owner]
        column = column[owner] + position % num_columns[owner]
        u, v = _ray(row, column, view, start.dtype)
        depth = _ray_depth(u, v, rows[:, part].index_select(1, owner))
        capsule = owner + part.start
        pixel = (capsules.image[capsule] * view.height + row) * view.width + column
        key = (depth.double().view(torch.int64) & ~_CAPSULE_MASK) | capsule
        keys.scatter_reduce_(0, pixel, key, "amin")
    return keys


def _rectangles(capsules: Capsules, view: View) -> _Rectangles:
    """Bounds of both end spheres' exact outlines; a capsule that reaches the camera is not seen at all."""
    ends = torch.stack((capsules.start, capsules.end))  # (2, N, 3)
    z, radius = ends[..., 2], capsules.radius
    power = (z * z - radius * radius).clamp(min=1.0)
    borders = []
    for axis, focal, centre, size in (
        (1, view.focal_y, view.centre_y, view.height),
        (0, view.focal_x, view.centre_x, view.width),
    ):
        side = ends[..., axis]
        reach = radius * (side * side + power).sqrt()
        low = ((side * z - reach) / power * focal + centre).amin(dim=0).clamp(-1, size)
        high = ((side * z + reach) / power * focal + centre).amax(dim=0).clamp(-1, size)
        first = low.floor().long().clamp(min=0)
        borders.append((first, (high.ceil().long().clamp(max=size - 1) - first + 1).clamp(min=0)))
    (row, num_rows), (column, num_columns) = borders
    return _Rectangles(row, column, num_rows * (z.amin(dim=0) > 2 * radius), num_columns)


def _ray_depth(u: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Depth z at which the ray (u, v, 1) enters its capsule, infinite where it does not.

    Distances are taken at the ray's closest approach, where numbers are as small as the bodies: with the textbook's
    discriminant, float32 loses pixels of the silhouette.
    """
    start, axis, across_start = rows[0:3], rows[3:6], rows[6:9]
    along_start, length, radius_square = rows[9:]
    axis_ray = axis[0] * u + axis[1] * v + axis[2]
    across = (u - axis_ray * axis[0], v - axis_ray * axis[1], 1 - axis_ray * axis[2])
    square = _dot(across, across).clamp(min=1e-12)
    closest = _dot(across, across_start) / square
    inside = radius_square - _square_distance(across_start, across, closest)
    depth = closest - (inside.clamp(min=0) / square).sqrt()
    along = depth * axis_ray - along_start
    on_side = (along >= 0) & (along <= length)

    end = torch.where(along > length, length, 0.0)
    centre = [start[i] + end * axis[i] for i in range(3)]
    ray = (u, v, torch.ones_like(u))
    square = u * u + v * v + 1
    closest = _dot(ray, centre) / square
    sphere_inside = radius_square - _square_distance(centre, ray, closest)
    sphere_depth = closest - (sphere_inside.clamp(min=0) / square).sqrt()
    hit = (inside >= 0) & (on_side | (sphere_inside >= 0))
    return torch.where(hit, torch.where(on_side, depth, sphere_depth), torch.inf)


def _square_distance(target: Tensor | list[Tensor], ray: tuple[Tensor, ...], along: Tensor) -> Tensor:
    apart = [target[i] - along * ray[i] for i in range(3)]
    return _dot(apart, apart)


def _dot(a: Tensor | list[Tensor] | tuple[Tensor, ...], b: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _ray(row: Tensor, column: Tensor, view: View, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (column.to(dtype) - view.centre_x) / view.focal_x, (row.to(dtype) - view.centre_y) / view.focal_y


def _axes(capsules: Capsules, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Unit vectors (M, 3), zeros for spheres, and lengths (M,)."""
    vector = capsules.end[index] - capsules.start[index]
    length = (vector * vector).sum(-1).sqrt()
    return vector / length.clamp(min=1e-6)[:, None], length
