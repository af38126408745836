"""Head, hands and face drawn over the rendered bones.

Every person is painted on a black canvas of their own; canvases are added in uint8, which wraps, and the sum is laid
over the picture channel by channel where it is not zero: a red dot on a cyan bone gives white, and a bone shows
through the zero channels of a hand's line. Nothing here has depth; hands and face always lie on top.

Source: zai-org/SCAIL-Pose, pose_draw/draw_pose_utils.py.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scail.pose import raster
from scail.pose.raster import Ints, Pixels
from scail.pose.skeleton import LEFT, LEFT_EAR, LEFT_EYE, NOSE, RIGHT, RIGHT_EAR, RIGHT_EYE, Keypoints2D

Bytes = NDArray[np.uint8]

HEAD_RADIUS = 4  # pixels, whatever the resolution; also half the width of a cheek's stick
STICK_FADE = 0.6
HEAD_STICKS: tuple[tuple[int, int, tuple[int, int, int]], ...] = (
    (NOSE, RIGHT_EYE, (85, 0, 255)),
    (RIGHT_EYE, RIGHT_EAR, (170, 0, 255)),
    (NOSE, LEFT_EYE, (255, 0, 255)),
    (LEFT_EYE, LEFT_EAR, (255, 0, 170)),
)
HEAD_DOTS: tuple[tuple[int, tuple[int, int, int]], ...] = (
    (NOSE, (255, 0, 0)),
    (RIGHT_EYE, (170, 0, 255)),
    (LEFT_EYE, (255, 0, 255)),
    (RIGHT_EAR, (255, 0, 170)),
    (LEFT_EAR, (255, 0, 85)),
)
HAND_EDGES = np.array([(0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21)])  # five fingers of four
HAND_COLOURS = np.rint([[255 * c for c in colorsys.hsv_to_rgb(edge / 20, 1, 1)] for edge in range(20)]).astype(np.uint8)
HAND_DOT = (0, 0, 255)
FACE_POINTS = np.r_[17:27, 36:68]  # brows, eyes and mouth; neither jaw nor nose
FACE_DOT = (255, 255, 255)


class Painted(NamedTuple):
    """M painted pixels of n frames, each at most once: flat position in (n, H, W) and colour (M, 3)."""

    pixel: Ints
    colour: Bytes


class _Stroke(NamedTuple):
    """Pixels in painting order, with the frame and the colour of each."""

    frame: Ints
    x: Ints
    y: Ints
    colour: Bytes


def draw_overlay(keypoints: Keypoints2D, *, height: int, width: int) -> Painted:
    """Everything that the key points add to the picture."""
    num_persons = keypoints.candidate.shape[1]
    layers = [_draw_person(keypoints, person, height, width) for person in range(num_persons)]
    if num_persons == 1:
        return layers[0]
    pixel, position = np.unique(np.concatenate([layer.pixel for layer in layers]), return_inverse=True)
    colour = np.zeros((len(pixel), 3), np.uint8)
    np.add.at(colour, position, np.concatenate([layer.colour for layer in layers]))  # wraps, as the official sum does
    return Painted(pixel, colour)


def lay_over(frames: Bytes, painted: Painted) -> None:
    """Write `painted` over contiguous frames (n, H, W, 3), channel by channel where it is not zero."""
    pixels = frames.reshape(-1, frames.shape[-1])
    pixels[painted.pixel] = np.where(painted.colour != 0, painted.colour, pixels[painted.pixel])


def _draw_person(keypoints: Keypoints2D, person: int, height: int, width: int) -> Painted:
    strokes = [
        *_head(keypoints.candidate[:, person], keypoints.subset[:, person], height, width),
        *_hand(keypoints.hands[:, person, LEFT], height, width),
        *_hand(keypoints.hands[:, person, RIGHT], height, width),
        _face(keypoints.faces[:, person], height, width),
    ]
    frame, x, y, colour = (np.concatenate(parts) for parts in zip(*strokes, strict=True))
    pixel = (frame * height + y) * width + x
    pixel, position = np.unique(pixel[::-1], return_index=True)  # later strokes cover earlier ones
    return Painted(pixel, colour[::-1][position])


def _head(candidate: NDArray[np.float64], subset: NDArray[np.float64], height: int, width: int) -> Iterator[_Stroke]:
    points = candidate * (width, height)
    seen = subset != -1
    for start, end, colour in HEAD_STICKS:
        frame = np.flatnonzero(seen[:, start] & seen[:, end])
        centre = _truncate((points[frame, start] + points[frame, end]) / 2)
        across, down = (points[frame, start] - points[frame, end]).T
        half_length = _truncate(np.sqrt(down**2 + across**2) / 2)
        degrees = _truncate(np.degrees(np.arctan2(down, across)))
        stick = raster.draw_ellipses(centre, half_length, HEAD_RADIUS, degrees, height=height, width=width)
        yield _stroke(stick, frame, np.array(colour) * STICK_FADE)
    for point, colour in HEAD_DOTS:
        frame = np.flatnonzero(seen[:, point])
        dots = raster.draw_discs(_truncate(points[frame, point]), HEAD_RADIUS, height=height, width=width)
        yield _stroke(dots, frame, np.array(colour))


def _hand(points: NDArray[np.float64], height: int, width: int) -> Iterator[_Stroke]:
    pixels = _truncate(points * (width, height))  # (n, 21, 2)
    thickness = _thickness(height, width)
    seen = np.all(pixels >= 1, axis=-1)
    frame, edge = np.nonzero(seen[:, HAND_EDGES].all(axis=-1))
    start, end = pixels[frame, HAND_EDGES[edge, 0]], pixels[frame, HAND_EDGES[edge, 1]]
    lines = raster.draw_lines(start, end, thickness, height=height, width=width)
    yield _Stroke(frame[lines.owner], lines.x, lines.y, HAND_COLOURS[edge[lines.owner]])
    yield _dots(pixels, seen, thickness, HAND_DOT, height, width)


def _face(points: NDArray[np.float64], height: int, width: int) -> _Stroke:
    pixels = _truncate(points[:, FACE_POINTS] * (width, height))
    seen = np.all(pixels >= 1, axis=-1)
    return _dots(pixels, seen, _thickness(height, width), FACE_DOT, height, width)


def _dots(
    pixels: Ints, seen: NDArray[np.bool_], radius: int, colour: tuple[int, int, int], height: int, width: int
) -> _Stroke:
    dots = raster.draw_discs(pixels[seen], radius, height=height, width=width)
    return _stroke(dots, np.nonzero(seen)[0], np.array(colour))


def _stroke(pixels: Pixels, frame: Ints, colour: NDArray[np.float64] | Ints) -> _Stroke:
    """All `pixels` in one colour, truncated to bytes; `frame` is that of each shape."""
    colours = np.broadcast_to(colour.astype(np.uint8), (len(pixels.x), 3))
    return _Stroke(frame[pixels.owner], pixels.x, pixels.y, colours)


def _thickness(height: int, width: int) -> int:
    return min(max(min(height, width) // 300, 1), 2)


def _truncate(values: NDArray[np.float64]) -> Ints:
    return values.astype(np.int64)  # towards zero, like Python's int()
