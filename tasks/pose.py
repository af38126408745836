"""What `scail pose render` runs: the pose renderer of `scail.pose` on local files."""

from __future__ import annotations

from pathlib import Path

from scail.errors import ScailError
from tasks.errors import RefusedError
from tasks.resident import choose_device
from tasks.settings import Settings


def render_pose_video(joints: Path, video: Path, *, height: int | None, width: int | None, two_persons: bool) -> int:
    """Write the pose video of a pose file, and return the number of its frames.

    Raises:
        RefusedError: If the file cannot be read, only one side is given, or the video cannot be written.
    """
    from scail.pose.io import render_to_mp4

    if (height is None) != (width is None):
        raise RefusedError("height and width go together: give both or neither")
    size = None if height is None or width is None else (height, width)
    device, _ = choose_device(Settings().device, "float32")
    try:
        return render_to_mp4(joints, video, size=size, palette="multi" if two_persons else "single", device=device)
    except ScailError as error:
        raise RefusedError(str(error)) from error
