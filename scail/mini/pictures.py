"""Strips to look at: what was given, what was wanted and what came."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_rows(path: Path, rows: list[list[Tensor]]) -> None:
    """Write pictures, each (3, H, W) in -1 … 1, side by side in rows, smaller ones enlarged to the rows' height."""
    height = max(picture.shape[1] for row in rows for picture in row)
    lines = [torch.cat([_enlarged(picture.float().cpu(), height) for picture in row], dim=2) for row in rows]
    levels = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(path, optimize=True)


def frames_of(clip: Tensor, num_frames: int = 3) -> list[Tensor]:
    """First, last and evenly between of a clip (3, T, H, W)."""
    positions = torch.linspace(0, clip.shape[1] - 1, num_frames).round().long()
    return [clip[:, int(position)] for position in positions]


def _enlarged(picture: Tensor, height: int) -> Tensor:
    factor = max(1, height // picture.shape[1])
    return picture.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
