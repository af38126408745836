"""Alignment: a camera under which the driving person stands where the reference image's person does, and as tall.

Nobody's bones change length. A wider or narrower field of view and a moved principal point take the neck and the legs
– or, where legs are hidden, the shoulders, the elbows and the nose – to where the reference has them, as nearly as
two scales and two shifts can. Hands, face and cheeks, which are drawn in 2D, move along with the head and the wrists.

Source: zai-org/SCAIL-Pose, NLFPoseExtract/align3d.py and process_pose.py (`--use_align`). Its general solver stops
short of the best camera at times; ours does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scail.errors import InvalidInputError
from scail.pose.camera import project
from scail.pose.skeleton import JOINT_OF_SLOT, LEFT, NOSE, RIGHT, Keypoints2D, PoseSequence, slots_from_joints

Array = NDArray[np.float64]

NECK = 1  # slots
LOWER = (9, 10, 12, 13)  # knees and ankles
UPPER = (0, 2, 3, 5, 6)  # nose, shoulders, elbows
NECK_WEIGHT_WITH_LEGS, LEG_WEIGHT = 1.0, 4.0
NECK_WEIGHT, UPPER_WEIGHT = 8.0, 1.0
SCALE_BOUNDS = (0.7, 1.4)  # of the focal length
STRETCH_BOUNDS = (0.8, 1.15)  # of its vertical part against its horizontal one
FACE_SCALE_BOUNDS = (0.8, 1.5)

HEAD_JOINT, WRIST_JOINTS = 15, {LEFT: 20, RIGHT: 21}
NOSE_LANDMARK, WRIST_POINT = 30, 0
NEAREST = 0.01  # mm; what is nearer has no place in the picture
MAX_ASPECT_DIFFERENCE = 0.01

_TIE = 1e-3  # square pixels for a scale that is off by one: decides where the points leave it open
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 48  # of a search by the golden section: to 1e-10 of where it began


@dataclass(frozen=True)
class CameraFit:
    """A camera, and how well it does.

    Attributes:
        intrinsics: float64 (3, 3).
        scale_x, scale_y: Of the focal lengths, against those of the camera before.
        cost: Weighted sum of squared distances, in square pixels.
    """

    intrinsics: Array
    scale_x: float
    scale_y: float
    cost: float


def align_to_reference(sequence: PoseSequence, reference: PoseSequence) -> PoseSequence:
    """The first person of `sequence`, seen by a camera that puts them where the reference's first person is.

    Args:
        sequence: The driving motion.
        reference: Its first frame's 2D points are those of the reference image, which was cropped as the driving
            video was; it needs no joints in space.

    Raises:
        InvalidInputError: If the pictures' proportions differ, the reference has no 2D points, or no frame of the
            motion shows enough of what the reference shows.
    """
    _check_reference(sequence, reference)
    assert reference.keypoints is not None
    height, width = sequence.height, sequence.width
    target = reference.keypoints
    slots, frame = _shared_slots(sequence, target)
    fit = fit_camera(
        slots_from_joints(sequence.joints[frame, 0])[list(slots)].astype(np.float64),
        target.candidate[0, 0, list(slots)] * (width, height),
        _weights(slots),
        sequence.camera_matrix,
        height=height,
        width=width,
    )
    moved = None
    if sequence.keypoints is not None:
        scale = face_scale(sequence.keypoints.faces[frame, 0], target.faces[0, 0])
        moved = move_keypoints(_first_person(sequence.keypoints), sequence, fit, face_scale=scale)
    return replace(sequence, joints=sequence.joints[:, :1], intrinsics=fit.intrinsics, keypoints=moved)


def fit_camera(
    points: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any], intrinsics: Array, *, height: int, width: int
) -> CameraFit:
    """The camera under which `points` come nearest to `targets`: a box-bounded least-squares problem, solved exactly.

    Horizontally the camera has a scale m and a shift p, vertically the scale m · s and a shift q; m is within
    `SCALE_BOUNDS`, s within `STRETCH_BOUNDS`, p and q within a picture. For given scales the best shifts are means, and
    what is left is convex in the scales.

    Args:
        points: (N, 3), millimetres in front of the camera.
        targets: (N, 2), pixels.
        weights: (N,).
        intrinsics: The camera before, (3, 3).
        height, width: Of the picture, in pixels.
    """
    focal, centre = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    rays = focal * points[:, :2] / points[:, 2:]  # in pixels, from the principal point
    wanted = targets - centre

    def shift(axis: int, scale: float) -> float:
        limit = (width, height)[axis]
        mean = np.average(wanted[:, axis] - scale * rays[:, axis], weights=weights)
        return float(np.clip(mean, -limit, limit))

    def cost(axis: int, scale: float) -> float:
        apart = scale * rays[:, axis] + shift(axis, scale) - wanted[:, axis]
        return float(weights @ apart**2) + _TIE * (scale - 1) ** 2

    def vertical(scale_x: float) -> float:
        low, high = STRETCH_BOUNDS
        return _least(lambda scale: cost(1, scale), low * scale_x, high * scale_x)

    scale_x = _least(lambda scale: cost(0, scale) + cost(1, vertical(scale)), *SCALE_BOUNDS)
    scale_y = vertical(scale_x)
    fitted = intrinsics.copy()
    fitted[[0, 1], [0, 1]] = focal * (scale_x, scale_y)
    fitted[:2, 2] = centre[0] + shift(0, scale_x), centre[1] + shift(1, scale_y)
    apart = project(points, fitted) - targets
    return CameraFit(fitted, scale_x, scale_y, float(weights @ (apart**2).sum(axis=1)))


def face_scale(driving: Array, reference: Array) -> float:
    """How much larger the reference's face is, by the mean distance of its landmarks (68, 2) to the tip of the nose.

    Landmarks that either does not show do not count; 1 if too few are left to say.
    """
    both = _is_seen(driving) & _is_seen(reference)
    if not both[NOSE_LANDMARK] or both.sum() < 2:
        return 1.0
    spans = [np.linalg.norm(face[both] - face[NOSE_LANDMARK], axis=-1).mean() for face in (reference, driving)]
    return float(np.clip(spans[0] / spans[1], *FACE_SCALE_BOUNDS)) if spans[1] else 1.0


def move_keypoints(
    keypoints: Keypoints2D, sequence: PoseSequence, fit: CameraFit, *, face_scale: float = 1.0
) -> Keypoints2D:
    """The 2D points of one person under another camera; points that were not seen stay -1.

    Face and body points grow by `face_scale` about the tip of the nose and move with the head, each hand grows with
    the camera about its wrist and moves with it.

    Args:
        keypoints: Of one person.
        sequence: Whose first person's joints say how far head and wrists move, and from which camera.
        fit: The other camera.
        face_scale: From the function of this name.
    """
    size = np.array((sequence.width, sequence.height), np.float64)

    def shift(joint: int) -> Array:
        """(T, 1, 2), as fractions of the picture."""
        points = sequence.joints[:, 0, joint]
        moved = project(points, fit.intrinsics) - project(points, sequence.camera_matrix)
        return np.where(points[:, 2:] > NEAREST, moved, 0.0)[:, None] / size

    hands = [
        _scaled(keypoints.hands[:, 0, side], WRIST_POINT, (fit.scale_x, fit.scale_y), shift(joint))
        for side, joint in WRIST_JOINTS.items()
    ]
    scale, of_head = (face_scale, face_scale), shift(HEAD_JOINT)
    return Keypoints2D(
        candidate=_scaled(keypoints.candidate[:, 0], NOSE, scale, of_head)[:, None],
        subset=keypoints.subset,
        hands=np.stack(hands, axis=1)[:, None],
        faces=_scaled(keypoints.faces[:, 0], NOSE_LANDMARK, scale, of_head)[:, None],
    )


def _check_reference(sequence: PoseSequence, reference: PoseSequence) -> None:
    if reference.keypoints is None or not _is_seen(reference.keypoints.candidate[0, 0]).any():
        raise InvalidInputError("the reference has no 2D points of a person; the alignment goes by them.")
    ours, theirs = sequence.width / sequence.height, reference.width / reference.height
    if abs(ours / theirs - 1) > MAX_ASPECT_DIFFERENCE:
        raise InvalidInputError(
            f"the reference is {reference.height}x{reference.width} and the motion "
            f"{sequence.height}x{sequence.width}; both must be cropped to the same proportions first."
        )


def _shared_slots(sequence: PoseSequence, target: Keypoints2D) -> tuple[tuple[int, ...], int]:
    """The slots that the fit goes by, the neck first, and the first frame of the motion in which they are known."""
    known = sequence.joint_mask[:, 0, list(JOINT_OF_SLOT)] & (sequence.joints[:, 0, list(JOINT_OF_SLOT), 2] > NEAREST)
    seen = target.subset[0, 0] != -1
    for frame, of_frame in enumerate(known):
        lower, upper = ([slot for slot in part if seen[slot] and of_frame[slot]] for part in (LOWER, UPPER))
        # The neck serves even where its confidence was low, but not where there is none.
        if not of_frame[NECK] or not _is_seen(target.candidate[0, 0, NECK]):
            continue
        if len(lower) == len(LOWER):
            return (NECK, *lower), frame
        if len(upper) >= 2:
            return (NECK, *upper), frame
    raise InvalidInputError(
        "the reference and the motion share too little to be aligned: expected the neck, and both knees and ankles, or "
        "two of nose, shoulders and elbows, in the reference's 2D points and in a frame's joints."
    )


def _weights(slots: tuple[int, ...]) -> Array:
    with_legs = slots[1:] == LOWER
    neck, others = (NECK_WEIGHT_WITH_LEGS, LEG_WEIGHT) if with_legs else (NECK_WEIGHT, UPPER_WEIGHT)
    return np.array([neck, *[others] * (len(slots) - 1)])


def _least(cost: Callable[[float], float], low: float, high: float) -> float:
    """Where a convex function is least, by the golden section."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    cost_left, cost_right = cost(left), cost(right)
    for _ in range(_STEPS):
        if cost_left <= cost_right:
            high, right, cost_right = right, left, cost_left
            left = high - _GOLDEN * (high - low)
            cost_left = cost(left)
        else:
            low, left, cost_left = left, right, cost_right
            right = low + _GOLDEN * (high - low)
            cost_right = cost(right)
    return (low + high) / 2


def _first_person(keypoints: Keypoints2D) -> Keypoints2D:
    return Keypoints2D(*(value[:, :1] for value in vars(keypoints).values()))


def _scaled(points: Array, about: int, scale: tuple[float, float], shift: Array) -> Array:
    """Points (T, N, 2) scaled about one of their own, where that was seen, and shifted; others stay as they are."""
    seen = _is_seen(points)
    origin = points[:, about : about + 1]
    factors = np.where(seen[:, about, None, None], scale, 1.0)
    return np.where(seen[..., None], origin + factors * (points - origin) + shift, points)


def _is_seen(points: Array) -> NDArray[np.bool_]:
    """Of points (..., 2); one that was not seen is -1, one beside the picture is negative."""
    seen: NDArray[np.bool_] = (points != -1).any(axis=-1)
    return seen
