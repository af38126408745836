"""Procedural motion: joint angles as functions of time, and the joints in space that follow from them.

Body axes, in millimetres: x to the person's left, which is the picture's right when they face the camera, y down,
z away from the camera. Angles are in radians. A motion is a cycle; it says how the joints turn at a phase of 0 … 1.
Everything works on batches: phases are (..., T), and clips differ along the leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
LOWER_BODY = (L_HIP, R_HIP, L_KNEE, R_KNEE, 7, 8, L_FOOT, R_FOOT)
X, Y, Z = 0, 1, 2


@dataclass(frozen=True)
class Turn:
    """One joint turns about one body axis by an angle for each frame."""

    joint: int
    axis: int
    angles: Tensor  # (..., T)


@dataclass(frozen=True)
class Movement:
    """What a motion asks for: each joint turns at most once about an axis; and where the pelvis goes."""

    turns: tuple[Turn, ...]
    yaw: Tensor  # (..., T), the whole body about the vertical
    lift: Tensor  # (..., T), of the pelvis, in millimetres, up

    @property
    def angles(self) -> Tensor:
        """(..., T, 24, 3): of each joint about x, y and z; the pelvis has the yaw."""
        angles = self.yaw.new_zeros(*self.yaw.shape, NUM_JOINTS, 3)
        for turn in self.turns:
            angles[..., turn.joint, turn.axis] = turn.angles
        angles[..., 0, Y] = self.yaw
        return angles


def walk(phase: Tensor) -> Movement:
    swing = _cycle(phase).sin()
    bent = 0.25 + 0.45 * (_cycle(phase) + math.pi / 2).sin().clamp(0, 1)
    bent_other = 0.25 + 0.45 * (_cycle(phase) - math.pi / 2).sin().clamp(0, 1)
    turns = (
        *_pitches({L_HIP: -0.55 * swing, R_HIP: 0.55 * swing, L_KNEE: bent, R_KNEE: bent_other}),
        *_pitches({L_SHOULDER: 0.6 * swing, R_SHOULDER: -0.6 * swing}),
        *_pitches({L_ELBOW: -0.35 - 0.2 * swing, R_ELBOW: -0.35 + 0.2 * swing}),
    )
    return Movement(turns, 0.12 * swing, 18 * (2 * _cycle(phase)).cos())


def wave(phase: Tensor) -> Movement:
    beat = (2 * _cycle(phase)).sin()
    turns = (
        Turn(R_SHOULDER, Z, 2.35 + 0.15 * beat),
        Turn(R_ELBOW, Z, 0.45 + 0.5 * beat),
        Turn(L_SHOULDER, Z, -0.15 + 0.05 * beat),
        Turn(SPINE, Z, 0.06 * _cycle(phase).sin()),
    )
    return Movement(turns, 0.15 * _cycle(phase).sin(), torch.zeros_like(phase))


def squat(phase: Tensor) -> Movement:
    depth = 0.5 - 0.5 * _cycle(phase).cos()
    leg = 1.35 * depth
    turns = (
        *_pitches({L_HIP: -leg, R_HIP: -leg, L_KNEE: 1.9 * leg, R_KNEE: 1.9 * leg, SPINE: 0.45 * leg}),
        *_pitches({L_SHOULDER: -1.35 * depth, R_SHOULDER: -1.35 * depth}),
    )
    lowered = 385 * (1 - leg.cos()) + 400 * (1 - (0.9 * leg).cos())
    return Movement(turns, torch.zeros_like(phase), -lowered)


def kick(phase: Tensor) -> Movement:
    strike = _cycle(phase).sin().clamp(0, 1) ** 2
    wind_up = (-_cycle(phase).sin()).clamp(0, 1) ** 2
    turns = (
        *_pitches({R_HIP: 0.5 * wind_up - 1.5 * strike, R_KNEE: 1.2 * wind_up + 0.15 * strike}),
        *_pitches({L_KNEE: 0.2 * (strike + wind_up), SPINE: -0.2 * strike}),
        Turn(L_SHOULDER, Z, -0.5 - 0.6 * strike),
        Turn(R_SHOULDER, Z, 0.5 + 0.6 * strike),
    )
    return Movement(turns, 0.35 * (wind_up - strike), -25 * (strike + wind_up))


def turn(phase: Tensor) -> Movement:
    sway = _cycle(phase).sin()
    turns = (
        Turn(L_SHOULDER, Z, -0.6 - 0.25 * sway),
        Turn(R_SHOULDER, Z, 0.6 - 0.25 * sway),
        *_pitches({L_KNEE: 0.15 + 0.1 * sway, R_KNEE: 0.15 - 0.1 * sway}),
    )
    return Movement(turns, _cycle(phase), 10 * (2 * _cycle(phase)).cos())


def dance(phase: Tensor) -> Movement:
    beat, half_beat = (2 * _cycle(phase)).sin(), _cycle(phase).sin()
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
    return Movement(turns, 0.4 * half_beat, 30 * beat.abs() - 40)


MOTIONS: dict[str, Callable[[Tensor], Movement]] = {
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
    movement = MOTIONS[name](phase + cycles * torch.arange(num_frames, dtype=torch.float64) / num_frames)
    angles = movement.angles
    angles[:, 0, Y] += yaw
    shares = torch.ones(NUM_JOINTS, dtype=torch.float64) if proportions is None else torch.from_numpy(proportions)
    pelvis = torch.tensor(centre, dtype=torch.float64).repeat(num_frames, 1)
    pelvis[:, Y] -= movement.lift
    joints: NDArray[np.float32] = joints_from_angles(angles, pelvis, shares).float().numpy()
    return joints


def joints_from_angles(angles: Tensor, pelvis: Tensor, proportions: Tensor) -> Tensor:
    """Joints of bodies whose joints are turned.

    Args:
        angles: (..., T, 24, 3) about x, y and z, applied in this order; a positive pitch about x takes a hanging limb
            backwards. In float64: a GPU may round float32 products to TF32.
        pelvis: (..., T, 3), where the pelvis is.
        proportions: (..., 24), length of each bone as a share of the default one.

    Returns:
        (..., T, 24, 3), in millimetres.
    """
    about_x, about_y, about_z = (_rotations(axis, angles[..., axis]) for axis in (X, Y, Z))
    rotations = (about_z @ about_y @ about_x).unbind(-3)
    offsets = torch.as_tensor(OFFSETS, device=angles.device) * proportions[..., None]
    world, joints = [rotations[0]], [pelvis]
    for joint, parent in enumerate(PARENTS[1:], start=1):
        world.append(world[parent] @ rotations[joint])
        offset = offsets[..., None, joint, :, None]  # (..., 1, 3, 1), the same in every frame
        joints.append(joints[parent] + (world[parent] @ offset).squeeze(-1))
    return torch.stack(joints, dim=-2)


def _rotations(axis: int, angles: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) about one axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrices = angles.new_zeros(*angles.shape, 3, 3)
    matrices[..., axis, axis] = 1.0
    matrices[..., first, first] = matrices[..., second, second] = angles.cos()
    matrices[..., second, first] = angles.sin()
    matrices[..., first, second] = -angles.sin()
    return matrices


def _pitches(angles: dict[int, Tensor]) -> tuple[Turn, ...]:
    return tuple(Turn(joint, X, angle) for joint, angle in angles.items())


def _cycle(phase: Tensor) -> Tensor:
    return 2 * math.pi * phase
