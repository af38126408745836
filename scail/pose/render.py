"""The pose video: thirteen shaded capsules a person, seen by a pinhole camera, with hands and face on top.

The official renderer marches a distance field, pixel by pixel. Here every ray meets every capsule in closed form, and
only where it can: each capsule is bounded row by row on the screen first, so that the work is the area of the bodies
and not that of the picture. All persons and frames of a chunk are one flat list of (capsule, row) spans, and these one
of (capsule, pixel) candidates; the nearest candidate of a pixel is an integer minimum, exact in any order. Geometry is
float64: in float32 cancellation loses pixels of the silhouette.

Three things the march does by being a march are kept, since they are seen: how close counts as a hit, which rays it
gives up on, and how float32 tilts its normals. With them silhouettes differ from marched ones by one pixel in 30,000,
and colours by 0.1 of 255 on average.

Rays run through integer pixel coordinates, without half a pixel, and colours are truncated to bytes, as the official
code does. Source: zai-org/SCAIL-Pose, render_3d/taichi_cylinder.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scail.errors import InvalidInputError
from scail.pose.camera import scale_intrinsics
from scail.pose.overlay import draw_overlay, lay_over
from scail.pose.ragged import pieces, ranges
from scail.pose.skeleton import BONE_JOINTS, PALETTES, PoseSequence

Palette = Literal["single", "multi"]
ZRange = tuple[float, float]

RADIUS = 21.5  # millimetres, every bone
HIT_DISTANCE, MAX_STEPS = 1e-3, 300  # of the official march: a ray may pass a bone by a micrometre and hit it
HIT_RADIUS = RADIUS + HIT_DISTANCE
MAX_GRAZE = 10.0  # mm²: a ray 0.2 mm off the surface is lost only within 9 degrees of the bone, which is left out
ALPHA = 0.8
MIN_RAY, MIN_RAY_LIMIT, MAX_RAY_LIMIT = 0.1, 10_000.0, 25_000.0
NEAR_PLANE, FAR_MARGIN, MAX_FAR = 0.1, 6_000.0, 20_000.0
NORMAL_STEP = 1e-3  # of the official central differences

# A candidate's key is its depth with the capsule's index in the low bits: the minimum over a pixel is the nearest
# surface and, among equal ones, the earlier bone. What is left of the depth is exact to half a nanometre per metre.
_CAPSULE_BITS = 20
_CAPSULE_MASK = (1 << _CAPSULE_BITS) - 1
_LOST = _CAPSULE_MASK  # in place of an index: the ray ends here and the pixel stays black
_NOTHING = int(np.array(np.inf).view(np.int64))  # an infinite depth

# Candidates worked on at once: on a CPU what its cache holds, elsewhere what keeps memory bounded.
_CPU_CANDIDATES, _GPU_CANDIDATES = 1 << 15, 1 << 21


@dataclass(frozen=True)
class View:
    """The picture's size and camera: pixel x, y looks along ((x - centre_x) / focal_x, (y - centre_y) / focal_y, 1)."""

    height: int
    width: int
    focal_x: float
    focal_y: float
    centre_x: float
    centre_y: float

    @classmethod
    def of(cls, sequence: PoseSequence, size: tuple[int, int] | None) -> View:
        own_size = (sequence.height, sequence.width)
        height, width = size or own_size
        if min(height, width) < 1:
            raise InvalidInputError(f"pose size is {height}x{width}; height and width must be positive.")
        matrix = scale_intrinsics(sequence.camera_matrix, from_size=own_size, to_size=(height, width))
        return cls(height, width, *(float(matrix[entry]) for entry in ((0, 0), (1, 1), (0, 2), (1, 2))))


class Capsules(NamedTuple):
    """N bones of a chunk in drawing order: by frame, person, bone. Float64; lengths in millimetres."""

    frame: Tensor  # (N,)
    start: Tensor  # (3, N)
    axis: Tensor  # (3, N), unit length; zeros for a bone without length
    length: Tensor  # (N,)
    albedo: Tensor  # (3, N)


class Spans(NamedTuple):
    """S runs of pixels of one row and capsule each; together they hold every pixel that the capsules can cover."""

    capsule: Tensor  # (S,)
    row: Tensor  # (S,)
    column: Tensor  # (S,), the first one
    length: Tensor  # (S,)


class Hits(NamedTuple):
    """M lit pixels of n frames, each once: flat position in (n, H, W) and colour (M, 4), RGBA."""

    pixel: NDArray[np.int64]
    colour: NDArray[np.uint8]


def clip_z_range(sequence: PoseSequence) -> ZRange | None:
    """Nearest and farthest bone end of the whole clip in millimetres; None when nobody is in it.

    Shading depends on it. Whoever renders a clip in pieces computes it once and passes it to every piece; left to
    themselves, the pieces come out in different brightness.
    """
    depth = sequence.joints[:, :, BONE_JOINTS, 2][sequence.bone_mask]
    return (float(depth.min()), float(depth.max())) if depth.size else None


def render_pose(
    sequence: PoseSequence,
    *,
    size: tuple[int, int] | None = None,
    palette: Palette = "single",
    z_range: ZRange | None = None,
    device: str | torch.device = "cpu",
    frames_per_chunk: int = 8,
) -> NDArray[np.uint8]:
    """The pose video of a clip: bones in space, with head, hands and face over them where they are known.

    Args:
        sequence: Motion of all persons.
        size: Height and width to render in; left out, those of the sequence.
        palette: "single" gives every person the same colours, "multi" tells the first from the others.
        z_range: What `clip_z_range` says of the whole clip, when `sequence` is a part of it.
        device: Where the rays are cast; key points are always drawn on the CPU.
        frames_per_chunk: Frames worked on at once; changes memory and speed, never a pixel.

    Returns:
        uint8 (T, H, W, 3), RGB on black.

    Raises:
        InvalidInputError: If the palette is unknown, or the size or the chunk is not positive.
    """
    view = View.of(sequence, size)
    frames = np.zeros((sequence.num_frames, view.height, view.width, 3), np.uint8)  # what stays black is never touched
    start = 0
    for hits, num_frames in _cast_clip(sequence, view, palette, z_range, torch.device(device), frames_per_chunk):
        _paint(frames[start : start + num_frames], hits, sequence, start)
        start += num_frames
    return frames


def render_chunks(
    sequence: PoseSequence,
    *,
    size: tuple[int, int] | None = None,
    palette: Palette = "single",
    z_range: ZRange | None = None,
    device: str | torch.device = "cpu",
    frames_per_chunk: int = 8,
) -> Iterator[NDArray[np.uint8]]:
    """The frames of `render_pose`, up to `frames_per_chunk` at a time, for clips that need not be held whole."""
    view = View.of(sequence, size)
    start = 0
    for hits, num_frames in _cast_clip(sequence, view, palette, z_range, torch.device(device), frames_per_chunk):
        frames = np.zeros((num_frames, view.height, view.width, 3), np.uint8)
        _paint(frames, hits, sequence, start)
        yield frames
        start += num_frames


def _paint(frames: NDArray[np.uint8], hits: Hits, sequence: PoseSequence, start: int) -> None:
    """Lit pixels, and over them what the key points add, on black frames of which the first is the clip's `start`."""
    num_frames, height, width, _ = frames.shape
    frames.reshape(-1, 3)[hits.pixel] = hits.colour[:, :3]
    if sequence.keypoints is not None:
        lay_over(frames, draw_overlay(sequence.keypoints.frames(start, start + num_frames), height=height, width=width))


def render_bones(
    sequence: PoseSequence,
    *,
    palette: Palette = "single",
    z_range: ZRange | None = None,
    device: str | torch.device = "cpu",
    frames_per_chunk: int = 8,
) -> NDArray[np.uint8]:
    """The bones alone, uint8 (T, H, W, 4), RGBA; alpha is 204 on a bone and colours are not multiplied by it."""
    view = View.of(sequence, None)
    frames = np.zeros((sequence.num_frames, view.height, view.width, 4), np.uint8)
    start = 0
    for hits, num_frames in _cast_clip(sequence, view, palette, z_range, torch.device(device), frames_per_chunk):
        frames[start : start + num_frames].reshape(-1, 4)[hits.pixel] = hits.colour
        start += num_frames
    return frames


def _cast_clip(
    sequence: PoseSequence,
    view: View,
    palette: Palette,
    z_range: ZRange | None,
    device: torch.device,
    frames_per_chunk: int,
) -> Iterator[tuple[Hits, int]]:
    """Lit pixels and number of frames, chunk by chunk."""
    if palette not in PALETTES:
        raise InvalidInputError(f"pose palette is {palette!r}; expected one of {', '.join(PALETTES)}.")
    if frames_per_chunk < 1:
        raise InvalidInputError(f"frames_per_chunk is {frames_per_chunk}; it must be positive.")
    frames_per_chunk = min(frames_per_chunk, sequence.num_frames)
    if frames_per_chunk * sequence.num_persons * len(BONE_JOINTS) > _LOST:
        raise InvalidInputError(
            f"frames_per_chunk is {frames_per_chunk} for {sequence.num_persons} persons; "
            f"a chunk holds at most {_LOST} bones."
        )
    z_range = z_range or clip_z_range(sequence) or (0.0, 0.0)  # without a bone nothing is shaded
    ray_limit = max(min(z_range[1], MAX_RAY_LIMIT), MIN_RAY_LIMIT)
    for start in range(0, sequence.num_frames, frames_per_chunk):
        stop = min(start + frames_per_chunk, sequence.num_frames)
        capsules = _capsules(sequence, slice(start, stop), PALETTES[palette], device)
        spans = _screen_spans(capsules, view)
        keys = _nearest(capsules, spans, view, stop - start, ray_limit)
        yield _shade(keys, capsules, view, z_range), stop - start


def _capsules(sequence: PoseSequence, part: slice, palette: NDArray[np.float64], device: torch.device) -> Capsules:
    frame, person, bone = np.nonzero(sequence.bone_mask[part])
    ends = sequence.joints[part].astype(np.float64)[frame, person, BONE_JOINTS[bone].T]  # (2, N, 3)
    vector = ends[1] - ends[0]
    length = np.sqrt((vector**2).sum(axis=1))
    axis = vector / np.where(length == 0, 1.0, length)[:, None]
    albedo = palette[np.minimum(person, len(palette) - 1), bone] / 300.0 + 0.15
    columns = (frame, ends[0].T, axis.T, length, albedo.T)
    return Capsules(*(torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in columns))


def _screen_spans(capsules: Capsules, view: View) -> Spans:
    """Bound every capsule on the screen, row by row.

    A sphere in front of the camera projects to an ellipse. A band as wide as the longer of both half axes, around the
    line between both centres, holds the capsule. One that comes closer than a diameter to the camera's plane has no
    such ellipse; its band reaches everywhere.
    """
    x, y, z = torch.stack([capsules.start, capsules.start + capsules.axis * capsules.length], dim=1)  # (2, N) each
    close = z < 2 * RADIUS
    power = torch.where(close, 1.0, z * z - RADIUS**2)
    x0, x1 = view.focal_x * x * z / power + view.centre_x
    y0, y1 = view.focal_y * y * z / power + view.centre_y
    half_axis = RADIUS * (x * x + y * y + z * z - RADIUS**2).clamp(min=0).sqrt() / power
    reach = max(view.focal_x, view.focal_y) * torch.where(close, 1e12, half_axis).amax(dim=0) + 1.0

    top = (torch.minimum(y0, y1) - reach).clamp(0, view.height).floor().long()
    bottom = (torch.maximum(y0, y1) + reach).clamp(-1, view.height - 1).ceil().long()
    capsule, row = ranges((bottom - top + 1).clamp(min=0) * (z.amax(dim=0) > -RADIUS))
    row = row + top[capsule]

    x0, y0, reach = x0[capsule], y0[capsule], reach[capsule]
    delta_x, delta_y = x1[capsule] - x0, y1[capsule] - y0
    delta_y = torch.where(delta_y == 0, 1e-12, delta_y)
    # The band's right border touches the row where its axis is `reach` below or above it, measured along the normal.
    lift = reach * delta_x * delta_y.sign() / torch.hypot(delta_x, delta_y)

    def border(side: int) -> Tensor:
        along = ((row - y0 + side * lift) / delta_y).clamp(0, 1)
        rest = (reach**2 - (row - y0 - along * delta_y) ** 2).clamp(min=0).sqrt()
        return x0 + along * delta_x + side * rest

    first = border(-1).clamp(0, view.width).floor().long()
    length = border(1).clamp(-1, view.width - 1).ceil().long() - first + 1
    seen = (length > 0).nonzero().squeeze(1)
    return Spans(capsule[seen], row[seen], first[seen], length[seen])


def _nearest(capsules: Capsules, spans: Spans, view: View, num_frames: int, ray_limit: float) -> Tensor:
    """Key of the nearest capsule of every pixel, int64 (n * H * W,)."""
    device = spans.row.device
    keys = torch.full((num_frames * view.height * view.width,), _NOTHING, dtype=torch.int64, device=device)
    start, axis = capsules.start[:, spans.capsule], capsules.axis[:, spans.capsule]
    v = (spans.row.double() - view.centre_y) / view.focal_y
    along_start, start_square = _dot(axis, start), _dot(start, start)
    coefficients = torch.stack(
        [
            v * v + 1.0,
            axis[0],
            axis[1] * v + axis[2],
            start[0],
            start[1] * v + start[2],
            along_start,
            start_square,
            capsules.length[spans.capsule],
        ]
    )
    first_pixel = (capsules.frame[spans.capsule] * view.height + spans.row) * view.width
    for part in pieces(spans.length, _CPU_CANDIDATES if device.type == "cpu" else _GPU_CANDIDATES):
        span, column = ranges(spans.length[part])
        column = column + spans.column[part][span]
        u = (column.double() - view.centre_x) / view.focal_x
        depth, lost = _ray_depth(u, coefficients[:, part].index_select(1, span), ray_limit)
        capsule = torch.where(lost, _LOST, spans.capsule[part][span])
        key = (depth.view(torch.int64) & ~_CAPSULE_MASK) | capsule
        keys.scatter_reduce_(0, first_pixel[part][span] + column, key, "amin")
    return keys


def _ray_depth(u: Tensor, coefficients: Tensor, ray_limit: float) -> tuple[Tensor, Tensor]:
    """Depth z at which the ray d = (u, v, 1) enters its capsule, infinite where it does not; and whether it is lost.

    Rows of `coefficients` are what v leaves constant along a row of pixels: d·d = u² + [0]; axis·d = [1] u + [2];
    start·d = [3] u + [4]; axis·start; start·start; length.
    """
    constant, axis_u, axis_v, start_u, start_v, along_start, start_square, length = coefficients
    square = u * u + constant
    axis_ray = axis_u * u + axis_v
    start_ray = start_u * u + start_v

    # The infinite cylinder; parallel rays divide by the clamp and fall through to the nearer of the spheres.
    across = (square - axis_ray * axis_ray).clamp(min=1e-12)
    towards = start_ray - along_start * axis_ray
    discriminant = towards * towards - across * (start_square - along_start * along_start - HIT_RADIUS**2)
    depth = (towards - discriminant.clamp(min=0).sqrt()) / across
    along = depth * axis_ray - along_start
    on_side = (along >= 0) & (along <= length)

    # The sphere at the end that the ray passes.
    end = torch.where(along > length, length, 0.0)
    centre_ray = start_ray + end * axis_ray
    centre_square = start_square + end * (2.0 * along_start + end)
    sphere_discriminant = centre_ray * centre_ray - square * (centre_square - HIT_RADIUS**2)
    sphere_depth = (centre_ray - sphere_discriminant.clamp(min=0).sqrt()) / square

    depth = torch.where(on_side, depth, sphere_depth)
    inside = torch.where(on_side, discriminant / across, sphere_discriminant / square)  # HIT_RADIUS² - clearance²
    lost = _is_lost(inside, torch.where(on_side, across / square, 1.0))
    distance = depth * square.sqrt()  # along the ray: the official limit is not one of depth
    hit = ((inside >= 0) & (discriminant >= 0) | lost) & (distance > MIN_RAY) & (distance < ray_limit)
    return torch.where(hit, depth, torch.inf), lost


def _is_lost(inside: Tensor, sine_square: Tensor) -> Tensor:
    """Whether the official march spends its 300 steps beside the bone, and the pixel stays black.

    A step is as long as the distance to the bone, which at t from the closest point is c + t² / 2R: c is the clearance,
    R = radius / sine² of the angle between ray and bone. The steps are the integral of dt / (c + t² / 2R), from afar
    until the distance is 1e-3 mm, or to the far side when it never is.

    Args:
        inside: Square of the hit radius less that of the ray's closest approach to the bone.
        sine_square: Of the angle between ray and bone.
    """
    grazing = (inside.abs() < MAX_GRAZE).nonzero().squeeze(1)
    clearance = 1.0 - inside[grazing] / (2.0 * RADIUS * HIT_DISTANCE)  # in units of the hit distance
    root = clearance.abs().sqrt().clamp(min=1e-9)
    to_hit = torch.where(clearance > 0, root.clamp(max=1).asin(), root.asinh()) / root
    to_pass = torch.pi / root
    num_steps = (
        torch.where(clearance > 1, to_pass, to_hit) * (2.0 * RADIUS / (HIT_DISTANCE * sine_square[grazing])).sqrt()
    )
    lost = torch.zeros_like(inside, dtype=torch.bool)
    lost[grazing] = num_steps > MAX_STEPS
    return lost


def _shade(keys: Tensor, capsules: Capsules, view: View, z_range: ZRange) -> Hits:
    """Colours of the pixels that a capsule is seen in."""
    index = (keys < _NOTHING).nonzero().squeeze(1)
    index = index[(keys[index] & _CAPSULE_MASK) != _LOST]
    key = keys[index]
    capsule = key & _CAPSULE_MASK
    depth = (key & ~_CAPSULE_MASK).view(torch.float64)

    pixel = index % (view.height * view.width)
    u = ((pixel % view.width).double() - view.centre_x) / view.focal_x
    v = ((pixel // view.width).double() - view.centre_y) / view.focal_y
    ray = torch.stack([u, v, torch.ones_like(u)])  # (3, M)
    point = ray * depth
    start, axis = capsules.start[:, capsule], capsules.axis[:, capsule]
    from_start = point - start
    along = torch.minimum(_dot(from_start, axis).clamp(min=0), capsules.length[capsule])
    normal = _unit((from_start - along * axis) * _official_step(point))

    to_light = -_unit(ray)
    to_light[2] -= 1.0
    highlight = _dot(normal, _unit(to_light)).clamp(min=0)
    for _ in range(5):  # to the power of 32
        highlight = highlight * highlight
    diffuse = 0.3 + 0.7 * (-normal[2]).clamp(min=0)

    near, far = max(z_range[0], NEAR_PLANE), min(z_range[1] + FAR_MARGIN, MAX_FAR)
    fade = (1.0 - (depth - near) / (far - NEAR_PLANE)).clamp(0, 1)
    colour = ((capsules.albedo[:, capsule] * diffuse + 0.5 * highlight) * fade).clamp(0, 1)
    rgba = torch.cat([colour, torch.full_like(depth, ALPHA)[None]]) * 255.0
    return Hits(index.cpu().numpy(), rgba.to(torch.uint8).T.contiguous().cpu().numpy())


def _official_step(point: Tensor) -> Tensor:
    """What is left of the official normal's step of 1e-3 mm after rounding coordinates of metres to float32.

    The official normal is a difference in float32 whose step becomes 2^-10 instead of 1e-3 on most axes. It tilts every
    normal by about a degree; without it pictures come out brighter by 0.9 of 255 on average, with it by 0.1.
    """
    rounded = point.to(torch.float32)
    return ((rounded + NORMAL_STEP) - (rounded - NORMAL_STEP)).to(torch.float64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # written out: a matrix product may run in TF32


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _dot(vectors, vectors).sqrt()
