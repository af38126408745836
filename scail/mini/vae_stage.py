"""Training of the miniature's VAE: still pictures first, then clips of 1 to 33 frames side by side.

The pipeline encodes three things: the reference (one frame), the pose video at half size, and in training the clip
itself; so characters and half-size pose pictures are both learnt. Absolute and squared errors of pixels, absolute ones
of their differences to the neighbours, and a trace of KL, so that latents neither grow nor need to be exact.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from scail.config import VaeConfig
from scail.mini import full_pass
from scail.mini.data import (
    LANDSCAPE,
    PORTRAIT,
    Size,
    draw_scenes,
    halve_pose_pictures,
    render_film,
    render_pose_pictures,
)
from scail.mini.film_pool import FilmKind, FilmPool
from scail.mini.loop import Moment, RunPlan, train
from scail.mini.state import AveragedWeights, Progress, RunLog
from scail.models.vae import VideoVae

logger = logging.getLogger(__name__)

STILLS_SHARE = 0.1  # of the first run's time
SQUARE_WEIGHT, GRADIENT_WEIGHT, KL_WEIGHT = 4.0, 0.5, 1e-5
LIT_WEIGHT = 3.0  # of a pixel that is not black, added to 1: the lines of pose pictures are few pixels
FIRST_LOG_VARIANCE = -6.0
LONGEST = 33
CROP = 96
RENEW_EVERY, RENEWED_CLIPS = 8, 8
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class BatchKind:
    """Clips that are learnt from together; every kind is about as much work.

    Attributes:
        size: Of what is cut out of the pool's clips of `film_size`; both before pose pictures are halved.
    """

    num_frames: int
    num_clips: int
    film_size: Size
    size: Size
    pose: bool
    weight: float

    @property
    def input_size(self) -> Size:
        """Of the pictures that the VAE is given."""
        return (self.size[0] // 2, self.size[1] // 2) if self.pose else self.size


def batch_kinds(
    scale: float = 1.0, sizes: tuple[Size, Size] = (PORTRAIT, LANDSCAPE), crop: int = CROP
) -> list[BatchKind]:
    """The mixed plan: lengths, both orientations, characters and pose pictures; `scale` multiplies the batches.

    Four batches of five are small pieces around the characters, the fifth is whole pictures.
    """
    lengths = {1: (64, 0.16), 5: (14, 0.24), 9: (8, 0.24), 17: (4, 0.24), LONGEST: (2, 0.12)}
    kinds = []
    for num_frames, (num_clips, weight) in lengths.items():
        for film_size, share in zip(sizes, (0.65, 0.35), strict=True):
            for pose, part in ((False, 0.78), (True, 0.22)):
                for size, portion in ((film_size, 0.25), ((crop, crop), 0.75)):
                    fitting = film_size[0] * film_size[1] / (size[0] * size[1]) * (4 if pose else 1)
                    number = max(1, round(scale * num_clips * fitting))
                    kinds.append(BatchKind(num_frames, number, film_size, size, pose, weight * share * part * portion))
    return kinds


class Feed:
    """Batches of every kind, cut out of pools."""

    def __init__(self, kinds: list[BatchKind], *, pool_scale: float, seed: int, device: torch.device) -> None:
        longest = max(kind.num_frames for kind in kinds)
        self.pools = {
            (film_size, pose): FilmPool(
                FilmKind(film_size, longest, max(2, round(pool_scale * (500 if pose else 1000))), pose),
                (seed, index),
                device,
            )
            for index, (film_size, pose) in enumerate(sorted({(kind.film_size, kind.pose) for kind in kinds}))
        }

    def batch(self, kind: BatchKind) -> Tensor:
        """Pixels (B, 3, T, H, W)."""
        pool = self.pools[kind.film_size, kind.pose]
        return pool.cut(kind.num_clips, kind.num_frames, kind.input_size)

    def renew(self, number: int) -> None:
        """Renew a little of one pool, each in its turn."""
        list(self.pools.values())[number % len(self.pools)].renew(RENEWED_CLIPS)


def train_vae(
    plan: RunPlan,
    vae: VideoVae,
    progress: Progress,
    kinds: list[BatchKind],
    device: torch.device,
    *,
    pool_scale: float = 1.0,
) -> tuple[AveragedWeights, Progress]:
    """One run of the stage; `vae` is trained in place."""
    feed = Feed(kinds, pool_scale=pool_scale, seed=progress.num_steps, device=device)
    logger.info("pools of %s clips", [pool.kind.num_clips for pool in feed.pools.values()])
    stills = np.array([kind.weight * (kind.num_frames == 1) for kind in kinds])
    mixed = np.array([kind.weight for kind in kinds])
    first = next(index for index, kind in enumerate(kinds) if kind.num_frames > 5 and not kind.pose)
    rng = np.random.default_rng(progress.num_steps)

    def loss_at(moment: Moment) -> dict[str, Tensor]:
        only_stills = progress.num_runs == 0 and moment.share < STILLS_SHARE
        weights = stills if only_stills else mixed
        # A clip comes first: the gradients of its step must reach every layer, and stills pass some by.
        index = first if moment.run_step == 0 else int(rng.choice(len(kinds), p=weights / weights.sum()))
        if moment.run_step % RENEW_EVERY == RENEW_EVERY - 1:
            feed.renew(moment.run_step // RENEW_EVERY)
        return vae_loss(vae, feed.batch(kinds[index]))

    def every_save(average: AveragedWeights, log: RunLog) -> None:
        average.swap()
        scores = evaluate_vae(vae, kinds, device)
        average.swap()
        logger.info("held-out PSNR: %s", " ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        log.write(event="evaluation", **scores)

    average, progress = train(plan, vae, progress, loss_at, every_save=every_save)
    every_save(average, RunLog(plan.folder, plan.stage))
    return average, progress


@torch.no_grad()
def draw_pixels(
    kind: BatchKind, num_clips: int, seed: tuple[int, ...], *, held_out: bool, device: torch.device
) -> Tensor:
    """What the VAE is given of new scenes, whole pictures (N, 3, T, H, W)."""
    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    scenes = draw_scenes(
        mixed_seed, num_clips, num_frames=kind.num_frames, size=kind.film_size, held_out=held_out, device=device
    )
    return halve_pose_pictures(render_pose_pictures(scenes)) if kind.pose else render_film(scenes).pixels


def vae_loss(vae: VideoVae, pixels: Tensor) -> dict[str, Tensor]:
    """Terms of the loss of pixels (B, 3, T, H, W), and the PSNR."""
    with half_precision(pixels.device):
        mean, log_variance = full_pass.encode(vae, pixels)
        mean, log_variance = mean.float(), log_variance.float()
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        decoded = full_pass.decode(vae, latents).float()
    error = decoded - pixels
    weight = 1 + LIT_WEIGHT * (pixels.amax(dim=1, keepdim=True) > -1)
    weight = weight / weight.mean()
    pixel_loss = ((error.abs() + SQUARE_WEIGHT * error.square()) * weight).mean()
    gradient_loss = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {
        "loss": pixel_loss + GRADIENT_WEIGHT * gradient_loss + KL_WEIGHT * kl,
        "pixel_loss": pixel_loss.detach(),
        "kl": kl.detach(),
        "psnr": psnr(decoded.detach(), pixels),
    }


@torch.no_grad()
def evaluate_vae(vae: VideoVae, kinds: list[BatchKind], device: torch.device) -> dict[str, float]:
    """PSNR of held-out whole pictures by kind."""
    scores = {}
    for kind in (kind for kind in kinds if kind.size == kind.film_size):
        pixels = draw_pixels(kind, min(16, 2 * kind.num_clips), (HELD_OUT_SEED,), held_out=True, device=device)
        decoded = torch.cat([reconstruct(vae, part) for part in torch.split(pixels, kind.num_clips)])
        name = f"{'pose' if kind.pose else 'clip'}_{kind.num_frames}x{kind.size[0]}x{kind.size[1]}"
        scores[name] = float(psnr(decoded.clamp(-1, 1), pixels))
    return scores


def reconstruct(vae: VideoVae, pixels: Tensor) -> Tensor:
    """Pixels through the most likely latents and back."""
    with half_precision(pixels.device):
        return full_pass.decode(vae, full_pass.encode(vae, pixels)[0].float()).float()


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """Of values in -1 … 1, in decibel."""
    return 10 * torch.log10(4.0 / (pictures - truth).square().mean().clamp(min=1e-10))


@torch.no_grad()
def fold_normalisation(vae: VideoVae, pixels: list[Tensor]) -> None:
    """Make the normalised latents of such pixels have mean 0 and standard deviation 1 in each channel.

    The pipeline normalises by the official model's statistics. What is missing is an affine map of each channel, and
    it goes into the two 1 × 1 × 1 convolutions at the border of the latents, so that no file has to hold it.
    """
    latents = torch.cat([full_pass.encode(vae, part)[0].double().transpose(0, 1).flatten(1) for part in pixels], dim=1)
    mean, std = latents.mean(dim=1), latents.std(dim=1)
    official_mean, official_std = (
        values.flatten().double() for values in full_pass.latent_statistics(vae, mean.device)
    )
    gain = official_std / std.clamp(min=1e-6)
    offset = official_mean - gain * mean
    into, out_of = vae.model.quant_conv, vae.model.post_quant_conv
    num = len(gain)
    into.bias.copy_(torch.cat((into.bias[:num] * gain + offset, into.bias[num:] + 2 * gain.log())))
    into.weight[:num] *= gain.view(-1, 1, 1, 1, 1)
    kernel = out_of.weight[:, :, 0, 0, 0].double()
    out_of.bias.copy_(out_of.bias - kernel @ (offset / gain))
    out_of.weight.copy_((kernel / gain).view_as(out_of.weight))


@torch.no_grad()
def start_from_nothing(config: VaeConfig) -> VideoVae:
    """A new VAE that can learn at once.

    PyTorch's default weights shrink what passes, and a variance of one drowns it: with them the first thousand steps
    teach nothing but the mean picture.
    """
    vae = VideoVae.from_config(config)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            cast(Tensor, layer.bias).zero_()
    vae.model.quant_conv.weight[config.latent_channels :] = 0.0
    vae.model.quant_conv.bias[config.latent_channels :] = FIRST_LOG_VARIANCE
    return vae


def half_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 where a GPU computes; weights stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
