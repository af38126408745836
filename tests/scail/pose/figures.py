"""Figures to render: a standing person, turned and moved, and a plain marcher to compare with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scail.pose.camera import default_intrinsics
from scail.pose.skeleton import BONE_JOINTS, NUM_JOINTS, Keypoints2D, PoseSequence

STANDING: dict[int, tuple[float, float, float]] = {
    0: (0, 5, 0),
    1: (90, 0, 0),
    2: (-90, 0, 0),
    4: (100, 400, 10),
    5: (-100, 400, 10),
    7: (100, 800, 40),
    8: (-100, 800, 40),
    12: (0, -500, 0),
    15: (0, -700, -30),
    16: (180, -480, 0),
    17: (-180, -480, 0),
    18: (250, -220, 30),
    19: (-250, -220, 30),
    20: (260, 20, -60),
    21: (-260, 20, -60),
}


def person(x: float = 0.0, y: float = 0.0, z: float = 2500.0, *, turn: float = 0.0) -> NDArray[np.float32]:
    """Joints (24, 3) of someone who stands at a point and is turned about the vertical, in radians."""
    joints = np.zeros((NUM_JOINTS, 3))
    for joint, place in STANDING.items():
        joints[joint] = place
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    moved = joints @ rotation.T + (x, y, z)
    moved[~joints.any(axis=1)] = 0  # joints that no bone uses stay unknown
    return moved.astype(np.float32)


def clip(*frames: NDArray[np.float32], height: int = 64, width: int = 112, **fields) -> PoseSequence:
    """One person a frame."""
    return PoseSequence(np.stack(frames)[:, None], height, width, **fields)


def walk(num_frames: int = 9, **fields) -> PoseSequence:
    """Someone who walks across the picture, away from the camera, and turns."""
    steps = np.linspace(0, 1, num_frames)
    return clip(*(person(-600 + 1200 * u, 0, 2000 + 2000 * u, turn=3 * u) for u in steps), **fields)


def single_bone(start: tuple[float, float, float], end: tuple[float, float, float]) -> NDArray[np.float32]:
    """Joints (24, 3) of which only the left shin is known: a bone of colour 170, 0, 255."""
    joints = np.zeros((NUM_JOINTS, 3), np.float32)
    joints[4], joints[7] = start, end
    return joints


def unseen_keypoints(num_frames: int, num_persons: int) -> Keypoints2D:
    shape = (num_frames, num_persons)
    return Keypoints2D(
        np.full((*shape, 24, 2), -1.0),
        np.full((*shape, 24), -1.0),
        np.full((*shape, 2, 21, 2), -1.0),
        np.full((*shape, 68, 2), -1.0),
    )


def march(joints: NDArray[np.float32], height: int, width: int) -> NDArray[np.bool_]:
    """Silhouette (H, W) of joints (P, 24, 3), found the slow way: 300 steps of the distance to the nearest bone."""
    matrix = default_intrinsics(height, width)
    rows, columns = np.mgrid[:height, :width]
    x, y = (columns - matrix[0, 2]) / matrix[0, 0], (rows - matrix[1, 2]) / matrix[1, 1]
    rays = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    bones = joints[:, BONE_JOINTS].reshape(-1, 2, 3).astype(np.float64)
    bones = bones[(bones.sum(axis=2) != 0).all(axis=1)]
    travelled, hit = np.full(len(rays), 0.1), np.zeros(len(rays), bool)
    for _ in range(300):
        walking = np.flatnonzero(~hit & (travelled < 10_000))
        points = rays[walking] * travelled[walking, None]
        distance = np.min([_distance(points, start, end) for start, end in bones], axis=0)
        hit[walking] = distance < 1e-3
        travelled[walking] += np.where(distance < 1e-3, 0, distance)
    return hit.reshape(height, width)


def _distance(points: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    bone = end - start
    along = np.clip((points - start) @ bone / max(float(bone @ bone), 1e-12), 0, 1)
    return np.linalg.norm(points - start - along[:, None] * bone, axis=1) - 21.5
