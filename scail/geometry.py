"""Sizes: which one a clip gets, how much of a picture a crop keeps. No torch: planning and probing use it too.

Source: zai-org/SCAIL, `sampling_main` in sample_video.py.
"""

from __future__ import annotations

from scail.config import DEFAULT_SIZE, SIZE_MULTIPLE
from scail.errors import InvalidInputError


def target_size(
    reference_height: int, reference_width: int, short_and_long: tuple[int, int] = DEFAULT_SIZE
) -> tuple[int, int]:
    """(height, width) of a clip: landscape if the reference is, portrait otherwise, squares included."""
    short, long = short_and_long
    return (short, long) if reference_height < reference_width else (long, short)


def check_size(height: int, width: int) -> None:
    """Refuse what the official network crashes on.

    Raises:
        InvalidInputError: If a side is not a positive multiple of 32.
    """
    if height < SIZE_MULTIPLE or width < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise InvalidInputError(
            f"size is {height} x {width} (height x width); both must be multiples of {SIZE_MULTIPLE}."
        )


def cover_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """(height, width) after scaling a picture until it covers the target; the longer side is cut off, not rounded."""
    if width / height > target_width / target_height:
        return target_height, int(width * target_height / height)
    return int(height * target_width / width), target_width


def kept_share(height: int, width: int, target_height: int, target_width: int) -> float:
    """Share of a picture's area that is left after the centre crop to the target."""
    cover_height, cover_width = cover_size(height, width, target_height, target_width)
    return target_height * target_width / (cover_height * cover_width)
