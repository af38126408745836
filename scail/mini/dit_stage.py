"""Training of the miniature's transformer: rectified flow on the latents of the trained VAE, which stays as it is.

Clips are drawn and encoded on the device into a pool, and the pool is renewed bit by bit while it is learnt from.
Velocity is `noise - data`; noise levels are logit-normal, shifted; the text is left empty for one clip in ten.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scail.checkpoint import load_image_encoder, load_text_encoder, load_tokenizer, write_random_checkpoint
from scail.config import ModelConfig
from scail.mini import full_pass
from scail.mini.data import (
    LANDSCAPE,
    PORTRAIT,
    Scenes,
    Size,
    draw_scenes,
    halve_pose_pictures,
    render_film,
    render_pose_pictures,
    render_references,
)
from scail.mini.loop import Moment, RunPlan, train
from scail.mini.renewal import Renewal
from scail.mini.state import AveragedWeights, Progress, RunLog
from scail.mini.vae_stage import HELD_OUT_SEED, half_precision, psnr
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import PromptTokenizer, TextEncoder
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.sampling import NUM_TRAIN_TIMESTEPS, denoise, flow_sigmas
from scail.types import Conditioning

logger = logging.getLogger(__name__)

ENCODER_SEED = 0  # the text and the image encoder are never trained: random, and the same in every checkpoint
TIMESTEP_SHIFT = 3.0
TEXT_DROPOUT = 0.1
TOKENS_PER_BATCH = 52_000  # 64 clips of 17 frames
RENEW_EVERY, RENEWED_CLIPS = 24, 32
SAMPLING_STEPS = 16


@dataclass(frozen=True)
class Encoders:
    """Everything around the transformer, frozen."""

    vae: VideoVae
    text_encoder: TextEncoder
    image_encoder: ImageEncoder
    tokenizer: PromptTokenizer

    @classmethod
    def around(cls, vae: VideoVae, config: ModelConfig, device: torch.device) -> Encoders:
        """The trained VAE and the random encoders that the assembled checkpoint will have."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random"
            write_random_checkpoint(path, config, seed=ENCODER_SEED)
            return cls(
                vae.requires_grad_(False),
                load_text_encoder(path, device=device, dtype=torch.float32),
                load_image_encoder(path, device=device, dtype=torch.float32),
                load_tokenizer(path),
            )

    @torch.no_grad()
    def contexts(self, prompts: tuple[str, ...], device: torch.device) -> Tensor:
        tokens, masks = zip(*(self.tokenizer(prompt) for prompt in prompts), strict=True)
        return self.text_encoder(torch.cat(tokens).to(device), torch.cat(masks).to(device))


class Examples(NamedTuple):
    """N clips as the transformer is given them."""

    latents: Tensor  # (N, 16, f, h, w)
    reference: Tensor  # (N, 16, 1, h, w)
    pose: Tensor  # (N, 16, f, h / 2, w / 2)
    context: Tensor  # (N, L, text_size)
    image: Tensor  # (N, patches + 1, image_size)

    def take(self, index: Tensor) -> Examples:
        return Examples(*(values[index] for values in self))

    def conditioning(self) -> Conditioning:
        return Conditioning(self.context, self.image, self.reference.float(), self.pose)  # its dtype is the rotary's


@dataclass(frozen=True)
class PoolKind:
    """Clips of one length and size; `num_slots` of them are held at a time."""

    num_frames: int
    size: Size
    num_slots: int
    weight: float

    @property
    def num_tokens(self) -> int:
        latent_frames = 1 + (self.num_frames - 1) // 4
        grid = self.size[0] * self.size[1] // 256
        return grid + latent_frames * (grid + grid // 4)


def pool_kinds(scale: float = 1.0, sizes: tuple[Size, Size] = (PORTRAIT, LANDSCAPE)) -> list[PoolKind]:
    portrait, landscape = sizes
    plan = (
        (17, portrait, 3072, 0.5),
        (17, landscape, 1536, 0.2),
        (33, portrait, 768, 0.1),
        (33, landscape, 384, 0.06),
        (9, portrait, 768, 0.09),
        (9, landscape, 384, 0.05),
    )
    return [PoolKind(frames, size, max(2, round(scale * slots)), weight) for frames, size, slots, weight in plan]


class Pool:
    """Encoded clips of one kind in the device's memory; the oldest are renewed first."""

    def __init__(self, kind: PoolKind, encoders: Encoders, device: torch.device, seed: tuple[int, ...]) -> None:
        self.kind, self.encoders, self.device = kind, encoders, device
        self.renewal = Renewal(kind.num_slots, seed, self._draw, drawn_together=RENEWED_CLIPS)
        self.examples = Examples(*self.renewal.values)

    def renew(self) -> None:
        self.renewal.renew(RENEWED_CLIPS)

    def batch(self, num_clips: int) -> Examples:
        return self.examples.take(torch.randint(self.kind.num_slots, (num_clips,), device=self.device))

    def _draw(self, seed: int, num: int) -> Examples:
        scenes = draw_scenes(
            seed, num, num_frames=self.kind.num_frames, size=self.kind.size, held_out=False, device=self.device
        )
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return Examples(*(values.to(dtype) for values in encode_scenes(scenes, self.encoders)[0]))


@torch.no_grad()
def encode_scenes(scenes: Scenes, encoders: Encoders) -> tuple[Examples, Tensor]:
    """Examples of scenes, and the clips' pixels."""
    film, reference = render_film(scenes).pixels, render_references(scenes).pixels
    pose = halve_pose_pictures(render_pose_pictures(scenes))
    with half_precision(film.device):
        latents, reference_latents, pose_latents = (
            full_pass.encode_normalised(encoders.vae, pixels) for pixels in (film, reference, pose)
        )
    context = encoders.contexts(scenes.prompts, film.device)
    image = encoders.image_encoder(reference[:, :, 0])
    return Examples(latents, reference_latents, pose_latents, context, image), film


def train_dit(
    plan: RunPlan,
    transformer: ScailTransformer,
    encoders: Encoders,
    progress: Progress,
    kinds: list[PoolKind],
    device: torch.device,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> tuple[AveragedWeights, Progress]:
    """One run of the stage; `transformer` is trained in place."""
    pools = [Pool(kind, encoders, device, seed=(2, index, progress.num_steps)) for index, kind in enumerate(kinds)]
    logger.info("pool of %d clips", sum(kind.num_slots for kind in kinds))
    weights = np.array([kind.weight for kind in kinds]) / sum(kind.weight for kind in kinds)
    empty = encoders.contexts(("",), device)
    rng = np.random.default_rng(progress.num_steps)

    def loss_at(moment: Moment) -> dict[str, Tensor]:
        if moment.run_step % RENEW_EVERY == RENEW_EVERY - 1:
            pools[int(rng.choice(len(pools), p=weights))].renew()
        pool = pools[int(rng.choice(len(pools), p=weights))]
        examples = pool.batch(max(1, tokens_per_batch // pool.kind.num_tokens))
        return {"loss": flow_loss(transformer, examples, empty)}

    def every_save(average: AveragedWeights, log: RunLog) -> None:
        average.swap()
        scores = evaluate_dit(transformer, encoders, kinds[0], device)
        average.swap()
        logger.info("held-out: %s", " ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        log.write(event="evaluation", **scores)

    average, progress = train(plan, transformer, progress, loss_at, weight_decay=0.01, every_save=every_save)
    every_save(average, RunLog(plan.folder, plan.stage))
    return average, progress


def flow_loss(transformer: ScailTransformer, examples: Examples, empty_context: Tensor) -> Tensor:
    """Mean squared error of the velocity at random noise levels."""
    data = examples.latents.float()
    num = len(data)
    sigmas = torch.randn(num, device=data.device).sigmoid()
    sigmas = TIMESTEP_SHIFT * sigmas / (1 + (TIMESTEP_SHIFT - 1) * sigmas)
    noise = torch.randn_like(data)
    levels = sigmas.view(-1, 1, 1, 1, 1)
    silent = torch.rand(num, 1, 1, device=data.device) < TEXT_DROPOUT
    examples = examples._replace(
        context=torch.where(silent, empty_context.to(examples.context.dtype), examples.context)
    )
    with half_precision(data.device):
        prepared = transformer.prepare(examples.conditioning())
        velocity = transformer((1 - levels) * data + levels * noise, NUM_TRAIN_TIMESTEPS * sigmas, prepared)
    return F.mse_loss(velocity.float(), noise - data)


@torch.no_grad()
def sample(
    transformer: ScailTransformer, examples: Examples, num_steps: int = SAMPLING_STEPS, shift: float = 5.0
) -> Tensor:
    """Latents (N, 16, f, h, w) by Euler's method, without guidance, from noise that is always the same."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(examples.latents.shape, generator=generator).to(examples.latents.device)
    with half_precision(noise.device):
        prepared = transformer.prepare(examples.conditioning())

        def predict_velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            velocity: Tensor = transformer(latents, timestep.expand(len(latents)), prepared)
            return velocity.float()

        return denoise(predict_velocity, noise, flow_sigmas(num_steps, shift))


@torch.no_grad()
def evaluate_dit(
    transformer: ScailTransformer, encoders: Encoders, kind: PoolKind, device: torch.device, num_clips: int = 8
) -> dict[str, float]:
    """Loss and samples of held-out clips: PSNR against the truth, beside that of the VAE alone."""
    scenes = held_out_scenes(kind, num_clips, device)
    examples, film = encode_scenes(scenes, encoders)
    torch.manual_seed(0)
    loss = flow_loss(transformer, examples, encoders.contexts(("",), device))
    latents = sample(transformer, examples)
    with half_precision(device):
        sampled = full_pass.decode_normalised(encoders.vae, latents).float().clamp(-1, 1)
        ceiling = full_pass.decode_normalised(encoders.vae, examples.latents).float().clamp(-1, 1)
    return {
        "held_out_loss": float(loss),
        "sample_psnr": float(psnr(sampled, film)),
        "vae_psnr": float(psnr(ceiling, film)),
        "latent_rms_error": float((latents - examples.latents).square().mean().sqrt()),
        "latent_std": float(examples.latents.std()),
    }


def held_out_scenes(kind: PoolKind, num_clips: int, device: torch.device) -> Scenes:
    return draw_scenes(
        HELD_OUT_SEED, num_clips, num_frames=kind.num_frames, size=kind.size, held_out=True, device=device
    )


def start_from_nothing(config: ModelConfig) -> ScailTransformer:
    """A new transformer whose first prediction is zero."""
    transformer = ScailTransformer(config.transformer)
    nn.init.zeros_(transformer.head.linear.weight)
    nn.init.zeros_(transformer.head.linear.bias)
    return transformer
