"""From the pixels of a reference image and a pose video to what the encoders read, exactly as the official code.

It runs on the CPU, as there: another device's bicubic differs in the last bit, and rounding makes that a whole level.

Source: zai-org/SCAIL, `sampling_main` in sample_video.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scail.config import MAX_FRAMES
from scail.errors import GenerationError, InvalidInputError
from scail.geometry import check_size, cover_size, target_size
from scail.types import ClipPixels

FRAMES_PER_CHUNK = 16  # bounds the float copy of the pose video while it is resized


def clip_pixels(
    reference: NDArray[np.uint8], pose: NDArray[np.uint8], size: tuple[int, int] | None = None
) -> ClipPixels:
    """What a clip's encoders read, of its pictures as they came; takes no GPU.

    Args:
        reference: uint8 (H, W, 3), RGB: the character.
        pose: uint8 (F, H, W, 3), RGB: the rendered pose video, 1 to 81 frames.
        size: (height, width), multiples of 32; the official rule by the reference's orientation if absent.

    Raises:
        InvalidInputError: If sizes, types or frame counts do not fit.
    """
    _check_pictures(reference, pose)
    height, width = size or target_size(*reference.shape[:2])
    check_size(height, width)
    return ClipPixels(reference_pixels(reference, height, width), pose_pixels(pose, height, width))


def reference_pixels(image: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Reference as the encoders read it.

    Args:
        image: uint8 (H, W, 3), RGB.
        height: Rows of the clip.
        width: Columns of the clip.

    Returns:
        Float32 (1, 3, 1, height, width), about -1 … 1: bicubic overshoot is kept, as the official code keeps it.
    """
    pixels = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255 * 2 - 1  # (1, 3, H, W)
    return _centre_crop(_cover(pixels, height, width), height, width)[:, :, None]


def pose_pixels(frames: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Pose video as the VAE reads it, at half the clip's size.

    Args:
        frames: uint8 (F, H, W, 3), RGB.
        height: Rows of the clip; the pose gets half.
        width: Columns of the clip; the pose gets half.

    Returns:
        Float32 (1, 3, F, height / 2, width / 2) in -1 … 1.
    """
    chunks = np.array_split(frames, range(FRAMES_PER_CHUNK, len(frames), FRAMES_PER_CHUNK))
    halves = torch.cat([halve_pose(crop_pose(chunk, height, width)) for chunk in chunks])
    return halves.transpose(0, 1)[None]


def crop_pose(frames: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """uint8 (F, 3, height, width): resized as uint8, so rounded and clamped before the crop."""
    pixels = torch.tensor(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if pixels.shape[-2:] != cover_size(frames.shape[1], frames.shape[2], height, width):
        pixels = _cover(pixels.float(), height, width).clamp(0, 255).round().to(torch.uint8)
    return _centre_crop(pixels, height, width)


def halve_pose(cropped: Tensor) -> Tensor:
    """Float32 (F, 3, H / 2, W / 2) in -1 … 1. Halving bilinearly without antialias is the mean of 2 × 2 pixels."""
    return F.avg_pool2d((cropped.float() - 127.5) / 127.5, kernel_size=2)


def to_frames(pieces: Iterable[Tensor]) -> Iterator[NDArray[np.uint8]]:
    """Decoded pixels (1, 3, n, H, W), piece by piece, as uint8 (n, H, W, 3); truncated, not rounded, as officially.

    A piece is waited for after the next one has been asked for, so that a GPU never waits for its copy.

    Raises:
        GenerationError: If a pixel is no number; as a level it would be black.
    """
    ahead: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None
    for pixels in pieces:
        levels = ((pixels[0].float() + 1) / 2).clamp(0, 1) * 255
        frames = levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().to("cpu", non_blocking=True)
        num_bad = (~torch.isfinite(pixels)).sum().to("cpu", non_blocking=True)
        event = torch.cuda.current_stream(pixels.device).record_event() if pixels.is_cuda else None
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = frames, num_bad, event
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(frames: Tensor, num_bad: Tensor, event: torch.cuda.Event | None) -> NDArray[np.uint8]:
    if event is not None:
        event.synchronize()
    if num_bad:
        raise GenerationError(f"{int(num_bad)} decoded values are not finite.")
    array: NDArray[np.uint8] = frames.numpy()
    return array


def _check_pictures(reference: NDArray[np.uint8], pose: NDArray[np.uint8]) -> None:
    for name, array, num_axes in (("reference", reference, 3), ("pose", pose, 4)):
        if array.dtype != np.uint8 or array.ndim != num_axes or array.shape[-1] != 3 or 0 in array.shape:
            axes = "(H, W, 3)" if num_axes == 3 else "(F, H, W, 3)"
            raise InvalidInputError(f"{name} is {array.dtype} {array.shape}; expected uint8 {axes}, not empty.")
    if len(pose) > MAX_FRAMES:
        raise InvalidInputError(f"pose has {len(pose)} frames; a clip has at most {MAX_FRAMES}.")


def _cover(pixels: Tensor, height: int, width: int) -> Tensor:
    size = cover_size(pixels.shape[-2], pixels.shape[-1], height, width)
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def _centre_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
