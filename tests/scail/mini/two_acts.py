"""Two characters who move differently, and whether a clip of the miniature is the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from scail.mini.data import PORTRAIT, Film, draw_scenes
from scail.mini.evaluate import ClipInput, Frames, clip_inputs, exchanged_film, limb_delta_e, limb_errors, signed

NUM_FRAMES = 5
MUCH_NEARER = 0.6  # the miniature is at about 0.3 for limbs, at 0.15 for colours; a clip that ignores its input is at 1


@dataclass(frozen=True)
class TwoActs:
    """Held-out characters `first` and `second`, and the truth of the first one doing what the second one does."""

    first: ClipInput
    second: ClipInput
    exchanged: Film


@cache
def two_acts() -> TwoActs:
    scenes = draw_scenes(1, 6, num_frames=NUM_FRAMES, size=PORTRAIT, held_out=True, device=torch.device("cpu"))
    alone = np.flatnonzero(np.bincount(scenes.clip.numpy()) == 1)
    inputs = clip_inputs(scenes)
    return TwoActs(inputs[alone[0]], inputs[alone[1]], exchanged_film(scenes, alone[0], alone[1]))


def follows(clip: Frames, own: Film, other: Film) -> bool:
    """Are the limbs much nearer to where they are in `own` than to where they are in `other`?"""
    pixels = signed(clip)
    return limb_errors(pixels, own)[0] < MUCH_NEARER * limb_errors(pixels, other)[0]


def is_dressed_as(clip: Frames, truth: Film, own: Film, other: Film) -> bool:
    """Are the colours of the limbs much nearer to those of the reference `own` than to those of `other`?"""
    pixels = signed(clip)
    return limb_delta_e(pixels, truth, own) < MUCH_NEARER * limb_delta_e(pixels, truth, other)
