"""Draws the demo's references and pose videos: `python manifests/demo/make_inputs.py`. Nothing here is footage.

The characters wear clothes that the miniature never saw in training. A reference shows its character in another pose
than the videos; the videos are rendered by `scail.pose`, as those of a studio are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from scail.mini.characters import Characters, describe, draw_characters, is_held_out_pair
from scail.mini.data import Backgrounds, Scenes, Size, render_references
from scail.mini.motion import joints_of_motion
from scail.pose.render import render_pose
from scail.pose.skeleton import BONES, PoseSequence
from scail.video import encode_video

FOLDER = Path(__file__).parent
FPS = 16.0
PORTRAIT, LANDSCAPE = (448, 256), (256, 448)  # twice what is rendered
RGB = tuple[float, float, float]


class Look(NamedTuple):
    """A reference: whose it is and where they stand."""

    name: str
    size: Size
    seed: int
    wall: tuple[RGB, RGB]  # top and bottom
    floor: RGB
    num_persons: int = 1


class Clip(NamedTuple):
    """A pose video: the motion of each person."""

    name: str
    size: Size
    motions: tuple[str, ...]
    num_frames: int
    cycles: float
    yaw: float = 0.3
    phase: float = 0.0


LOOKS = (
    Look("amber", PORTRAIT, 11, ((0.25, 0.36, 0.50), (0.45, 0.55, 0.65)), (0.30, 0.32, 0.38)),
    Look("jade", PORTRAIT, 24, ((0.85, 0.80, 0.72), (0.75, 0.68, 0.60)), (0.55, 0.45, 0.36)),
    Look("coral", LANDSCAPE, 23, ((0.38, 0.26, 0.42), (0.52, 0.36, 0.50)), (0.25, 0.18, 0.28)),
    Look("pair", LANDSCAPE, 7, ((0.70, 0.82, 0.86), (0.85, 0.90, 0.88)), (0.62, 0.66, 0.55), num_persons=2),
)
CLIPS = (
    Clip("walk", PORTRAIT, ("walk",), 17, 0.6, yaw=0.7),
    Clip("dance", PORTRAIT, ("dance",), 33, 1.0),
    Clip("squat", PORTRAIT, ("squat",), 17, 0.6),
    Clip("kick", LANDSCAPE, ("kick",), 17, 0.55, yaw=0.9),
    Clip("wave-and-dance", LANDSCAPE, ("wave", "dance"), 17, 0.6),
)


def place(size: Size, person: int, num_persons: int) -> tuple[float, float, float]:
    """Where somebody's pelvis is, in camera millimetres."""
    if num_persons > 1:
        return (480.0 * (2 * person - 1), -60.0, 3400.0)
    return (0.0, -60.0, 2100.0 if size[0] > size[1] else 3200.0)


def draw(look: Look) -> tuple[Image.Image, Characters]:
    """The characters standing in their place."""
    characters = draw_characters(np.random.default_rng(look.seed), look.num_persons, held_out=True)
    assert is_held_out_pair(characters.shirt, characters.trousers).all()
    joints = [
        joints_of_motion("turn", 1, phase=0.04, centre=place(look.size, person, look.num_persons))
        for person in range(look.num_persons)
    ]
    standing = torch.from_numpy(np.stack(joints)).double()  # (M, 1, 24, 3)
    scenes = Scenes(
        size=look.size,
        clip=torch.zeros(look.num_persons, dtype=torch.int64),
        palette_row=torch.arange(look.num_persons) if look.num_persons > 1 else torch.tensor([-1]),
        characters=characters,
        joints=standing,
        reference_joints=standing,
        backgrounds=Backgrounds(torch.tensor([[*look.wall, look.floor]]), torch.tensor([0.78]), torch.zeros(1, 1, 4)),
        prompts=("",),
        motions=np.zeros((look.num_persons, 3), np.int64),
    )
    levels = ((render_references(scenes).pixels[0, :, 0] + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()), characters


def pose_of(clip: Clip) -> PoseSequence:
    joints = [
        joints_of_motion(
            motion,
            clip.num_frames,
            cycles=clip.cycles,
            phase=clip.phase,
            yaw=clip.yaw * (1 - 2 * person),
            centre=place(clip.size, person, len(clip.motions)),
        )
        for person, motion in enumerate(clip.motions)
    ]
    return PoseSequence(np.stack(joints, axis=1), *clip.size, FPS)


def main() -> None:
    for look in LOOKS:
        image, characters = draw(look)
        image.save(FOLDER / f"{look.name}.png", optimize=True)
        print(look.name, *(describe(characters, person) for person in range(look.num_persons)), sep=": ")  # noqa: T201
    for clip in CLIPS:
        frames = render_pose(pose_of(clip), palette="multi" if len(clip.motions) > 1 else "single")
        encode_video(FOLDER / f"{clip.name}.mp4", frames, fps=FPS, metadata={"motion": clip.name, "bones": len(BONES)})


if __name__ == "__main__":
    main()
