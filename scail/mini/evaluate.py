"""Scores of a checkpoint on characters and motions that it was not trained on.

    python -m scail.mini.evaluate --checkpoint DIR --out report.json [--clips 24] [--steps 8] [--guidance 1.0]

Every clip is a scene whose truth is known: which pixel shows which limb. A limb is found again in a picture by its
colour, near where it should be, and in the same way in the truth, so that both suffer alike from what hides it. The
truth sent through the VAE is scored too: no transformer can be better than that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scail.config import SamplingParams
from scail.mini.characters import GARMENTS, LIMBS
from scail.mini.data import (
    LANDSCAPE,
    PORTRAIT,
    Film,
    Scenes,
    Size,
    draw_scenes,
    render_film,
    render_pose_pictures,
    render_references,
)
from scail.mini.vae_stage import HELD_OUT_SEED
from scail.pipeline import ScailPipeline

Frames = NDArray[np.uint8]

MIN_LIMB_PIXELS = 12  # of a limb in a frame; one that is nearly hidden has no centre worth measuring
SEARCH_SHARE = 0.09  # of the frame height: how far around a limb its colour is looked for
SAME_COLOUR = 0.25  # of -1 … 1: a neighbour as alike as shades of one cloth is counted to the limb, everywhere
LIMB_LABELS = tuple(GARMENTS.index(name) for name in LIMBS)
CPU = torch.device("cpu")

# Limits of a good clip: see `passes`.
MAX_LIMB_ERROR_PERCENT, MAX_DELTA_E, MIN_BACKGROUND_PSNR = 3.0, 15.0, 25.0


@dataclass(frozen=True)
class ClipInput:
    """What the pipeline is given of one scene, and the truth."""

    reference: Frames  # (H, W, 3)
    pose: Frames  # (T, H, W, 3)
    prompt: str
    truth: Film  # of one clip
    reference_film: Film


@dataclass(frozen=True)
class Scores:
    """Means over the frames, limbs and pixels of one clip.

    Attributes:
        limb_error_percent: Distance between the centres of a limb's colour in clip and truth, by the frame height.
        limbs_lost_percent: Limbs of which no pixel was found; they count with the radius of the search.
        delta_e: CIE76 between a limb in the clip and in the reference.
        background_psnr: Where nobody is, against the truth, in decibel.
        psnr: Of all pixels, against the truth.
    """

    limb_error_percent: float
    limbs_lost_percent: float
    delta_e: float
    background_psnr: float
    psnr: float

    @property
    def passes(self) -> bool:
        return (
            self.limb_error_percent <= MAX_LIMB_ERROR_PERCENT
            and self.delta_e <= MAX_DELTA_E
            and self.background_psnr >= MIN_BACKGROUND_PSNR
        )


def evaluate(
    pipeline: ScailPipeline, *, num_clips: int, params: SamplingParams, num_frames: int = 17, size: Size = PORTRAIT
) -> dict[str, Any]:
    """Render held-out clips, also with references and poses exchanged, and score them.

    Returns:
        Means, the scores of each clip, those of the VAE alone, and of the exchanges; ready for JSON.
    """
    scenes = draw_scenes(HELD_OUT_SEED, num_clips, num_frames=num_frames, size=size, held_out=True, device=CPU)
    inputs = clip_inputs(scenes)
    clips = [render(pipeline, item, item.pose, params) for item in inputs]
    scores = [score(clip, item.truth, item.reference_film) for clip, item in zip(clips, inputs, strict=True)]
    ceiling = [score(through_vae(pipeline, item), item.truth, item.reference_film) for item in inputs]
    return {
        "clips": num_clips,
        "num_frames": num_frames,
        "size": list(size),
        "params": asdict(params),
        "mean": mean_scores(scores),
        "passing_percent": 100 * float(np.mean([item.passes for item in scores])),
        "vae_alone": mean_scores(ceiling),
        "exchanges": exchanges(pipeline, scenes, inputs, clips, params),
        "each": [asdict(item) for item in scores],
    }


def exchanges(
    pipeline: ScailPipeline, scenes: Scenes, inputs: list[ClipInput], clips: list[Frames], params: SamplingParams
) -> dict[str, float]:
    """What becomes of a clip when it is given the pose of the next scene of as many persons.

    The same render is at once the next scene's clip with another reference. It has to do what the next scene does
    (`limb_error_percent`) and look as its own reference does (`delta_e`), and neither what its own scene did
    (`limb_error_before_percent`) nor as the next scene's reference does (`delta_e_of_other`).
    """
    rows = []
    persons = np.bincount(scenes.clip.numpy(), minlength=scenes.num_clips)
    for index, item in enumerate(inputs):
        later = [(index + shift) % len(inputs) for shift in range(1, len(inputs))]
        partner = next((other for other in later if persons[other] == persons[index]), None)
        if partner is None:
            continue
        other = inputs[partner]
        truth = exchanged_film(scenes, index, partner)
        clip = render(pipeline, item, other.pose, params)
        new, old = score(clip, truth, item.reference_film), score(clip, item.truth, item.reference_film)
        rows.append(
            {
                "limb_error_percent": new.limb_error_percent,
                "limb_error_before_percent": old.limb_error_percent,
                "delta_e": new.delta_e,
                "delta_e_of_other": limb_delta_e(signed(clip), truth, other.reference_film),
                "change_by_pose": mean_difference(clip, clips[index]),
                "change_by_reference": mean_difference(clip, clips[partner]),
            }
        )
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def clip_inputs(scenes: Scenes) -> list[ClipInput]:
    """Pictures of every scene in the pipeline's own form."""
    film, references, poses = render_film(scenes), render_references(scenes), render_pose_pictures(scenes)
    return [
        ClipInput(
            reference=_levels(references.pixels[n])[0],
            pose=poses[n].permute(1, 2, 3, 0).to(torch.uint8).numpy(),
            prompt=scenes.prompts[n],
            truth=_one(film, n),
            reference_film=_one(references, n),
        )
        for n in range(scenes.num_clips)
    ]


def exchanged_film(scenes: Scenes, index: int, partner: int) -> Film:
    """The truth of scene `index` when its persons do what those of scene `partner` do."""
    own, others = ((scenes.clip == n).nonzero()[:, 0] for n in (index, partner))
    joints = scenes.joints.clone()
    joints[own] = scenes.joints[others]
    return _one(render_film(scenes, joints), index)


def render(pipeline: ScailPipeline, item: ClipInput, pose: Frames, params: SamplingParams) -> Frames:
    return pipeline(item.reference, pose, item.prompt, params=params, size=item.reference.shape[:2]).frames


def through_vae(pipeline: ScailPipeline, item: ClipInput) -> Frames:
    """The truth, encoded and decoded."""
    with torch.inference_mode():
        return pipeline.decode(pipeline.encode_latents(item.truth.pixels))


def score(clip: Frames, truth: Film, reference: Film) -> Scores:
    """Scores of frames (T, H, W, 3) of a clip whose truth is known."""
    pixels = signed(clip)
    error, lost = limb_errors(pixels, truth)
    height = pixels.shape[2]
    square = (pixels - truth.pixels[0]).square().mean(dim=0)  # (T, H, W)
    near_somebody = F.max_pool2d((truth.garment[0] >= 0).float(), 9, stride=1, padding=4) > 0
    return Scores(
        limb_error_percent=100 * error / height,
        limbs_lost_percent=100 * lost,
        delta_e=limb_delta_e(pixels, truth, reference),
        background_psnr=_psnr(square[~near_somebody]),
        psnr=_psnr(square),
    )


def limb_errors(pixels: Tensor, truth: Film) -> tuple[float, float]:
    """Mean distance in pixels of the limbs' centres in `pixels` (3, T, H, W) and truth, and the share of lost limbs."""
    distances, lost = [], []
    height = pixels.shape[2]
    radius = SEARCH_SHARE * height
    for frame in range(pixels.shape[1]):
        for whole in _limb_masks(truth, frame):
            window = _window(whole, round(radius))
            mask = whole[window]
            near = _within(mask, round(radius))
            true_frame, own_frame = (picture[:, frame][:, *window] for picture in (truth.pixels[0], pixels))
            colour, others = true_frame[:, mask].mean(dim=1), true_frame[:, near & ~mask]
            wanted, found = (_find(picture, near, colour, others) for picture in (true_frame, own_frame))
            if wanted is None:
                continue
            lost.append(found is None)
            distances.append(radius if found is None else float((wanted - found).norm()))
    return (float(np.mean(distances)), float(np.mean(lost))) if distances else (float("nan"), float("nan"))


def limb_delta_e(pixels: Tensor, truth: Film, reference: Film) -> float:
    """Mean CIE76 between limbs where they are in the truth of a clip and where they are in its reference."""
    shown: dict[tuple[int, int], list[Tensor]] = {}
    for frame in range(pixels.shape[1]):
        for key, mask in _limbs(truth, frame).items():
            shown.setdefault(key, []).append(pixels[:, frame, mask].mean(dim=1))
    differences = []
    first_shown = _limbs(reference, 0)
    base = _first_person(truth) - _first_person(reference)
    for (person, label), colours in shown.items():
        in_reference = first_shown.get((person - base, label))
        if in_reference is not None:
            pair = torch.stack(colours).mean(dim=0), reference.pixels[0, :, 0, in_reference].mean(dim=1)
            lab = to_lab(torch.stack(pair))
            differences.append(float((lab[0] - lab[1]).norm()))
    return float(np.mean(differences)) if differences else float("nan")


def to_lab(colours: Tensor) -> Tensor:
    """CIELAB (N, 3) of sRGB (N, 3) in -1 … 1, under D65."""
    rgb = ((colours + 1) / 2).clamp(0, 1).double()
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=torch.float64,
    )
    xyz = (linear @ matrix.T) / torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), dim=1)


def mean_difference(clip: Frames, other: Frames) -> float:
    """Mean absolute difference in levels of 0 … 255."""
    return float(np.abs(clip.astype(np.float64) - other).mean())


def mean_scores(scores: list[Scores]) -> dict[str, float]:
    return {name: float(np.nanmean([asdict(item)[name] for item in scores])) for name in asdict(scores[0])}


def _find(picture: Tensor, near: Tensor, colour: Tensor, others: Tensor) -> Tensor | None:
    """Centre (row, column) of the pixels near a limb that are closer to its colour than to any clearly other one."""
    positions = near.nonzero()
    values = picture[:, near]  # (3, K)
    own = (values - colour[:, None]).norm(dim=0)
    typical = _typical(others)
    typical = typical[(typical - colour).norm(dim=1) > SAME_COLOUR]
    nearest_other = torch.cdist(values.T, typical).amin(dim=1) if len(typical) else torch.full_like(own, torch.inf)
    hits = (own < nearest_other) & (own < 0.35)
    return positions[hits].double().mean(dim=0) if int(hits.sum()) >= MIN_LIMB_PIXELS // 3 else None


def _typical(colours: Tensor) -> Tensor:
    """Mean colours (K, 3) of the occupied cells of a coarse grid over colours (3, N)."""
    cells = ((colours + 1) * 3.999 / 2).long().clamp(0, 3)
    index = cells[0] * 16 + cells[1] * 4 + cells[2]
    counts = torch.bincount(index, minlength=64).double()
    sums = torch.stack([torch.bincount(index, weights=channel.double(), minlength=64) for channel in colours], dim=1)
    occupied = counts >= max(4.0, 0.01 * colours.shape[1])
    return (sums[occupied] / counts[occupied, None]).float()


def _limbs(film: Film, frame: int) -> dict[tuple[int, int], Tensor]:
    """Masks (H, W) of the visible limbs by person and garment."""
    garment, person = film.garment[0, frame], film.person[0, frame]
    masks = {}
    for who in torch.unique(person[person >= 0]).tolist():
        for label in LIMB_LABELS:
            mask = (garment == label) & (person == who)
            if int(mask.sum()) >= MIN_LIMB_PIXELS:
                masks[who, label] = mask
    return masks


def _limb_masks(film: Film, frame: int) -> list[Tensor]:
    return list(_limbs(film, frame).values())


def _first_person(film: Film) -> int:
    return int(film.person[film.person >= 0].min()) if (film.person >= 0).any() else 0


def _window(mask: Tensor, radius: int) -> tuple[slice, slice]:
    """The rows and columns within `radius` of a mask (H, W): small pictures are quick to search."""
    spans = []
    for axis in (1, 0):
        hits = mask.any(dim=axis).nonzero()
        spans.append(slice(max(0, int(hits[0]) - radius), int(hits[-1]) + radius + 1))
    return spans[0], spans[1]


def _within(mask: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1  # of a square, so that rows and columns may go one after the other
    rows = F.max_pool2d(mask[None, None].float(), (side, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, side), stride=1, padding=(0, radius))[0, 0] > 0


def _one(film: Film, index: int) -> Film:
    return Film(*(values[index : index + 1] for values in film))


def true_frames(item: ClipInput) -> Frames:
    """The truth as a clip, (T, H, W, 3)."""
    return _levels(item.truth.pixels[0])


def _levels(pixels: Tensor) -> Frames:
    frames: Frames = ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    return frames


def signed(clip: Frames) -> Tensor:
    """(3, T, H, W) in -1 … 1."""
    return torch.from_numpy(clip.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1


def _psnr(square_errors: Tensor) -> float:
    return float(10 * torch.log10(4.0 / square_errors.mean().clamp(min=1e-10)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scail.mini.evaluate", description="Score a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON report")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--landscape", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    pipeline = ScailPipeline.from_pretrained(options.checkpoint, device=options.device, dtype=dtype)
    report = evaluate(
        pipeline,
        num_clips=options.clips,
        params=SamplingParams(num_inference_steps=options.steps, guidance_scale=options.guidance),
        num_frames=options.frames,
        size=LANDSCAPE if options.landscape else PORTRAIT,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
