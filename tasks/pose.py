"""What `scail pose render` runs: the pose renderer of `scail.pose` on local files."""

from __future__ import annotations

from pathlib import Path

from scail.errors import ScailError
from tasks.errors import RefusedError
from tasks.resident import choose_device
from tasks.settings import Settings


def render_pose_video(
    joints: Path,
    video: Path,
    *,
    height: int | None,
    width: int | None,
    two_persons: bool = False,
    align_to: Path | None = None,
) -> int:
    """Write the pose video of a pose file, and return the number of its frames.

    Raises:
        RefusedError: If a file cannot be read, only one side is given, two persons are to be aligned, which one
            camera cannot do, or the video cannot be written.
    """
    from scail.pose.io import render_to_mp4

    if (height is None) != (width is None):
        raise RefusedError("height and width go together: give both or neither")
    if two_persons and align_to is not None:
        raise RefusedError("one camera aligns one person: give a reference or two persons, not both")
    size = None if height is None or width is None else (height, width)
    device, _ = choose_device(Settings().device, "float32")
    try:
        return render_to_mp4(
            joints,
            video,
            size=size,
            palette="multi" if two_persons else "single",
            align_to=align_to,
            device=device,
        )
    except ScailError as error:
        raise RefusedError(str(error)) from error
