"""Procedural characters: proportions, clothes, colours and the capsules that they are drawn with.

Clothes are named by hues, so that a prompt can speak of them. One pair of shirt and trousers in eight is never shown in
training: those are the held-out characters.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scail.mini.caster import Capsules
from scail.pose.skeleton import NUM_JOINTS

Array = NDArray[np.float64]
Vector = tuple[float, float, float]

HUES = (
    "red", "orange", "yellow", "lime", "green", "mint", "cyan", "sky blue", "blue", "purple", "magenta", "pink",
)  # fmt: skip
SKINS = ((0.96, 0.80, 0.69), (0.88, 0.68, 0.54), (0.72, 0.51, 0.38), (0.50, 0.34, 0.25), (0.34, 0.23, 0.18))
HAIRS = (
    (0.08, 0.07, 0.07), (0.25, 0.15, 0.09), (0.48, 0.30, 0.14), (0.85, 0.70, 0.38), (0.62, 0.25, 0.12),
    (0.75, 0.75, 0.78),
)  # fmt: skip

GARMENTS = (
    "skin", "hair", "eyes", "shirt", "emblem", "trousers", "shoes",
    "left upper arm", "right upper arm", "left forearm", "right forearm",
    "left thigh", "right thigh", "left shin", "right shin",
)  # fmt: skip
LIMBS = GARMENTS[7:]

HELD_OUT_REST = 3  # of shirt + 5 · trousers by 8


class Part(NamedTuple):
    """A capsule between two joints, each end moved by millimetres to the body's left, up and forward."""

    start: int
    end: int
    radius: float
    garment: str
    start_offset: Vector = (0, 0, 0)
    end_offset: Vector = (0, 0, 0)


PARTS = (
    Part(1, 2, 88, "trousers"),
    Part(0, 6, 98, "shirt"),
    Part(13, 14, 86, "shirt"),
    Part(13, 1, 70, "shirt", end_offset=(0, 60, 0)),
    Part(14, 2, 70, "shirt", end_offset=(0, 60, 0)),
    Part(9, 9, 52, "emblem", (0, 0, 68), (0, 0, 68)),
    Part(1, 4, 74, "left thigh"),
    Part(2, 5, 74, "right thigh"),
    Part(4, 7, 54, "left shin"),
    Part(5, 8, 54, "right shin"),
    Part(7, 10, 46, "shoes"),
    Part(8, 11, 46, "shoes"),
    Part(16, 18, 50, "left upper arm"),
    Part(17, 19, 50, "right upper arm"),
    Part(18, 20, 40, "left forearm"),
    Part(19, 21, 40, "right forearm"),
    Part(20, 22, 38, "skin"),
    Part(21, 23, 38, "skin"),
    Part(12, 15, 46, "skin"),
    Part(15, 15, 100, "skin", (0, 55, 0), (0, 70, 0)),
    Part(15, 15, 17, "eyes", (38, 70, 88), (38, 70, 88)),
    Part(15, 15, 17, "eyes", (-38, 70, 88), (-38, 70, 88)),
    Part(15, 15, 102, "hair", (0, 95, -22), (0, 95, -22)),
    Part(15, 12, 72, "hair", (0, 60, -48), (0, 0, -75)),  # long hair; hidden in the neck where it is short
)
_LONG_HAIR = len(PARTS) - 1
_FAT = np.array([part.garment not in ("eyes", "hair", "skin", "emblem") for part in PARTS])


@dataclass(frozen=True)
class Characters:
    """M characters."""

    proportions: Tensor  # (M, 24), length of each bone as a share of the default one
    radii: Tensor  # (M, parts), millimetres
    colours: Tensor  # (M, garments, 3), 0 … 1
    shirt: NDArray[np.int64]  # (M,), index of the hue
    trousers: NDArray[np.int64]

    def to(self, device: torch.device) -> Characters:
        return Characters(
            self.proportions.to(device), self.radii.to(device), self.colours.to(device), self.shirt, self.trousers
        )


def draw_characters(rng: np.random.Generator, num: int, *, held_out: bool) -> Characters:
    """Random characters, of the training's or of the held-out clothes."""
    shirt, trousers = draw_clothes(rng, num, held_out=held_out)
    return Characters(
        torch.from_numpy(_proportions(rng, num)),
        torch.from_numpy(_radii(rng, num)),
        torch.from_numpy(_colours(rng, shirt, trousers)),
        shirt,
        trousers,
    )


def draw_clothes(rng: np.random.Generator, num: int, *, held_out: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hues of shirts and trousers, each (num,)."""
    shirt, trousers = rng.integers(0, len(HUES), (2, num))
    if held_out:
        trousers = 5 * (HELD_OUT_REST - shirt) % 8  # 5 is its own inverse modulo 8
        upper = (trousers + 8 < len(HUES)) & (rng.random(num) < 0.5)
        return shirt, trousers + 8 * upper
    return shirt, np.where(is_held_out_pair(shirt, trousers), (trousers + 1) % len(HUES), trousers)


def is_held_out_pair(shirt: NDArray[np.int64], trousers: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (shirt + 5 * trousers) % 8 == HELD_OUT_REST


def describe(characters: Characters, index: int) -> str:
    shirt, trousers = HUES[characters.shirt[index]], HUES[characters.trousers[index]]
    return f"{'an' if shirt[0] in 'aeiou' else 'a'} {shirt} shirt and {trousers} trousers"


def body_capsules(characters: Characters, joints: Tensor) -> Capsules:
    """Capsules of characters in their poses.

    Args:
        characters: M of them.
        joints: (M, T, 24, 3).

    Returns:
        M · T · parts capsules in this order; `image` counts (M, T).
    """
    starts, ends = (torch.tensor([part[i] for part in PARTS], device=joints.device) for i in (0, 1))
    offsets = torch.tensor(
        [(part.start_offset, part.end_offset) for part in PARTS], dtype=joints.dtype, device=joints.device
    )  # (parts, 2, 3)
    frame = _body_frame(joints)  # (M, T, 3, 3)
    moved = (offsets[..., None] * frame[:, :, None, None]).sum(-2)  # (M, T, parts, 2, 3)
    start, end = joints[:, :, starts] + moved[..., 0, :], joints[:, :, ends] + moved[..., 1, :]
    radius = characters.radii.to(joints.dtype)[:, None].expand(start.shape[:-1])
    image = torch.arange(joints.shape[0] * joints.shape[1], device=joints.device).repeat_interleave(len(PARTS))
    return Capsules(image, start.flatten(0, 2), end.flatten(0, 2), radius.flatten())


def _body_frame(joints: Tensor) -> Tensor:
    """Unit vectors to the body's left, up and forward, stacked as rows (M, T, 3, 3)."""
    up = _unit(joints[:, :, 12] - joints[:, :, 3])
    left = joints[:, :, 16] - joints[:, :, 17]
    left = _unit(left - (left * up).sum(-1, keepdim=True) * up)
    return torch.stack((left, up, torch.linalg.cross(left, up)), dim=-2)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _proportions(rng: np.random.Generator, num: int) -> Array:
    whole, leg, arm, trunk, shoulders = (
        rng.uniform(low, high, (num, 1))
        for low, high in ((0.85, 1.1), (0.9, 1.1), (0.88, 1.1), (0.92, 1.1), (0.85, 1.2))
    )
    shares = np.ones((num, NUM_JOINTS))
    for joints, share in (
        ((4, 5, 7, 8), leg),
        ((18, 19, 20, 21), arm),
        ((3, 6, 9, 12), trunk),
        ((13, 14, 16, 17), shoulders),
    ):
        shares[:, joints] *= share
    return shares * whole


def _radii(rng: np.random.Generator, num: int) -> Array:
    radii = np.tile(np.array([part.radius for part in PARTS], np.float64), (num, 1))
    build = rng.uniform(0.85, 1.25, (num, 1))
    radii[:, _FAT] *= build * rng.uniform(0.93, 1.07, (num, int(_FAT.sum())))
    radii[:, ~_FAT] *= rng.uniform(0.95, 1.12, (num, 1))
    radii[rng.random(num) < 0.5, _LONG_HAIR] = 20.0
    return radii


def _colours(rng: np.random.Generator, shirt: NDArray[np.int64], trousers: NDArray[np.int64]) -> Array:
    """(num, garments, 3). Sleeves and legs may be short, and now and then a limb has a colour of its own."""
    num = len(shirt)
    colours = np.empty((num, len(GARMENTS), 3))
    index = {name: position for position, name in enumerate(GARMENTS)}
    colours[:, index["skin"]] = np.array(SKINS)[rng.integers(0, len(SKINS), num)]
    colours[:, index["hair"]] = np.array(HAIRS)[rng.integers(0, len(HAIRS), num)]
    colours[:, index["eyes"]] = 0.07
    colours[:, index["shirt"]] = _dyes(rng, shirt)
    colours[:, index["trousers"]] = _dyes(rng, trousers)
    accent = _dyes(rng, rng.integers(0, len(HUES), num))
    shoes = rng.random((num, 1)) * np.array([0.9, 0.88, 0.85])
    colours[:, index["shoes"]] = shoes
    plain = rng.random((num, 1)) < 0.4
    colours[:, index["emblem"]] = np.where(plain, colours[:, index["shirt"]], accent)
    short_sleeves, short_legs = rng.random((2, num, 1)) < 0.45
    for side in ("left", "right"):
        own_arm, own_leg = rng.random((2, num, 1)) < 0.15
        skin, sleeve, leg = (colours[:, index[name]] for name in ("skin", "shirt", "trousers"))
        sleeve, leg = np.where(own_arm, accent, sleeve), np.where(own_leg, accent, leg)
        colours[:, index[f"{side} upper arm"]] = sleeve
        colours[:, index[f"{side} forearm"]] = np.where(short_sleeves, skin, sleeve)
        colours[:, index[f"{side} thigh"]] = leg
        colours[:, index[f"{side} shin"]] = np.where(short_legs, skin, leg)
    return colours.clip(0.02, 1.0)


def _dyes(rng: np.random.Generator, hues: NDArray[np.int64]) -> Array:
    """Colours (num, 3) of named hues, from pale to dark."""
    jitter, saturation, value = rng.uniform((-0.025, 0.5, 0.4), (0.025, 0.95, 0.98), (len(hues), 3)).T
    turns = (hues / len(HUES) + jitter) % 1.0
    return np.array([colorsys.hsv_to_rgb(*dye) for dye in zip(turns, saturation, value, strict=True)])
