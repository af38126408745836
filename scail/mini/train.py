"""Trains the miniature in runs of minutes: `python -m scail.mini.train --stage vae|dit --out DIR --minutes M`.

    python -m scail.mini.train --stage vae --out runs/vae --minutes 9
    python -m scail.mini.train --stage dit --vae runs/vae --out runs/dit --minutes 8
    python -m scail.mini.assemble --vae runs/vae --dit runs/dit --out checkpoints/mini

Each run leaves the averaged weights, a log and a picture in its folder, and `--resume DIR` goes on from there: with
another run's folder, with its own, or with an assembled checkpoint such as the one that comes with the program.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from scail.config import SCAIL_MINI
from scail.mini import dit_stage, full_pass, vae_stage
from scail.mini.data import halve_pose_pictures, render_pose_pictures, render_references
from scail.mini.dit_stage import (
    TOKENS_PER_BATCH,
    Encoders,
    PoolKind,
    encode_scenes,
    held_out_scenes,
    pool_kinds,
    sample,
    train_dit,
)
from scail.mini.loop import RunPlan, parameters_of
from scail.mini.pictures import frames_of, save_rows
from scail.mini.state import Progress, load_state, save_state
from scail.mini.vae_stage import (
    HELD_OUT_SEED,
    BatchKind,
    batch_kinds,
    draw_pixels,
    fold_normalisation,
    half_precision,
    reconstruct,
    train_vae,
)
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae

logger = logging.getLogger(__name__)

VAE, DIT = "vae", "dit"
LEARNING_RATES = {VAE: 2e-3, DIT: 2e-3}


def run_vae(
    plan: RunPlan, kinds: list[BatchKind], *, resume: Path | None, device: torch.device, pool_scale: float = 1.0
) -> Progress:
    """One run of the VAE's training. Its weights end with the normalisation of the latents folded into them."""
    vae = vae_stage.start_from_nothing(SCAIL_MINI.vae).to(device)
    progress = load_state(resume, VAE, vae) if resume else Progress()
    logger.info("%d parameters, %s", parameters_of([vae]), progress)
    average, progress = train_vae(plan, vae, progress, kinds, device, pool_scale=pool_scale)
    average.swap()
    clips = [kind for kind in kinds if not kind.pose and kind.num_frames > 1 and kind.size == kind.film_size]
    fold_normalisation(
        vae, [draw_pixels(kind, 8, (7, i), held_out=False, device=device) for i, kind in enumerate(clips)]
    )
    average.swap()
    save_state(plan.folder, VAE, vae, average, progress)
    average.swap()
    save_vae_picture(plan.folder / "vae.png", vae, max(clips, key=lambda kind: kind.weight), device)
    return progress


def run_dit(
    plan: RunPlan,
    kinds: list[PoolKind],
    *,
    vae_folder: Path,
    resume: Path | None,
    device: torch.device,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Progress:
    """One run of the transformer's training on the latents of a trained VAE."""
    vae = VideoVae.from_config(SCAIL_MINI.vae).to(device)
    logger.info("VAE after %s", load_state(vae_folder, VAE, vae))
    transformer = dit_stage.start_from_nothing(SCAIL_MINI).to(device)
    progress = load_state(resume, DIT, transformer) if resume else Progress()
    encoders = Encoders.around(vae, SCAIL_MINI, device)
    logger.info("%d parameters, %s", parameters_of([transformer]), progress)
    average, progress = train_dit(
        plan, transformer, encoders, progress, kinds, device, tokens_per_batch=tokens_per_batch
    )
    average.swap()
    save_dit_picture(plan.folder / "dit.png", transformer, encoders, kinds[0], device)
    return progress


@torch.no_grad()
def save_vae_picture(path: Path, vae: VideoVae, kind: BatchKind, device: torch.device) -> None:
    """Truth above reconstruction, three frames each of four clips."""
    pixels = draw_pixels(kind, 4, (HELD_OUT_SEED,), held_out=True, device=device)
    decoded = reconstruct(vae, pixels)
    save_rows(path, [[frame for clip in pictures for frame in frames_of(clip)] for pictures in (pixels, decoded)])


@torch.no_grad()
def save_dit_picture(
    path: Path, transformer: ScailTransformer, encoders: Encoders, kind: PoolKind, device: torch.device
) -> None:
    """A row for each of six clips: reference, then pose, truth and sample at three moments."""
    scenes = held_out_scenes(kind, 6, device)
    examples, film = encode_scenes(scenes, encoders)
    latents = sample(transformer, examples)
    with half_precision(device):
        sampled = full_pass.decode_normalised(encoders.vae, latents).float()
    poses, references = halve_pose_pictures(render_pose_pictures(scenes)), render_references(scenes).pixels
    rows = []
    for reference, *clips in zip(references, poses, film, sampled, strict=True):
        moments = zip(*(frames_of(clip) for clip in clips), strict=True)
        rows.append([reference[:, 0], *(picture for moment in moments for picture in moment)])
    save_rows(path, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scail.mini.train", description="Train the miniature.")
    parser.add_argument("--stage", choices=(VAE, DIT), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--minutes", type=float, required=True, help="of training; ends about half a minute later")
    parser.add_argument("--resume", type=Path, help="folder of the run to go on from, or a checkpoint")
    parser.add_argument("--vae", type=Path, help="folder of the trained VAE, or a checkpoint; needed by --stage dit")
    parser.add_argument("--learning-rate", type=float, help="at its highest; 2e-3")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="multiplies the VAE's batches")
    parser.add_argument("--pool-scale", type=float, default=1.0, help="multiplies the pools of clips")
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.stage == DIT and options.vae is None:
        parser.error("--stage dit needs --vae DIR, the folder of the trained VAE")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = torch.device(options.device)
    torch.manual_seed(0)
    plan = RunPlan(
        stage=options.stage,
        folder=options.out,
        minutes=options.minutes,
        learning_rate=options.learning_rate or LEARNING_RATES[options.stage],
        max_steps=options.max_steps,
    )
    if options.stage == VAE:
        kinds = batch_kinds(options.batch_scale)
        run_vae(plan, kinds, resume=options.resume, device=device, pool_scale=options.pool_scale)
    else:
        pools = pool_kinds(options.pool_scale)
        run_dit(plan, pools, vae_folder=options.vae, resume=options.resume, device=device)
    if device.type == "cuda":
        logger.info("peak memory %.1f GiB", torch.cuda.max_memory_allocated(device) / 1024**3)


if __name__ == "__main__":
    main()
