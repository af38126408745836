"""Procedural motion: joint angles as functions of time, and the joints in space that follow from them.

Body axes, in millimetres: x to the person's left, which is the picture's right when they face the camera, y down,
z away from the camera. Angles are in radians. A motion is a cycle; it says how the joints turn at a phase of 0 … 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scail.errors import InvalidInputError
from scail.pose.skeleton import NUM_JOINTS

Array = NDArray[np.float64]

# SMPL's 24 joints: parent, and the offset from it in a body of 1.70 m that stands with its arms down.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
OFFSETS: Array = np.array(
    [
        (0, 0, 0),
        *((65, 85, 0), (-65, 85, 0), (0, -115, 10)),  # hips, lower spine
        *((25, 385, 0), (-25, 385, 0), (0, -135, -5)),  # knees, middle spine
        *((0, 400, 20), (0, 400, 20), (0, -55, 0)),  # ankles, upper spine
        *((0, 60, -110), (0, 60, -110), (0, -215, 10)),  # feet, neck
        *((75, -115, 0), (-75, -115, 0), (0, -105, -30)),  # collars, head
        *((105, 5, 0), (-105, 5, 0), (30, 255, 0), (-30, 255, 0)),  # shoulders, elbows
        *((10, 245, -10), (-10, 245, -10), (0, 80, 0), (0, 80, 0)),  # wrists, hands
    ],
    np.float64,
)
L_HIP, R_HIP, SPINE, L_KNEE, R_KNEE, CHEST, L_FOOT, R_FOOT, NECK = 1, 2, 3, 4, 5, 6, 10, 11, 12
L_SHOULDER, R_SHOULDER, L_ELBOW, R_ELBOW = 16, 17, 18, 19
X, Y, Z = 0, 1, 2


@dataclass(frozen=True)
class Turn:
    """One joint turns about one body axis by an angle for each frame."""

    joint: int
    axis: int
    angles: Array  # (T,)


@dataclass(frozen=True)
class Movement:
    """What a motion asks for: turns in the order in which they are applied, and where the pelvis goes."""

    turns: tuple[Turn, ...]
    yaw: Array  # (T,), the whole body about the vertical
    lift: Array  # (T,), of the pelvis, in millimetres, up


def walk(phase: Array) -> Movement:
    swing = np.sin(_cycle(phase))
    bent = 0.25 + 0.45 * np.clip(np.sin(_cycle(phase) + math.pi / 2), 0, 1)
    bent_other = 0.25 + 0.45 * np.clip(np.sin(_cycle(phase) - math.pi / 2), 0, 1)
    turns = (
        *_pitches({L_HIP: -0.55 * swing, R_HIP: 0.55 * swing, L_KNEE: bent, R_KNEE: bent_other}),
        *_pitches({L_SHOULDER: 0.6 * swing, R_SHOULDER: -0.6 * swing}),
        *_pitches({L_ELBOW: -0.35 - 0.2 * swing, R_ELBOW: -0.35 + 0.2 * swing}),
    )
    return Movement(turns, 0.12 * swing, 18 * np.cos(2 * _cycle(phase)))


def wave(phase: Array) -> Movement:
    beat = np.sin(2 * _cycle(phase))
    still = np.zeros_like(phase)
    turns = (
        Turn(R_SHOULDER, Z, 2.35 + 0.15 * beat),
        Turn(R_ELBOW, Z, 0.45 + 0.5 * beat),
        Turn(L_SHOULDER, Z, -0.15 + 0.05 * beat),
        Turn(SPINE, Z, 0.06 * np.sin(_cycle(phase))),
    )
    return Movement(turns, 0.15 * np.sin(_cycle(phase)), still)


def squat(phase: Array) -> Movement:
    depth = 0.5 - 0.5 * np.cos(_cycle(phase))
    leg = 1.35 * depth
    turns = (
        *_pitches({L_HIP: -leg, R_HIP: -leg, L_KNEE: 1.9 * leg, R_KNEE: 1.9 * leg, SPINE: 0.45 * leg}),
        *_pitches({L_SHOULDER: -1.35 * depth, R_SHOULDER: -1.35 * depth}),
    )
    lowered = 385 * (1 - np.cos(leg)) + 400 * (1 - np.cos(0.9 * leg))
    return Movement(turns, np.zeros_like(phase), -lowered)


def kick(phase: Array) -> Movement:
    strike = np.clip(np.sin(_cycle(phase)), 0, 1) ** 2
    wind_up = np.clip(-np.sin(_cycle(phase)), 0, 1) ** 2
    turns = (
        *_pitches({R_HIP: 0.5 * wind_up - 1.5 * strike, R_KNEE: 1.2 * wind_up + 0.15 * strike}),
        *_pitches({L_KNEE: 0.2 * (strike + wind_up), SPINE: -0.2 * strike}),
        Turn(L_SHOULDER, Z, -0.5 - 0.6 * strike),
        Turn(R_SHOULDER, Z, 0.5 + 0.6 * strike),
    )
    return Movement(turns, 0.35 * (wind_up - strike), -25 * (strike + wind_up))


def turn(phase: Array) -> Movement:
    sway = np.sin(_cycle(phase))
    turns = (
        Turn(L_SHOULDER, Z, -0.6 - 0.25 * sway),
        Turn(R_SHOULDER, Z, 0.6 - 0.25 * sway),
        *_pitches({L_KNEE: 0.15 + 0.1 * sway, R_KNEE: 0.15 - 0.1 * sway}),
    )
    return Movement(turns, _cycle(phase), 10 * np.cos(2 * _cycle(phase)))


def dance(phase: Array) -> Movement:
    beat, half_beat = np.sin(2 * _cycle(phase)), np.sin(_cycle(phase))
    turns = (
        Turn(SPINE, Z, 0.18 * half_beat),
        Turn(L_SHOULDER, Z, -1.5 - 0.9 * beat),
        Turn(R_SHOULDER, Z, 1.5 - 0.9 * beat),
        Turn(L_ELBOW, Z, -0.8 + 0.5 * half_beat),
        Turn(R_ELBOW, Z, 0.8 + 0.5 * half_beat),
        Turn(L_HIP, Z, -0.18 - 0.12 * half_beat),
        Turn(R_HIP, Z, 0.18 - 0.12 * half_beat),
        *_pitches({L_KNEE: 0.35 + 0.3 * beat, R_KNEE: 0.35 - 0.3 * beat, L_HIP: -0.2 * beat, R_HIP: 0.2 * beat}),
    )
    return Movement(turns, 0.4 * half_beat, 30 * np.abs(beat) - 40)


MOTIONS: dict[str, Callable[[Array], Movement]] = {
    "walk": walk,
    "wave": wave,
    "squat": squat,
    "kick": kick,
    "turn": turn,
    "dance": dance,
}


def joints_of_motion(
    name: str,
    num_frames: int,
    *,
    cycles: float = 1.0,
    phase: float = 0.0,
    yaw: float = 0.0,
    centre: tuple[float, float, float] = (0.0, 0.0, 3300.0),
    proportions: Array | None = None,
) -> NDArray[np.float32]:
    """Joints of one body that performs a motion.

    Args:
        name: One of `MOTIONS`.
        num_frames: Frames T.
        cycles: How often the motion repeats within them.
        phase: Where in its cycle it begins, 0 … 1.
        yaw: How far the body is turned from facing the camera.
        centre: Camera millimetres of the middle of the standing body.
        proportions: (24,) length of each bone as a share of the default one.

    Returns:
        float32 (T, 24, 3), camera millimetres.

    Raises:
        InvalidInputError: If there is no such motion.
    """
    if name not in MOTIONS:
        raise InvalidInputError(f"motion is {name!r}; expected one of {', '.join(MOTIONS)}.")
    movement = MOTIONS[name](phase + cycles * np.arange(num_frames) / num_frames)
    offsets = OFFSETS * (1.0 if proportions is None else proportions[:, None])
    rotations = np.broadcast_to(np.eye(3), (num_frames, NUM_JOINTS, 3, 3)).copy()
    rotations[:, 0] = _rotation(Y, movement.yaw + yaw)
    for item in movement.turns:
        rotations[:, item.joint] = rotations[:, item.joint] @ _rotation(item.axis, item.angles)
    joints = _forward(offsets, rotations)
    joints[..., Y] -= movement.lift[:, None]
    return (joints + np.asarray(centre)).astype(np.float32)


def _forward(offsets: Array, rotations: Array) -> Array:
    """Joints (T, 24, 3), the middle of the standing body at the origin."""
    positions = np.zeros((*rotations.shape[:2], 3))
    world = rotations.copy()
    for joint, parent in enumerate(PARENTS):
        if parent >= 0:
            world[:, joint] = world[:, parent] @ rotations[:, joint]
            positions[:, joint] = positions[:, parent] + world[:, parent] @ offsets[joint]
    return positions


def _rotation(axis: int, angles: Array) -> Array:
    """Rotation matrices (T, 3, 3); a positive pitch about x takes a hanging limb backwards."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrices = np.zeros((len(angles), 3, 3))
    matrices[:, axis, axis] = 1.0
    matrices[:, first, first] = matrices[:, second, second] = np.cos(angles)
    matrices[:, second, first] = np.sin(angles)
    matrices[:, first, second] = -np.sin(angles)
    return matrices


def _pitches(angles: dict[int, Array]) -> tuple[Turn, ...]:
    return tuple(Turn(joint, X, angle) for joint, angle in angles.items())


def _cycle(phase: Array) -> Array:
    return 2 * math.pi * phase
