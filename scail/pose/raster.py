"""Lines, discs and filled ellipses on the integer grid, pixel for pixel what OpenCV draws without anti-aliasing.

The conditioning video was drawn with OpenCV when the model was trained, and hands and face are shapes of a few
pixels: a rasteriser that differs by one is seen. Every function takes all shapes of a clip at once and gives their
pixels as a flat list in drawing order, so that there is no loop over frames and no canvas.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_SHIFT = 16  # OpenCV's fixed point: coordinates in 1/65536 px
_ONE = 1 << _SHIFT

# Half width of each row of a filled disc, from the middle row outwards.
_DISC_ROWS: dict[int, tuple[int, ...]] = {1: (1, 0), 2: (2, 1, 0), 4: (4, 3, 3, 2, 0)}


class Pixels(NamedTuple):
    """M pixels in drawing order; `owner` is the index of the shape that each belongs to."""

    owner: Ints
    x: Ints
    y: Ints

    def inside(self, height: int, width: int) -> Pixels:
        keep = (self.x >= 0) & (self.x < width) & (self.y >= 0) & (self.y < height)
        return Pixels(self.owner[keep], self.x[keep], self.y[keep])


def ranges(lengths: Ints) -> tuple[Ints, Ints]:
    """Owner and position of every element of ranges of the given lengths, laid end to end."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    return owner, np.arange(len(owner)) - first[owner]


def draw_lines(start: Ints, end: Ints, thickness: int, *, height: int, width: int) -> Pixels:
    """Lines between integer points (N, 2), of thickness 1 or 2."""
    margin = 0 if thickness == 1 else thickness
    kept, start, end = _clip_lines(start + margin, end + margin, height=height + 2 * margin, width=width + 2 * margin)
    draw = _thin_lines if thickness == 1 else partial(_thick_lines, height=height, width=width)
    line, x, y = draw(start - margin, end - margin)
    return Pixels(kept[line], x, y).inside(height, width)


def draw_discs(centre: Ints, radius: int, *, height: int, width: int) -> Pixels:
    """Filled discs of radius 1, 2 or 4 around integer points (N, 2)."""
    return _stamp(centre, [_disc_offsets(radius)] * len(centre)).inside(height, width)


def draw_ellipses(
    centre: Ints, half_length: Ints, half_width: int, degrees: Ints, *, height: int, width: int
) -> Pixels:
    """Filled ellipses around integer points (N, 2), the long axis turned by whole degrees from x towards y."""
    stamps = [
        _ellipse_offsets(int(length), half_width, int(angle) % 360, int(x) & 1, int(y) & 1)
        for (x, y), length, angle in zip(centre, half_length, degrees, strict=True)
    ]
    return _stamp(centre, stamps).inside(height, width)


def _disc_offsets(radius: int) -> Ints:
    """Pixels (K, 2) of a disc relative to its centre."""
    half = np.array(_DISC_ROWS[radius])
    rows = np.arange(-radius, radius + 1)
    row, column = ranges(2 * half[np.abs(rows)] + 1)
    return np.stack([column - half[np.abs(rows)][row], rows[row]], axis=1)


def _stamp(centre: Ints, offsets: list[Ints]) -> Pixels:
    owner, _ = ranges(np.array([len(stamp) for stamp in offsets], np.int64))
    points = np.concatenate([*offsets, np.empty((0, 2), np.int64)]) + centre[owner]
    return Pixels(owner, points[:, 0], points[:, 1])


def _thin_lines(start: Ints, end: Ints) -> Pixels:
    """Bresenham lines drawn from the left; a tie of the minor axis stays on the side of the first point."""
    swap = (end[:, 0] < start[:, 0])[:, None]
    start, end = np.where(swap, end, start), np.where(swap, start, end)
    delta = end - start
    major, minor = np.abs(delta).max(axis=1), np.abs(delta).min(axis=1)
    steep = np.abs(delta[:, 1]) > delta[:, 0]
    line, step = ranges(major + 1)
    run = np.maximum(major, 1)[line]
    side = (2 * minor[line] * step + run - 1) // (2 * run)
    down = np.sign(delta[:, 1])[line]
    x = start[line, 0] + np.where(steep[line], side, step)
    y = start[line, 1] + np.where(steep[line], step, side) * down
    return Pixels(line, x, y)


def _thick_lines(start: Ints, end: Ints, *, height: int, width: int) -> Pixels:
    """Lines of thickness 2: a rectangle that reaches one pixel to either side, and a disc of radius 1 at each end."""
    delta = end - start
    length = np.hypot(delta[:, 0], delta[:, 1])
    normal = np.stack([-delta[:, 1], delta[:, 0]], axis=1) / np.where(length == 0, 1.0, length)[:, None]
    side: Ints = np.rint(normal * _ONE).astype(np.int64)
    start, end = start * _ONE, end * _ONE
    corners = np.stack([start - side, start + side, end + side, end - side], axis=1)
    rectangle = _fill_convex(corners, _fixed_point_outline(corners, height=height, width=width))
    caps = [_stamp(centre // _ONE, [_disc_offsets(1)] * len(centre)) for centre in (start, end)]
    owner, x, y = (np.concatenate(parts) for parts in zip(rectangle, *caps, strict=True))
    order = np.argsort(owner, kind="stable")
    return Pixels(owner[order], x[order], y[order])


def _fixed_point_outline(corners: Ints, *, height: int, width: int) -> Pixels:
    """The border of polygons (N, K, 2) with corners in 1/65536 px; walks along the longer axis, rounds the other."""
    num_corners = corners.shape[1]
    start, end = corners.reshape(-1, 2), np.roll(corners, -1, axis=1).reshape(-1, 2)
    kept, start, end = _clip_lines(start, end, height=height * _ONE, width=width * _ONE)
    delta = end - start
    steep = np.abs(delta[:, 1]) >= np.abs(delta[:, 0])
    backwards = np.where(steep, delta[:, 1], delta[:, 0]) < 0
    start, end = np.where(backwards[:, None], end, start), np.where(backwards[:, None], start, end)
    delta = end - start
    major, minor = np.where(steep, delta[:, 1], delta[:, 0]), np.where(steep, delta[:, 0], delta[:, 1])
    slope = np.trunc(minor * float(_ONE) / (major | 1)).astype(np.int64)
    edge, step = ranges((major >> _SHIFT) + 1)
    along = step * _ONE
    across = step * slope[edge]
    x = start[edge, 0] + np.where(steep[edge], across, along)
    y = start[edge, 1] + np.where(steep[edge], along, across)
    owner = np.concatenate([kept[edge], kept]) // num_corners
    return Pixels(owner, _to_pixel(np.concatenate([x, end[:, 0]])), _to_pixel(np.concatenate([y, end[:, 1]])))


def _fill_convex(corners: Ints, outline: Pixels) -> Pixels:
    """Convex polygons (N, K, 2) with corners in 1/65536 px, filled from edge to edge, together with their outline."""
    num_polygons, num_corners = corners.shape[:2]
    start, end = corners.reshape(-1, 2), np.roll(corners, -1, axis=1).reshape(-1, 2)
    upwards = (end[:, 1] < start[:, 1])[:, None]
    start, end = np.where(upwards, end, start), np.where(upwards, start, end)
    top = _to_pixel(start[:, 1])
    num_rows = _to_pixel(end[:, 1]) - top
    rise = 2 * np.maximum(num_rows, 1)
    slope = np.trunc((2 * (end[:, 0] - start[:, 0]) + num_rows) / rise).astype(np.int64)
    edge, row = ranges(num_rows)
    owner = np.concatenate([edge // num_corners, outline.owner])
    x = np.concatenate([_to_pixel(start[edge, 0] + row * slope[edge]), outline.x])
    y = np.concatenate([top[edge] + row, outline.y])

    first, height = (int(y.min()), int(np.ptp(y)) + 1) if len(y) else (0, 0)
    left = np.full((num_polygons, height), np.iinfo(np.int64).max)
    right = np.full((num_polygons, height), np.iinfo(np.int64).min)
    np.minimum.at(left, (owner, y - first), x)
    np.maximum.at(right, (owner, y - first), x)
    polygon, line = np.nonzero(left <= right)
    left, right = left[polygon, line], right[polygon, line]
    span, column = ranges(right - left + 1)
    return Pixels(polygon[span], left[span] + column, line[span] + first)


def _to_pixel(fixed: Ints) -> Ints:
    return (fixed + _ONE // 2) >> _SHIFT


def _clip_lines(start: Ints, end: Ints, *, height: int, width: int) -> tuple[Ints, Ints, Ints]:
    """The lines that touch the picture, cut at its border with ends truncated to integers, after their index."""
    ends = np.stack([start, end])  # (2 ends, N, x and y)
    kept = np.arange(len(start))
    for axis, last in ((1, height - 1), (0, width - 1)):
        touches = (ends[:, :, axis].max(axis=0) >= 0) & (ends[:, :, axis].min(axis=0) <= last)
        ends, kept = ends[:, touches], kept[touches]
        for point in ends:
            target = np.clip(point[:, axis], 0, last)
            run, rise = ends[1, :, axis] - ends[0, :, axis], ends[1, :, 1 - axis] - ends[0, :, 1 - axis]
            moved = (target - point[:, axis]) * rise / np.where(run == 0, 1, run)
            point[:, 1 - axis] += np.trunc(moved).astype(np.int64)
            point[:, axis] = target
    return kept, ends[0], ends[1]


@lru_cache(maxsize=4096)
def _ellipse_offsets(half_length: int, half_width: int, degrees: int, odd_x: int, odd_y: int) -> Ints:
    """Pixels (K, 2) of an ellipse relative to its centre.

    The outline is a polygon with one corner a degree, rounded half to even: that is why the centre's parity matters.
    """
    sine, cosine = (
        np.round(wave(np.radians(np.arange(361))), 7).astype(np.float32).astype(np.float64) for wave in (np.sin, np.cos)
    )
    along, across = half_length * cosine, half_width * sine
    x = np.rint(odd_x + along * cosine[degrees] - across * sine[degrees]).astype(np.int64) - odd_x
    y = np.rint(odd_y + along * sine[degrees] + across * cosine[degrees]).astype(np.int64) - odd_y
    corners = np.stack([x, y], axis=1)
    _, outline_x, outline_y = _thin_lines(corners, np.roll(corners, -1, axis=0))
    outline = Pixels(np.zeros_like(outline_x), outline_x, outline_y)
    filled = _fill_convex(corners[None] * _ONE, outline)
    return np.stack([filled.x, filled.y], axis=1)
