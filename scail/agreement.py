"""Whether a clip moves as its pose video does: at the same times, at the same places, or in the same directions.

Seen in two ways, either of which is enough. *When and where*: how much each block changes. That needs no detail, and a
soft clip passes; but a background that moves changes too. *Whereto*: the optical flow under the pose's own sticks. That
does not see the background at all, so a camera may move; but it needs edges. What is wrong in both does not follow.

Pictures are thin copies of frames as `scail.quality` takes them: float32 in levels, (F, h, w, 3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BLOCK = 8  # pixels of a side
CELL = 4  # likewise, of the grid on which flow is taken: a limb moves by less than one or two from frame to frame
MOVING_LEVEL = 3.0  # a block of the pose video that changes by more has moved
POSE_LEVEL = 24.0  # a cell of the pose video that is brighter shows the pose; the rest of it is black
FLAT = 8.0  # squared levels a cell: where gradients are weaker, flow is taken for slow


def motion_agreement(thin: Array, thin_pose: Array) -> float | None:
    """-1 … 1, around 0 for a clip that has nothing to do with its pose; None if the pose does not move."""
    pose_blocks = block_means(thin_pose)
    if not has_moved(pose_blocks).any():
        return None
    return max(_agreement_of_change(block_means(thin), pose_blocks), _agreement_of_flow(thin, thin_pose))


def block_means(thin: Array, size: int = BLOCK) -> Array:
    num, height, width = len(thin), thin.shape[1] // size, thin.shape[2] // size
    tiles = thin[:, : height * size, : width * size].reshape(num, height, size, width, size, 3)
    return tiles.mean(axis=(2, 4))


def has_moved(pose_blocks: Array) -> NDArray[np.bool_]:
    """(F - 1,): whether the pose of a frame is not that of the frame before."""
    moved: NDArray[np.bool_] = _change(pose_blocks).max(axis=(1, 2)) > MOVING_LEVEL
    return moved


def _agreement_of_change(blocks: Array, pose_blocks: Array) -> float:
    """Correlation, over blocks and frames, of how much more or less than usually a block changes.

    What changes everywhere at once, as flicker does, is no motion and is taken off first. The root keeps one bright
    sleeve from outweighing the rest of a figure. Each block's own mean is taken off, since a figure is where its pose
    is whatever it does there. Means over 3 × 3 blocks, since a body is broader than the sticks that it follows.
    """
    change, wanted = _change(blocks), _change(pose_blocks)
    change = (change - np.median(change, axis=(1, 2), keepdims=True)).clip(min=0)
    own, other = (np.sqrt(_around(values, 1)) for values in (change, wanted))
    return _cosine(own - own.mean(axis=0), other - other.mean(axis=0))


def _agreement_of_flow(thin: Array, thin_pose: Array) -> float:
    """Cosine of the flow in the clip and in the pose video, over the cells that show the pose."""
    cells, pose_cells = (block_means(values, CELL) for values in (thin, thin_pose))
    shown = pose_cells.max(axis=-1) > POSE_LEVEL
    there = (shown[1:] | shown[:-1])[..., None]
    own, other = (_rooted(_flow(values)) * there for values in (cells, pose_cells))  # one fast hand is not all
    return _cosine(own, other)


def _change(blocks: Array) -> Array:
    """(F - 1, h, w): of the colour that changes most."""
    return np.abs(np.diff(blocks, axis=0)).max(axis=-1)


def _flow(cells: Array) -> Array:
    """(F - 1, h, w, 2): cells a frame down and to the right, by least squares over 5 × 5 cells (Lucas, Kanade 1981)."""
    middle, change = (cells[1:] + cells[:-1]) / 2, np.diff(cells, axis=0)
    down, right = np.gradient(middle, axis=(1, 2))
    products = ((down, down), (down, right), (right, right), (down, change), (right, change))
    dd, dr, rr, dt, rt = (_around((a * b).sum(axis=-1), 2) for a, b in products)
    dd, rr = dd + FLAT, rr + FLAT
    flow = np.stack((dr * rt - rr * dt, dr * dt - dd * rt), axis=-1) / (dd * rr - dr * dr)[..., None]
    return flow.astype(np.float32)


def _rooted(flow: Array) -> Array:
    """Of the same direction, as long as the root of the length."""
    return flow / (np.square(flow).sum(axis=-1, keepdims=True) + 1e-6) ** 0.25


def _around(values: Array, radius: int) -> Array:
    """Means of (T, h, w) over squares of 2 · `radius` + 1; beyond the border is 0."""
    for axis in (1, 2):
        length = values.shape[axis]
        padded = np.pad(values, [(radius, radius) if axis == side else (0, 0) for side in range(3)])
        shifted = [padded.take(range(start, start + length), axis=axis) for start in range(2 * radius + 1)]
        values = np.mean(shifted, axis=0, dtype=np.float32)
    return values


def _cosine(own: Array, other: Array) -> float:
    """0 where either is nothing: what does not move follows nobody."""
    size = float(np.sqrt(np.square(own).sum(dtype=np.float64) * np.square(other).sum(dtype=np.float64)))
    return float((own * other).sum(dtype=np.float64)) / size if size else 0.0
