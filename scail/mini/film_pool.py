"""Drawn clips kept in the device's memory as bytes, of which training batches are cut.

Most of a picture is background. So batches are pieces of a pool of long clips: shorter, smaller, around a place where
somebody is, mirrored, and with the colours' channels exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scail.mini.data import Size, draw_scenes, halve_pose_pictures, render_film, render_pose_pictures
from scail.mini.renewal import Renewal

NUM_PLACES = 48  # remembered of each clip
DRAWN_TOGETHER = 16
CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class FilmKind:
    """What a pool holds: characters, or pose pictures at half the size."""

    size: Size  # of the clips before pose pictures are halved
    num_frames: int
    num_clips: int
    pose: bool = False


class Films(NamedTuple):
    """N clips of a pool."""

    levels: Tensor  # uint8 (N, T, H, W, 3)
    places: Tensor  # (N, NUM_PLACES, 3): frame, row and column of pixels where somebody is


class FilmPool:
    """Clips of one kind; the oldest are renewed first."""

    def __init__(self, kind: FilmKind, seed: tuple[int, ...], device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.renewal = Renewal(kind.num_clips, seed, self._draw, drawn_together=DRAWN_TOGETHER)
        self.films = Films(*self.renewal.values)

    def renew(self, num_clips: int) -> None:
        """Draw new clips in place of the oldest."""
        self.renewal.renew(num_clips)

    def cut(self, num_clips: int, num_frames: int, size: Size) -> Tensor:
        """Pieces (B, 3, T, h, w) in -1 … 1 around places where somebody is."""
        clip = self._choose(self.kind.num_clips, num_clips)
        place = self.films.places[clip, self._choose(NUM_PLACES, num_clips)]  # (B, 3)
        lengths = (num_frames, *size)
        indices = []
        for axis, length in enumerate(lengths):
            room = self.films.levels.shape[1 + axis] - length
            jitter = self._choose(length // 2 + 1, num_clips) - length // 4
            start = (place[:, axis] - length // 2 + jitter).clamp(0, room)
            indices.append(start[:, None] + torch.arange(length, device=self.device))
        frame, row, column = indices
        pieces = self.films.levels[
            clip[:, None, None, None], frame[:, :, None, None], row[:, None, :, None], column[:, None, None, :]
        ]  # (B, T, h, w, 3)
        mirrored = torch.rand(num_clips, 1, 1, 1, 1, device=self.device) < 0.5
        pieces = torch.where(mirrored, pieces.flip(3), pieces)
        if not self.kind.pose:
            orders = torch.tensor(CHANNEL_ORDERS, device=self.device)[self._choose(len(CHANNEL_ORDERS), num_clips)]
            pieces = pieces.gather(-1, orders[:, None, None, None].expand_as(pieces))
        return (pieces.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)

    def _choose(self, below: int, num: int) -> Tensor:
        return torch.randint(below, (num,), device=self.device)

    def _draw(self, seed: int, num_clips: int) -> Films:
        kind = self.kind
        scenes = draw_scenes(
            seed, num_clips, num_frames=kind.num_frames, size=kind.size, held_out=False, device=self.device
        )
        if kind.pose:
            pixels = halve_pose_pictures(render_pose_pictures(scenes))
            somebody = pixels.amax(dim=1) > -1  # (N, T, H, W)
        else:
            film = render_film(scenes)
            pixels, somebody = film.pixels, film.person >= 0
        levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        return Films(levels.contiguous(), _draw_places(somebody))


def _draw_places(somebody: Tensor) -> Tensor:
    """Random true pixels (N, NUM_PLACES, 3) of masks (N, T, H, W), to four pixels exactly; any, where none is true."""
    coarse = F.max_pool3d(somebody.float(), (1, 4, 4))
    chosen = torch.multinomial(coarse.flatten(1) + 1e-6, NUM_PLACES, replacement=True)
    _, _, height, width = coarse.shape
    frame, cell = chosen // (height * width), chosen % (height * width)
    return torch.stack((frame, 4 * (cell // width) + 2, 4 * (cell % width) + 2), dim=-1)
