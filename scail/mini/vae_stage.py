"""Training of the miniature's VAE: still pictures first, then clips of 1 to 33 frames side by side.

The pipeline encodes three things: the reference (one frame), the pose video at half size, and in training the clip
itself; so characters and half-size pose pictures are both learnt. L1 on pixels and on their differences to the
neighbours, and a trace of KL, so that latents neither grow nor need to be exact.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
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
from scail.mini.loop import Moment, RunPlan, train
from scail.mini.state import AveragedWeights, Progress, RunLog
from scail.models.vae import VideoVae

logger = logging.getLogger(__name__)

STILLS_SHARE = 0.12  # of the first run's time
GRADIENT_WEIGHT, KL_WEIGHT = 0.5, 1e-5
FIRST_LOG_VARIANCE = -6.0
ROUNDS = 8  # batches drawn at once, so that the drawing's few waits for the device are rare
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class BatchKind:
    """Clips that are learnt from together; every kind is about as much work."""

    num_frames: int
    num_clips: int
    size: Size
    pose: bool
    weight: float


def batch_kinds(scale: float = 1.0, sizes: tuple[Size, Size] = (PORTRAIT, LANDSCAPE)) -> list[BatchKind]:
    """The mixed plan: lengths, both orientations, characters and pose pictures; `scale` multiplies the batches."""
    lengths = {1: (64, 0.15), 5: (14, 0.25), 9: (8, 0.2), 17: (4, 0.28), 33: (2, 0.12)}
    return [
        BatchKind(num_frames, max(1, round(scale * num_clips * (4 if pose else 1))), size, pose, weight * share * part)
        for num_frames, (num_clips, weight) in lengths.items()
        for size, share in zip(sizes, (0.65, 0.35), strict=True)
        for pose, part in ((False, 0.75), (True, 0.25))
    ]


def train_vae(
    plan: RunPlan, vae: VideoVae, progress: Progress, kinds: list[BatchKind], device: torch.device
) -> tuple[AveragedWeights, Progress]:
    """One run of the stage; `vae` is trained in place."""
    feeds = [clip_feed(kind, seed=(index, progress.num_steps), device=device) for index, kind in enumerate(kinds)]
    stills = np.array([kind.weight * (kind.num_frames == 1) for kind in kinds])
    mixed = np.array([kind.weight for kind in kinds])
    first = next(index for index, kind in enumerate(kinds) if kind.num_frames > 5 and not kind.pose)
    rng = np.random.default_rng(progress.num_steps)

    def loss_at(moment: Moment) -> dict[str, Tensor]:
        only_stills = progress.num_runs == 0 and moment.share < STILLS_SHARE
        weights = stills if only_stills else mixed
        # A clip comes first: the gradients of its step must reach every layer, and stills pass some by.
        index = first if moment.run_step == 0 else int(rng.choice(len(kinds), p=weights / weights.sum()))
        return vae_loss(vae, next(feeds[index]))

    def every_save(average: AveragedWeights, log: RunLog) -> None:
        average.swap()
        scores = evaluate_vae(vae, kinds, device)
        average.swap()
        logger.info("held-out PSNR: %s", " ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        log.write(event="evaluation", **scores)

    average, progress = train(plan, vae, progress, loss_at, every_save=every_save)
    every_save(average, RunLog(plan.folder, plan.stage))
    return average, progress


def clip_feed(kind: BatchKind, *, seed: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    """Batches of pixels (B, 3, T, H, W) without end, drawn several at a time."""
    for number in itertools.count():
        pixels = draw_pixels(kind, kind.num_clips * ROUNDS, (*seed, number), held_out=False, device=device)
        yield from torch.split(pixels, kind.num_clips)


@torch.no_grad()
def draw_pixels(
    kind: BatchKind, num_clips: int, seed: tuple[int, ...], *, held_out: bool, device: torch.device
) -> Tensor:
    """What the VAE is given of new scenes."""
    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    scenes = draw_scenes(
        mixed_seed, num_clips, num_frames=kind.num_frames, size=kind.size, held_out=held_out, device=device
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
    pixel_loss = error.abs().mean()
    gradient_loss = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {
        "loss": pixel_loss + GRADIENT_WEIGHT * gradient_loss + KL_WEIGHT * kl,
        "l1": pixel_loss.detach(),
        "kl": kl.detach(),
        "psnr": psnr(decoded.detach(), pixels),
    }


@torch.no_grad()
def evaluate_vae(vae: VideoVae, kinds: list[BatchKind], device: torch.device) -> dict[str, float]:
    """PSNR of held-out clips by kind."""
    scores = {}
    for kind in kinds:
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
