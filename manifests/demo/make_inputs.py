"""Draws the demo's references and pose videos: `python manifests/demo/make_inputs.py`. Nothing here is footage."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from scail.mini.motion import joints_of_motion
from scail.pose.camera import default_intrinsics, project
from scail.pose.render import render_pose
from scail.pose.skeleton import BONES, PoseSequence
from scail.video import encode_video

FOLDER = Path(__file__).parent
NUM_FRAMES = 17
FPS = 16.0
CENTRE = (0.0, 0.0, 2500.0)
RGB = tuple[int, int, int]

# SMPL joints, radius in millimetres and which garment; far parts are drawn first
LIMBS = (
    ((2, 5), 80, "trousers"), ((5, 8), 60, "trousers"), ((1, 4), 80, "trousers"), ((4, 7), 60, "trousers"),
    ((8, 11), 45, "shoes"), ((7, 10), 45, "shoes"), ((0, 12), 125, "shirt"), ((13, 14), 85, "shirt"),
    ((17, 19), 52, "shirt"), ((19, 21), 42, "skin"), ((16, 18), 52, "shirt"), ((18, 20), 42, "skin"),
    ((12, 15), 50, "skin"), ((15, 15), 110, "skin"),
)  # fmt: skip


class Character(NamedTuple):
    name: str
    size: tuple[int, int]  # (height, width)
    sky: RGB
    ground: RGB
    skin: RGB
    shirt: RGB
    trousers: RGB
    shoes: RGB


CHARACTERS = (
    Character(
        name="amber",
        size=(512, 320),
        sky=(64, 92, 128),
        ground=(38, 46, 60),
        skin=(224, 172, 138),
        shirt=(226, 142, 40),
        trousers=(44, 62, 110),
        shoes=(30, 30, 34),
    ),
    Character(
        name="jade",
        size=(512, 320),
        sky=(206, 198, 180),
        ground=(150, 132, 110),
        skin=(122, 82, 60),
        shirt=(36, 140, 104),
        trousers=(70, 66, 72),
        shoes=(236, 232, 220),
    ),
    Character(
        name="coral",
        size=(320, 512),
        sky=(92, 62, 96),
        ground=(52, 34, 58),
        skin=(244, 204, 176),
        shirt=(232, 86, 84),
        trousers=(238, 226, 206),
        shoes=(96, 40, 50),
    ),
)


def draw(character: Character) -> Image.Image:
    """The character standing before a plain background, twice as large as it is saved."""
    height, width = (2 * side for side in character.size)
    image = Image.fromarray(_gradient(height, width, character.sky, character.ground))
    canvas = ImageDraw.Draw(image)
    joints = joints_of_motion("wave", 1, phase=0.75, centre=CENTRE)[0]
    intrinsics = default_intrinsics(height, width)
    points = project(joints, intrinsics)
    for (start, end), radius_mm, garment in LIMBS:
        radius = radius_mm * intrinsics[0, 0] / CENTRE[2]
        colour = getattr(character, garment)
        canvas.line([tuple(points[start]), tuple(points[end])], fill=colour, width=round(2 * radius))
        for x, y in (points[start], points[end]):
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(1)).resize(character.size[::-1], Image.Resampling.LANCZOS)


def _gradient(height: int, width: int, top: RGB, bottom: RGB) -> np.ndarray:
    share = np.linspace(0, 1, height)[:, None, None]
    rows = (1 - share) * np.array(top) + share * np.array(bottom)
    return np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)


def main() -> None:
    for character in CHARACTERS:
        draw(character).save(FOLDER / f"{character.name}.png", optimize=True)
    for motion, (height, width) in {"walk": (448, 256), "dance": (448, 256), "kick": (256, 448)}.items():
        joints = joints_of_motion(motion, NUM_FRAMES, centre=CENTRE)
        frames = render_pose(PoseSequence(joints[:, None], height, width, FPS))
        encode_video(FOLDER / f"{motion}.mp4", frames, fps=FPS, metadata={"motion": motion, "bones": len(BONES)})


if __name__ == "__main__":
    main()
