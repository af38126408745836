"""The skeleton as data: joints, slots, bones, colours, and the value that carries a clip of them.

Two numberings meet here. Joints in space are SMPL's 24; the renderer and the alignment speak of OpenPose's 18 slots,
of which 14 have a joint. Left and right are the person's own.

Source: zai-org/SCAIL-Pose, NLFPoseExtract/nlf_render.py (joints, bones, palettes) and DWPoseProcess (2D layout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scail.errors import InvalidInputError
from scail.pose.camera import default_intrinsics

NUM_JOINTS = 24
NUM_SLOTS = 18
POSE_FPS = 16.0  # the official renders are written at 16 fps whatever the driving clip's rate

# slot ← SMPL joint; slots 14 to 17 (eyes and ears) have no joint in space
JOINT_OF_SLOT: tuple[int, ...] = (15, 12, 17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7)

RGB = tuple[int, int, int]


class Bone(NamedTuple):
    """One capsule; `single`, `first` and `second` are its colours by palette and person."""

    name: str
    start: int  # slot
    end: int  # slot
    single: RGB
    first: RGB
    second: RGB


# The order decides ties: where two capsules share the sphere of a joint, the earlier bone is seen.
BONES: tuple[Bone, ...] = (
    Bone("right shoulder", 1, 2, (255, 0, 0), (255, 150, 150), (255, 20, 20)),
    Bone("right upper arm", 2, 3, (255, 85, 0), (255, 180, 140), (255, 60, 0)),
    Bone("right forearm", 3, 4, (255, 170, 0), (255, 215, 150), (255, 110, 0)),
    Bone("left shoulder", 1, 5, (0, 255, 255), (180, 230, 240), (0, 230, 255)),
    Bone("left upper arm", 5, 6, (0, 170, 255), (160, 200, 255), (0, 130, 255)),
    Bone("left forearm", 6, 7, (0, 85, 255), (100, 120, 255), (0, 70, 255)),
    Bone("right torso", 1, 8, (180, 255, 0), (200, 255, 100), (160, 255, 40)),
    Bone("right thigh", 8, 9, (0, 255, 0), (100, 255, 100), (0, 255, 50)),
    Bone("right shin", 9, 10, (0, 255, 85), (140, 255, 180), (0, 255, 100)),
    Bone("left torso", 1, 11, (0, 0, 255), (120, 140, 255), (0, 0, 255)),
    Bone("left thigh", 11, 12, (85, 0, 255), (180, 90, 255), (80, 0, 255)),
    Bone("left shin", 12, 13, (170, 0, 255), (190, 120, 255), (160, 0, 255)),
    Bone("neck", 1, 0, (150, 150, 150), (210, 210, 210), (130, 130, 130)),
)

BONE_JOINTS: NDArray[np.int64] = np.array([(JOINT_OF_SLOT[b.start], JOINT_OF_SLOT[b.end]) for b in BONES])

# Colours of the first, second, … person; whoever comes after the last row shares it.
PALETTES: dict[str, NDArray[np.float64]] = {
    "single": np.array([[b.single for b in BONES]], np.float64),
    "multi": np.array([[b.first for b in BONES], [b.second for b in BONES]], np.float64),
}

# 2D layout: 18 OpenPose body points and 6 feet; 68 face landmarks; 21 points a hand
NUM_BODY_POINTS, NUM_FACE_POINTS, NUM_HAND_POINTS = 24, 68, 21
LEFT, RIGHT = 0, 1  # axis 2 of `Keypoints2D.hands`
NOSE, RIGHT_EYE, LEFT_EYE, RIGHT_EAR, LEFT_EAR = 0, 14, 15, 16, 17


@dataclass(frozen=True)
class Keypoints2D:
    """What a 2D pose network saw; x and y as fractions of the width and height, -1 where it saw nothing.

    Attributes:
        candidate: (T, P, 24, 2) body points and feet; positions are kept where the confidence was low.
        subset: (T, P, 24) a point's own index, or -1 where it is not to be trusted.
        hands: (T, P, 2, 21, 2); the left hand is first.
        faces: (T, P, 68, 2).
    """

    candidate: NDArray[np.float64]
    subset: NDArray[np.float64]
    hands: NDArray[np.float64]
    faces: NDArray[np.float64]

    def __post_init__(self) -> None:
        clip = self.candidate.shape[:2]
        _check_shape("candidate", self.candidate, (*clip, NUM_BODY_POINTS, 2))
        _check_shape("subset", self.subset, (*clip, NUM_BODY_POINTS))
        _check_shape("hands", self.hands, (*clip, 2, NUM_HAND_POINTS, 2))
        _check_shape("faces", self.faces, (*clip, NUM_FACE_POINTS, 2))
        for name, values in vars(self).items():
            if not np.isfinite(values).all():
                raise InvalidInputError(f"{name} is not finite everywhere; a point that was not seen is -1.")

    def frames(self, start: int, stop: int) -> Keypoints2D:
        part = slice(start, stop)
        return Keypoints2D(self.candidate[part], self.subset[part], self.hands[part], self.faces[part])


@dataclass(frozen=True)
class PoseSequence:
    """The motion of P persons over T frames.

    Attributes:
        joints: float32 (T, P, 24, 3), SMPL joints in camera millimetres. A missing joint is exact zeros, and so is
            every joint of a person who is not in the frame.
        height, width: Size of the frame that `intrinsics` and the 2D fractions refer to.
        fps: Frames per second of the pose video.
        intrinsics: float64 (3, 3) pinhole matrix in pixels; left out, 55 degrees over the larger side.
        keypoints: Hands, face and head points, or None for bones alone.

    Raises:
        InvalidInputError: If shapes disagree, a joint is not finite, or a size or rate is not positive.
    """

    joints: NDArray[np.float32]
    height: int
    width: int
    fps: float = POSE_FPS
    intrinsics: NDArray[np.float64] | None = None
    keypoints: Keypoints2D | None = None

    def __post_init__(self) -> None:
        if self.joints.ndim != 4 or self.joints.shape[2:] != (NUM_JOINTS, 3) or 0 in self.joints.shape:
            raise InvalidInputError(
                f"joints have shape {self.joints.shape}; expected (T, P, {NUM_JOINTS}, 3) with T and P positive."
            )
        if not np.isfinite(self.joints).all():
            frame = int(np.argwhere(~np.isfinite(self.joints))[0, 0])
            raise InvalidInputError(f"joints of frame {frame} are not finite; a missing joint is exact zeros.")
        if min(self.height, self.width) < 1 or not self.fps > 0:
            raise InvalidInputError(
                f"pose is {self.height}x{self.width} at {self.fps} fps; height, width and fps must be positive."
            )
        if self.keypoints is not None and self.keypoints.candidate.shape[:2] != self.joints.shape[:2]:
            raise InvalidInputError(
                f"2D key points are for (frames, persons) {self.keypoints.candidate.shape[:2]}, "
                f"joints for {self.joints.shape[:2]}."
            )
        if self.intrinsics is not None:
            _check_shape("intrinsics", self.intrinsics, (3, 3))

    @property
    def num_frames(self) -> int:
        return self.joints.shape[0]

    @property
    def num_persons(self) -> int:
        return self.joints.shape[1]

    @property
    def camera_matrix(self) -> NDArray[np.float64]:
        return default_intrinsics(self.height, self.width) if self.intrinsics is None else self.intrinsics

    @property
    def joint_mask(self) -> NDArray[np.bool_]:
        """(T, P, 24), True where a joint is known.

        The official test is kept to the letter: a joint counts as missing when its coordinates sum to exactly zero.
        """
        return self.joints.sum(axis=-1, dtype=np.float32) != 0

    @property
    def bone_mask(self) -> NDArray[np.bool_]:
        """(T, P, 13), True where both ends of a bone are known."""
        return np.all(self.joint_mask[:, :, BONE_JOINTS], axis=-1)


def slots_from_joints(joints: NDArray[np.float32]) -> NDArray[np.float32]:
    """SMPL joints (..., 24, 3) in OpenPose's slots (..., 18, 3); the four slots without a joint are zeros."""
    slots = np.zeros((*joints.shape[:-2], NUM_SLOTS, 3), joints.dtype)
    slots[..., : len(JOINT_OF_SLOT), :] = joints[..., JOINT_OF_SLOT, :]
    return slots


def hands_by_person(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hands by person (T, P, 2, 21, 2) from DWPose's rows (T, 2P, 21, 2), all left hands first, then all right.

    This is the only place that knows DWPose's order; taking rows 2i and 2i + 1 for person i gives one person two
    left hands as soon as there are two.
    """
    if rows.ndim != 4 or rows.shape[1] % 2:
        raise InvalidInputError(f"hand rows have shape {rows.shape}; expected (T, 2P, {NUM_HAND_POINTS}, 2).")
    num_frames, num_rows = rows.shape[:2]
    return rows.reshape(num_frames, 2, num_rows // 2, *rows.shape[2:]).swapaxes(1, 2)


def _check_shape(name: str, value: NDArray[Any], expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise InvalidInputError(f"{name} has shape {value.shape}; expected {expected}.")
