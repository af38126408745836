"""From the pixels of a reference image and a pose video to what the encoders read, exactly as the official code.

It runs on the CPU, as there: another device's bicubic differs in the last bit, and rounding makes that a whole level.

Source: zai-org/SCAIL, `sampling_main` in sample_video.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scail.errors import GenerationError
from scail.geometry import cover_size

FRAMES_PER_CHUNK = 16  # bounds the float copy of the pose video while it is resized


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


def to_frames(pixels: Tensor) -> NDArray[np.uint8]:
    """Decoded pixels (1, 3, F, H, W) as uint8 (F, H, W, 3); truncated, not rounded, as officially written.

    Raises:
        GenerationError: If a pixel is no number; as a level it would be black.
    """
    if not torch.isfinite(pixels).all():
        raise GenerationError(f"{int((~torch.isfinite(pixels)).sum())} decoded values are not finite.")
    levels = ((pixels[0].float() + 1) / 2).clamp(0, 1) * 255
    frames: NDArray[np.uint8] = levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames


def _cover(pixels: Tensor, height: int, width: int) -> Tensor:
    size = cover_size(pixels.shape[-2], pixels.shape[-1], height, width)
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def _centre_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
