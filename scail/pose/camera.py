"""The pinhole camera of the pose side: at the origin, looking along +z, pixels at integer coordinates.

Source: zai-org/SCAIL-Pose; NLF assumes a field of view of 55 degrees over the larger side of the picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIELD_OF_VIEW = math.radians(55.0)


def default_intrinsics(height: int, width: int) -> NDArray[np.float64]:
    """The matrix (3, 3) that NLF assumes: 860.60 px of focal length for 896 px, principal point W/2, H/2."""
    focal = max(height, width) / (2.0 * math.tan(FIELD_OF_VIEW / 2.0))
    return np.array([[focal, 0.0, width / 2.0], [0.0, focal, height / 2.0], [0.0, 0.0, 1.0]])


def scale_intrinsics(
    intrinsics: NDArray[np.float64], *, from_size: tuple[int, int], to_size: tuple[int, int]
) -> NDArray[np.float64]:
    """The matrix for the same view in another size; sizes are (height, width)."""
    scale_y, scale_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return np.diag([scale_x, scale_y, 1.0]) @ intrinsics


def project(points: NDArray[Any], intrinsics: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels (..., 2) of camera points (..., 3); NaN for points that are not in front of the camera."""
    depth = np.where(points[..., 2] > 0, points[..., 2], np.nan).astype(np.float64)
    focal, centre = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    return focal * points[..., :2] / depth[..., None] + centre
