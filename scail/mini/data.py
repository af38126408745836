"""Clips to learn from, drawn on the device as they are needed: scenes of characters that move, and their pictures.

A scene is a function of its seed. Its numbers are drawn by NumPy, so that a seed means the same on every device, and
the drawing is batched. Held-out scenes have clothes and pairs of motions and phases that training scenes never have.
The pose picture of a scene is what `scail.pose.render` makes of its joints, but for the last grazing pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scail.mini.caster import Capsules, Hits, cast, default_view
from scail.mini.characters import (
    GARMENTS,
    PARTS,
    Characters,
    body_capsules,
    describe,
    draw_characters,
)
from scail.mini.motion import LOWER_BODY, MOTIONS, NECK, SPINE, joints_from_angles
from scail.pose.render import FAR_MARGIN, MAX_FAR, NEAR_PLANE, RADIUS
from scail.pose.skeleton import BONE_JOINTS, NUM_JOINTS, PALETTES

Size = tuple[int, int]  # (height, width)
PORTRAIT, LANDSCAPE = (224, 128), (128, 224)

HELD_OUT_REST = 5  # of upper + 2 · lower motion + 3 · eighth of a cycle by 8
NUM_PHASES = 8
PAIR_SHARE = 0.12  # of the clips show two persons
SUPERSAMPLING = 2
FRAMES_PER_SECOND = 16

_VERBS = {
    "walk": "walks", "wave": "waves", "squat": "squats", "kick": "kicks", "turn": "turns around", "dance": "dances",
}  # fmt: skip
_PART_GARMENTS = tuple(GARMENTS.index(part.garment) for part in PARTS)


class Backgrounds(NamedTuple):
    """N plain, gradient, two-tone or softly textured backgrounds."""

    colours: Tensor  # (N, 3, 3): top, bottom, floor
    horizon: Tensor  # (N,), share of the height where the floor begins; 1 or more: no floor
    waves: Tensor  # (N, K, 4): cycles in x and y, phase, amplitude


@dataclass(frozen=True)
class Scenes:
    """N clips and the M persons in them.

    Attributes:
        size: Height and width.
        clip: (M,), in which clip a person is.
        palette_row: (M,), -1 for somebody alone, else the row of the palette for several.
        characters: M of them.
        joints: (M, T, 24, 3), float64, camera millimetres.
        reference_joints: (M, 1, 24, 3), another pose of the same body.
        backgrounds: N.
        prompts: N.
        motions: (M, 3): upper motion, lower motion and the eighth of the cycle where it begins.
    """

    size: Size
    clip: Tensor
    palette_row: Tensor
    characters: Characters
    joints: Tensor
    reference_joints: Tensor
    backgrounds: Backgrounds
    prompts: tuple[str, ...]
    motions: NDArray[np.int64]

    @property
    def num_clips(self) -> int:
        return len(self.prompts)

    @property
    def num_frames(self) -> int:
        return self.joints.shape[1]


class Film(NamedTuple):
    """Pictures of scenes and which part is seen where."""

    pixels: Tensor  # (N, 3, T, H, W) in -1 … 1
    garment: Tensor  # (N, T, H, W), index into GARMENTS of the part in the pixel's corner, -1 for the background
    person: Tensor  # (N, T, H, W), index of the person, -1 for the background


def draw_scenes(
    seed: int, num_clips: int, *, num_frames: int, size: Size, held_out: bool, device: torch.device
) -> Scenes:
    """Random scenes, the same for the same arguments on every device."""
    rng = np.random.default_rng((seed, num_frames, *size, int(held_out)))
    pair = rng.random(num_clips) < PAIR_SHARE
    clip = np.repeat(np.arange(num_clips), 1 + pair)
    second = np.diff(clip, prepend=-1) == 0
    row = np.where(pair[clip], second.astype(np.int64), -1)
    characters = draw_characters(rng, len(clip), held_out=held_out)
    motions = draw_motions(rng, len(clip), held_out=held_out)
    place = _draw_places(rng, row, size)
    joints = _draw_joints(rng, motions, place, characters.proportions, num_frames, device)
    reference_motions = draw_motions(rng, len(clip), held_out=held_out)
    reference_place = place + rng.uniform(-120, 120, (len(clip), 3)) * (1, 0.4, 1)
    reference_joints = _draw_joints(
        rng, reference_motions, reference_place, characters.proportions, 1, device, max_yaw=0.7
    )
    return Scenes(
        size=size,
        clip=torch.from_numpy(clip).to(device),
        palette_row=torch.from_numpy(row).to(device),
        characters=characters.to(device),
        joints=joints,
        reference_joints=reference_joints,
        backgrounds=Backgrounds(*(torch.from_numpy(x).float().to(device) for x in _draw_backgrounds(rng, num_clips))),
        prompts=_prompts(characters, motions, clip, num_clips),
        motions=motions,
    )


def draw_motions(rng: np.random.Generator, num: int, *, held_out: bool) -> NDArray[np.int64]:
    """(num, 3): motions of the upper and of the lower body, mostly the same one, and the eighth of the first phase."""
    upper = rng.integers(0, len(MOTIONS), num)
    lower = np.where(rng.random(num) < 0.7, upper, rng.integers(0, len(MOTIONS), num))
    if held_out:
        eighth = 3 * (HELD_OUT_REST - upper - 2 * lower) % NUM_PHASES  # 3 is its own inverse modulo 8
    else:
        eighth = rng.integers(0, NUM_PHASES, num)
        eighth = np.where(is_held_out_motion(upper, lower, eighth), (eighth + 1) % NUM_PHASES, eighth)
    return np.stack((upper, lower, eighth), axis=1)


def is_held_out_motion(
    upper: NDArray[np.int64], lower: NDArray[np.int64], eighth: NDArray[np.int64]
) -> NDArray[np.bool_]:
    return (upper + 2 * lower + 3 * eighth) % 8 == HELD_OUT_REST


def render_film(scenes: Scenes, joints: Tensor | None = None) -> Film:
    """The characters before their backgrounds.

    Args:
        scenes: N clips.
        joints: (M, T, 24, 3) in place of the scenes' own, such as those of the references.
    """
    joints = scenes.joints if joints is None else joints
    num_frames, (height, width) = joints.shape[1], scenes.size
    view = default_view(height, width, SUPERSAMPLING)
    capsules = body_capsules(scenes.characters, joints.float())
    hits = cast(_in_clips(capsules, scenes.clip, num_frames), scenes.num_clips * num_frames, view)
    part, person = hits.capsule % len(PARTS), hits.capsule // (len(PARTS) * num_frames)
    garment = torch.tensor(_PART_GARMENTS, device=joints.device)[part]
    albedo = scenes.characters.colours.float()[person, garment]
    canvas = joints.new_zeros(scenes.num_clips * num_frames * view.height * view.width, 4, dtype=torch.float32)
    canvas[hits.pixel] = F.pad(albedo * _daylight(hits), (0, 1), value=1.0)
    canvas = canvas.view(scenes.num_clips, num_frames, view.height, view.width, 4).permute(0, 1, 4, 2, 3)
    canvas = F.avg_pool2d(canvas.flatten(0, 1), SUPERSAMPLING).view(scenes.num_clips, num_frames, 4, height, width)
    behind = _paint(scenes.backgrounds, scenes.size)[:, None]  # (N, 1, 3, H, W)
    colour = canvas[:, :, :3] + (1 - canvas[:, :, 3:]) * behind
    labels = [_labels(hits, values, view.height * view.width, scenes, num_frames) for values in (garment, person)]
    return Film((colour * 2 - 1).transpose(1, 2).contiguous(), *labels)


def render_references(scenes: Scenes) -> Film:
    return render_film(scenes, scenes.reference_joints)


def render_pose_pictures(scenes: Scenes) -> Tensor:
    """The pose video in whole levels, float32 (N, 3, T, H, W) in 0 … 255."""
    num_frames, (height, width) = scenes.num_frames, scenes.size
    bones = torch.as_tensor(BONE_JOINTS, device=scenes.joints.device)
    ends = scenes.joints.float().double()[:, :, bones]  # (M, T, 13, 2, 3)
    image = torch.arange(ends[:, :, 0, 0, 0].numel(), device=ends.device).repeat_interleave(len(bones))
    radius = torch.full_like(image, RADIUS, dtype=torch.float64)
    capsules = Capsules(image, ends[:, :, :, 0].flatten(0, 2), ends[:, :, :, 1].flatten(0, 2), radius)
    hits = cast(
        _in_clips(capsules, scenes.clip, num_frames), scenes.num_clips * num_frames, default_view(height, width)
    )
    levels = _pose_colours(scenes, hits, ends[..., 2]).mul(255).floor()
    canvas = levels.new_zeros(scenes.num_clips * num_frames * height * width, 3)
    canvas[hits.pixel] = levels
    return canvas.view(scenes.num_clips, num_frames, height, width, 3).permute(0, 4, 1, 2, 3).float().contiguous()


def halve_pose_pictures(pictures: Tensor) -> Tensor:
    """What the VAE is given of a pose video: (N, 3, T, H / 2, W / 2) in -1 … 1."""
    return F.avg_pool3d((pictures - 127.5) / 127.5, (1, 2, 2))


def _pose_colours(scenes: Scenes, hits: Hits, depths: Tensor) -> Tensor:
    """(M, 3) in 0 … 1, shaded as the pose renderer does; `depths` are those of the bones' ends, (M, T, 13, 2)."""
    num_bones = len(BONE_JOINTS)
    person = hits.capsule // (num_bones * scenes.num_frames)
    palettes = np.concatenate((PALETTES["multi"], PALETTES["single"])) / 300.0 + 0.15  # row -1 is somebody alone
    albedo = torch.as_tensor(palettes, device=depths.device)[scenes.palette_row[person], hits.capsule % num_bones]
    near, far = _depth_range(scenes, depths)
    near, far = (
        near.clamp(min=NEAR_PLANE)[scenes.clip[person]],
        (far + FAR_MARGIN).clamp(max=MAX_FAR)[scenes.clip[person]],
    )
    to_light = -hits.point / hits.point.norm(dim=-1, keepdim=True)
    to_light[:, 2] -= 1.0
    highlight = (hits.normal * to_light).sum(-1).div(to_light.norm(dim=-1)).clamp(min=0) ** 32
    diffuse = 0.3 + 0.7 * (-hits.normal[:, 2]).clamp(min=0)
    fade = (1.0 - (hits.point[:, 2] - near) / (far - NEAR_PLANE)).clamp(0, 1)
    return ((albedo * diffuse[:, None] + 0.5 * highlight[:, None]) * fade[:, None]).clamp(0, 1)


def _depth_range(scenes: Scenes, depths: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest and farthest bone end of each clip, (N,) each."""
    empty = depths.new_zeros(scenes.num_clips)
    low, high = depths.flatten(1).amin(dim=1), depths.flatten(1).amax(dim=1)
    return (
        empty.scatter_reduce(0, scenes.clip, low, "amin", include_self=False),
        empty.scatter_reduce(0, scenes.clip, high, "amax", include_self=False),
    )


def _in_clips(capsules: Capsules, clip: Tensor, num_frames: int) -> Capsules:
    """Capsules whose `image` counts (persons, frames), put into the pictures of the persons' clips."""
    person, frame = capsules.image // num_frames, capsules.image % num_frames
    return capsules._replace(image=clip[person] * num_frames + frame)


def _daylight(hits: Hits) -> Tensor:
    """Brightness (M, 1) under a soft light from the upper left, a little darker at the rim."""
    side = (hits.normal * hits.normal.new_tensor((-0.45, -0.6, -0.66))).sum(-1)
    rim = (-hits.normal[:, 2]).clamp(0, 1)
    return (0.56 + 0.3 * side.clamp(min=0) + 0.16 * rim)[:, None]


def _labels(hits: Hits, values: Tensor, pixels_per_image: int, scenes: Scenes, num_frames: int) -> Tensor:
    """(N, T, H, W): values of the hits in every pixel's upper left corner, -1 elsewhere."""
    height, width = (side * SUPERSAMPLING for side in scenes.size)
    labels = values.new_full((scenes.num_clips * num_frames * pixels_per_image,), -1)
    labels[hits.pixel] = values
    return labels.view(scenes.num_clips, num_frames, height, width)[..., ::SUPERSAMPLING, ::SUPERSAMPLING]


def _paint(backgrounds: Backgrounds, size: Size) -> Tensor:
    """(N, 3, H, W) in 0 … 1."""
    device = backgrounds.horizon.device
    y = torch.linspace(0, 1, size[0], device=device)[:, None]
    x = torch.linspace(0, 1, size[1], device=device)[None]
    top, bottom, floor = (backgrounds.colours[:, i, :, None, None] for i in range(3))
    wall = top + (bottom - top) * y
    below = ((y - backgrounds.horizon[:, None, None]) * size[0]).clamp(0, 1)[:, None]  # (N, 1, H, 1), an even edge
    picture = wall + (floor - wall) * below
    cycles_x, cycles_y, phase, amplitude = (backgrounds.waves[..., i, None, None] for i in range(4))
    ripples = amplitude * (2 * torch.pi * (cycles_x * x + cycles_y * y + phase)).sin()
    return (picture + ripples.sum(dim=1)[:, None]).clamp(0, 1)


def _draw_backgrounds(rng: np.random.Generator, num: int) -> tuple[NDArray[np.float64], ...]:
    kind = rng.integers(0, 4, num)  # plain, gradient, with a floor, textured
    grey = rng.uniform(0.1, 0.9, (num, 1))
    top = (grey + rng.uniform(-0.22, 0.22, (num, 3))).clip(0.03, 0.97)
    bottom = (top + rng.uniform(-0.3, 0.3, (num, 1)) + rng.uniform(-0.1, 0.1, (num, 3))).clip(0.03, 0.97)
    floor = top + rng.choice([-1, 1], (num, 1)) * rng.uniform(0.08, 0.25, (num, 1)) + rng.uniform(-0.06, 0.06, (num, 3))
    bottom = np.where((kind == 0)[:, None], top, bottom)
    horizon = np.where(kind == 2, rng.uniform(0.55, 0.85, num), 2.0)
    waves = np.stack(
        (
            rng.uniform(-5, 5, (num, 3)),
            rng.uniform(-5, 5, (num, 3)),
            rng.random((num, 3)),
            rng.uniform(0.0, 0.06, (num, 3)) * (kind == 3)[:, None],
        ),
        axis=-1,
    )
    return np.stack((top, bottom, floor.clip(0.03, 0.97)), axis=1), horizon, waves


def _draw_places(rng: np.random.Generator, row: NDArray[np.int64], size: Size) -> NDArray[np.float64]:
    """Where the pelvis is in the middle of the clip, (M, 3); two persons stand side by side."""
    portrait = size[0] > size[1]
    depths = (1800, 2350) if portrait else (2500, 3300)
    paired = row >= 0
    depth = np.where(paired, rng.uniform(3000, 3900, len(row)), rng.uniform(*depths, len(row)))
    side = rng.uniform(-1, 1, len(row)) * (110 if portrait else 450)
    apart = np.where(row == 0, -1, 1) * rng.uniform(430, 560, len(row))
    return np.stack(
        (np.where(paired, apart, side), rng.uniform(-190, -20, len(row)), depth),
        axis=1,
    )


def _draw_joints(
    rng: np.random.Generator,
    motions: NDArray[np.int64],
    place: NDArray[np.float64],
    proportions: Tensor,
    num_frames: int,
    device: torch.device,
    max_yaw: float = 0.9,
) -> Tensor:
    """Joints (M, T, 24, 3) of varied motions: every clip has its own speed, size of gesture, drift and sway."""
    num = len(motions)
    time = np.arange(num_frames) / FRAMES_PER_SECOND
    speed = rng.uniform(0.25, 0.7, (num, 1))
    phase = (motions[:, 2:] + rng.random((num, 1))) / NUM_PHASES + speed * time
    gain = rng.uniform(0.65, 1.2, (num, 1, NUM_JOINTS, 1))
    gain[:, :, 0] = 1.0
    sway_size = rng.uniform(0, 0.3, (num, 1, NUM_JOINTS, 3)) * (rng.random((num, 1, NUM_JOINTS, 1)) < 0.5)
    sway_size[:, :, [0, SPINE, 6, 9, NECK]] *= 0.25
    sway_phase = (
        rng.random((num, 1, NUM_JOINTS, 3)) + rng.uniform(0.1, 0.5, (num, 1, NUM_JOINTS, 3)) * time[:, None, None]
    )
    yaw = rng.uniform(-max_yaw, max_yaw, (num, 1)) + rng.uniform(-0.3, 0.3, (num, 1)) * time
    drift = rng.uniform((-110, 0, -260), (110, 0, 260), (num, 3))[:, None] * (time - time[-1] / 2)[:, None]
    angles, lift = _blend(torch.from_numpy(phase).to(device), torch.from_numpy(motions).to(device))
    sway = sway_size * np.sin(2 * np.pi * sway_phase)
    pelvis = torch.from_numpy(place[:, None] + drift).to(device)
    pelvis[:, :, 1] -= lift
    angles = angles * torch.from_numpy(gain).to(device) + torch.from_numpy(sway).to(device)
    angles[:, :, 0, 1] += torch.from_numpy(yaw).to(device)
    return joints_from_angles(angles, pelvis, proportions.to(device))


def _blend(phase: Tensor, motions: Tensor) -> tuple[Tensor, Tensor]:
    """Angles (M, T, 24, 3) with the legs of one motion and the rest of another, and the lift (M, T)."""
    movements = [motion(phase) for motion in MOTIONS.values()]
    person = torch.arange(len(phase), device=phase.device)
    angles = torch.stack([movement.angles for movement in movements])
    upper, lower = angles[motions[:, 0], person], angles[motions[:, 1], person]
    legs = torch.zeros(NUM_JOINTS, 1, dtype=torch.bool, device=phase.device)
    legs[list(LOWER_BODY)] = True
    lift = torch.stack([movement.lift for movement in movements])[motions[:, 1], person]
    return torch.where(legs, lower, upper), lift


def _prompts(
    characters: Characters, motions: NDArray[np.int64], clip: NDArray[np.int64], num_clips: int
) -> tuple[str, ...]:
    verbs = list(_VERBS.values())
    persons = [f"a person in {describe(characters, i)} {verbs[motions[i, 0]]}" for i in range(len(clip))]
    return tuple(" and ".join(persons[i] for i in np.flatnonzero(clip == n)) for n in range(num_clips))
