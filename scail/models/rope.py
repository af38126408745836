"""Rotary position embedding over time, height and width.

A head is split into three parts, time, height, width in this order; inside a part adjacent pairs (even, odd) rotate.
Reference tokens stand at t = 0, video and pose tokens at t = 1 … f. Pose tokens cover cells of 2 × 2 video tokens,
`pose_rope_offset` columns to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from scail.config import TransformerConfig


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines, each (L, head_size / 2), float32: one entry for each rotated pair of a token."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        return RotaryTable(self.cos.to(device, dtype), self.sin.to(device, dtype))


@lru_cache(maxsize=6)
def kept_rotary_table(
    config: TransformerConfig, num_frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> RotaryTable:
    """`rotary_table`, on a device; 25 MB there for a long clip. Those of the last few sizes stay.

    Made anew it costs the processor as much as some steps of a small model, and its copy makes it wait for the GPU.
    """
    with torch.inference_mode(mode=False):  # training may use it too
        return rotary_table(config, num_frames, height, width).to(device, dtype)


def rotary_table(config: TransformerConfig, num_frames: int, height: int, width: int) -> RotaryTable:
    """The table of a whole sequence: reference, video and pose tokens.

    Args:
        config: Gives the head size, theta and the offset of the pose.
        num_frames: Latent frames f of the clip.
        height: Rows of the token grid, even.
        width: Columns of the token grid, even.

    Source: the rotary mixin of zai-org/SCAIL; it is float32 throughout, and so is this, to the last bit of an angle.
    """
    parts = [
        reference_rotary(config, height, width),
        video_rotary(config, num_frames, height, width),
        pose_rotary(config, num_frames, height, width),
    ]
    return RotaryTable(torch.cat([part.cos for part in parts]), torch.cat([part.sin for part in parts]))


def reference_rotary(config: TransformerConfig, height: int, width: int) -> RotaryTable:
    """(h·w, head_size / 2): the grid at t = 0."""
    angles = _grid_angles(config, torch.zeros(1), torch.arange(height), torch.arange(width))
    return _flat(angles.cos(), angles.sin())


def video_rotary(config: TransformerConfig, num_frames: int, height: int, width: int) -> RotaryTable:
    """(f·h·w, head_size / 2): the grid at t = 1 … f."""
    angles = _grid_angles(config, torch.arange(1, num_frames + 1), torch.arange(height), torch.arange(width))
    return _flat(angles.cos(), angles.sin())


def pose_rotary(config: TransformerConfig, num_frames: int, height: int, width: int) -> RotaryTable:
    """(f·h·w / 4, head_size / 2): cosines and sines averaged over 2 × 2 cells of the full grid.

    The average of unit rotations is shorter than one; the official model was trained with it so, not renormalised.
    """
    columns = torch.arange(width) + config.pose_rope_offset
    angles = _grid_angles(config, torch.arange(1, num_frames + 1), torch.arange(height), columns)
    return _flat(_pool(angles.cos()), _pool(angles.sin()))


def _grid_angles(config: TransformerConfig, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Angles (f, h, w, head_size / 2)."""
    space_size = 2 * (config.head_size // 6)
    time_size = config.head_size - 2 * space_size
    f, h, w = len(frames), len(rows), len(columns)
    time = _axis_angles(frames, time_size, config.rope_theta)[:, None, None].expand(f, h, w, -1)
    row = _axis_angles(rows, space_size, config.rope_theta)[None, :, None].expand(f, h, w, -1)
    column = _axis_angles(columns, space_size, config.rope_theta)[None, None, :].expand(f, h, w, -1)
    return torch.cat((time, row, column), dim=-1)


def _axis_angles(positions: Tensor, size: int, theta: float) -> Tensor:
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return positions.float()[:, None] * frequencies


def _pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x.movedim(-1, 1), kernel_size=2).movedim(1, -1)  # (f, h / 2, w / 2, head_size / 2)


def _flat(cos: Tensor, sin: Tensor) -> RotaryTable:
    return RotaryTable(rearrange(cos, "f h w d -> (f h w) d"), rearrange(sin, "f h w d -> (f h w) d"))
