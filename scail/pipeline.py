"""One clip, from pixels to pixels. `ScailPipeline.render` is the table of contents of a render."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scail import preprocess
from scail.checkpoint import load_networks, load_tokenizer
from scail.config import (
    EXACT,
    OFFICIAL,
    PROFILES,
    SPATIAL_STRIDE,
    PlacementPolicy,
    Quantization,
    RuntimeConfig,
    SamplingParams,
    Solver,
)
from scail.encodings import EncodingCache
from scail.errors import InvalidInputError, OutOfMemoryError
from scail.fingerprint import read_loras, read_quantization
from scail.memory import Placement
from scail.models.attention import choose_attention
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import TextEncoder
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.quantization import is_fast_on
from scail.sampling import denoise, flow_sigmas, guide
from scail.timing import StageClock
from scail.types import ClipPixels, Conditioning, LatentShape, ScailOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScailPipeline:
    """A SCAIL model and what it needs around it. Frozen: a render changes nothing in it.

    Attributes:
        device: Where every stage computes.
        dtype: Of weights and activations; latents, guidance and the Euler steps are float32 whatever it is.
        attention: The backend that was chosen, for the record.
        quantization: Of the transformer's matrix products, likewise.
        placement: Who owns the weights' places; without one they are all on the device.
        loras: In the weights, each as name and strength, for the record.
    """

    transformer: ScailTransformer
    vae: VideoVae
    text_encoder: TextEncoder
    image_encoder: ImageEncoder
    tokenizer: Callable[[str], tuple[Tensor, Tensor]]  # token ids and mask, each (1, 512)
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"
    quantization: Quantization = "none"
    placement: Placement | None = None
    loras: tuple[str, ...] = ()

    @property
    def memory(self) -> PlacementPolicy:
        """The memory policy in force."""
        return self.placement.policy if self.placement else "resident"

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_dir: str | Path,
        *,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        profile: str | None = None,
        runtime: RuntimeConfig = EXACT,
        wait_for: Callable[[str], None] | None = None,
    ) -> ScailPipeline:
        """Load a checkpoint folder, as `scail convert` writes it.

        Args:
            checkpoint_dir: The folder.
            device: Where every stage computes.
            dtype: Of weights and activations.
            profile: A name of `PROFILES`, whose arithmetic is taken as far as it can be had; its sampling is
                `PROFILES[profile].sampling`, to be given with each clip.
            runtime: How the model is run.
            wait_for: Called with a component's folder before the weights in it are looked at, so that they may still
                be on their way when the loading begins. The other files must be there.

        Raises:
            CheckpointError: If a file or a weight is missing, extra, misshapen or unreadable, or a LoRA does not fit.
            InvalidInputError: If there is no such profile, or the checkpoint is quantised, and a LoRA or another
                arithmetic is asked for.
            OutOfMemoryError: If the device has no room for the weights under the memory policy.
        """
        path, device = Path(checkpoint_dir), torch.device(device)
        if profile is not None:
            if profile not in PROFILES:
                raise InvalidInputError(f"profile is {profile!r}; expected one of {', '.join(PROFILES)}.")
            runtime = attainable(PROFILES[profile].applied_to(runtime), path, device)
        tokenizer = load_tokenizer(path)
        try:
            networks = load_networks(path, device=device, dtype=dtype, runtime=runtime, wait_for=wait_for)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"the weights do not fit as {runtime.memory}: {error}") from error
        return cls(
            transformer=networks.transformer,
            attention=prepare_transformer(networks.transformer, device, dtype, runtime),
            vae=networks.vae,
            text_encoder=networks.text_encoder,
            image_encoder=networks.image_encoder,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            quantization=networks.quantization,
            placement=networks.placement,
            loras=(*read_loras(path), *(lora.name for lora in runtime.loras)),
        )

    def __call__(
        self,
        reference: NDArray[np.uint8],
        pose: NDArray[np.uint8],
        prompt: str,
        *,
        negative_prompt: str = "",
        params: SamplingParams = OFFICIAL,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        on_frames: Callable[[NDArray[np.uint8]], None] | None = None,
        encodings: EncodingCache | None = None,
    ) -> ScailOutput:
        """Render one clip.

        Args:
            reference: uint8 (H, W, 3), RGB: the character.
            pose: uint8 (F, H, W, 3), RGB: the rendered pose video, 1 to 81 frames. Of F frames the first
                1 + 4·((F - 1) // 4) are rendered, as the official code does.
            prompt: May be empty.
            negative_prompt: Empty in the official recipe.
            params: Steps, guidance, shift, seed.
            size: (height, width), multiples of 32; the official rule by the reference's orientation if absent.
            on_step: Called after each step with the steps done and their number; it may raise `Interrupted`.
            on_frames: Called with uint8 (n, H, W, 3) frames as they are decoded, in order, while the next ones are
                still being computed; until it returns, no more are asked for.
            encodings: Of earlier clips; what this one shares with them is not encoded again.

        Raises:
            InvalidInputError: Before anything slow runs, if sizes, types or frame counts do not fit.
            OutOfMemoryError: If the device has too little memory.
            GenerationError: If latents or pixels are not finite.
        """
        clock = StageClock(self.device)
        with clock.stage("preprocess"):
            pixels = preprocess.clip_pixels(reference, pose, size)
        output = self.render(
            pixels,
            prompt,
            negative_prompt=negative_prompt,
            params=params,
            on_step=on_step,
            on_frames=on_frames,
            encodings=encodings,
        )
        return replace(output, seconds=clock.seconds | output.seconds)

    @torch.inference_mode()
    def render(
        self,
        pixels: ClipPixels,
        prompt: str,
        *,
        negative_prompt: str = "",
        params: SamplingParams = OFFICIAL,
        on_step: Callable[[int, int], None] | None = None,
        on_frames: Callable[[NDArray[np.uint8]], None] | None = None,
        encodings: EncodingCache | None = None,
    ) -> ScailOutput:
        """The clip of pixels that `preprocess.clip_pixels` made, on the CPU, while the GPU had other work.

        Everything else is as for a call of the pipeline.
        """
        sigmas = flow_sigmas(params.num_inference_steps, params.shift)
        encode = (encodings or EncodingCache(max_bytes=0)).get
        clock = StageClock(self.device)
        try:
            with clock.stage("encode_text"):
                context = encode("prompt", self.encode_prompt, prompt, kind="text")
                negative_context = (
                    encode("negative_prompt", self.encode_prompt, negative_prompt, kind="text")
                    if params.guidance_scale > 1
                    else None
                )
            with clock.stage("encode_image"):
                image_embeds = encode("image", self.encode_image, pixels.reference)
                reference_latents = encode("reference", self.encode_latents, pixels.reference)
            with clock.stage("encode_pose"):
                pose_latents = encode("pose", self.encode_latents, pixels.pose)
            with clock.stage("denoise"):
                conditioning = Conditioning(context, image_embeds, reference_latents, pose_latents)
                noise = seeded_noise(pixels.shape, params.seed)
                latents = self.generate(
                    conditioning,
                    negative_context,
                    noise,
                    sigmas,
                    guidance_scale=params.guidance_scale,
                    solver=params.solver,
                    on_step=on_step,
                )
            with clock.stage("decode_latents"):
                frames = collect(self.decode_pieces(latents), pixels.shape, on_frames)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{pixels.describe()} do not fit: {error}") from error
        return ScailOutput(
            frames=frames,
            latents=latents.cpu(),
            seconds=clock.seconds,
            peak_memory_gib=clock.peak_memory_gib(),
            num_dropped_frames=pixels.num_frames - pixels.shape.num_output_frames,
        )

    def encode_prompt(self, prompt: str) -> Tensor:
        """Text states (1, 512, text_size) of a prompt; padded positions are exact zeros."""
        token_ids, mask = self.tokenizer(prompt)
        return self.text_encoder(token_ids.to(self.device), mask.to(self.device)).to(self.dtype)

    def encode_image(self, reference_pixels: Tensor) -> Tensor:
        """Image states (1, N, image_size) of reference pixels (1, 3, 1, H, W)."""
        return self.image_encoder(reference_pixels[:, :, 0].to(self.device, self.dtype)).to(self.dtype)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Normalised latents (1, 16, f, H / 8, W / 8) of pixels (1, 3, F, H, W)."""
        return self.vae.encode(pixels.to(self.device, self.dtype)).to(self.dtype)

    def generate(
        self,
        conditioning: Conditioning,
        negative_context: Tensor | None,
        noise: Tensor,
        sigmas: Tensor,
        *,
        guidance_scale: float,
        solver: Solver = "euler",
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents, float32 (1, 16, f, h, w), from noise of that shape; no guidance without a negative context."""
        prepared = self.transformer.prepare(conditioning)
        sides = [prepared]
        if negative_context is not None:
            sides.insert(0, self.transformer.with_context(prepared, negative_context))

        def predict_velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            velocities = self.transformer.velocities(latents.to(self.dtype), timestep[None], sides)
            if len(velocities) == 1:
                return velocities[0].float()
            unconditional, conditional = (velocity.float() for velocity in velocities)
            return guide(unconditional, conditional, guidance_scale)

        return denoise(predict_velocity, noise.to(self.device), sigmas, on_step, solver)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """uint8 (F', H, W, 3) frames of latents (1, 16, f, h, w)."""
        return np.concatenate([*self.decode_pieces(latents)])

    def decode_pieces(self, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        """The frames of `decode`, a few at a time, each when it is there."""
        return preprocess.to_frames(self.vae.decode_pieces(latents))


def attainable(runtime: RuntimeConfig, checkpoint_dir: Path, device: torch.device) -> RuntimeConfig:
    """Quantised as the checkpoint is, if it is; not at all where the device would be no faster for it."""
    if runtime.quantization == "none":
        return runtime
    if (stored := read_quantization(checkpoint_dir)) != "none":
        return replace(runtime, quantization=stored)
    if is_fast_on(device, runtime.quantization):
        return runtime
    logger.warning("%s is not fast on %s: its matrix products stay exact", runtime.quantization, device)
    return replace(runtime, quantization="none")


def prepare_transformer(
    transformer: ScailTransformer, device: torch.device, dtype: torch.dtype, runtime: RuntimeConfig
) -> str:
    """Give the fastest attention, compile: as `runtime` says. Returns the attention's name."""
    attention = choose_attention(device, dtype, runtime.attention)
    transformer.use_attention(attention)
    if runtime.compiled:
        transformer.compile_blocks()
    return attention


def seeded_noise(shape: LatentShape, seed: int) -> Tensor:
    """Unit Gaussian noise (1, 16, f, h, w), float32; drawn on the CPU, so that a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, shape.num_frames, shape.height, shape.width, generator=generator)


def collect(
    pieces: Iterator[NDArray[np.uint8]], shape: LatentShape, on_frames: Callable[[NDArray[np.uint8]], None] | None
) -> NDArray[np.uint8]:
    """All frames of a clip; each piece is handed on as soon as it is there."""
    size = (shape.num_output_frames, shape.height * SPATIAL_STRIDE, shape.width * SPATIAL_STRIDE, 3)
    frames, start = np.empty(size, np.uint8), 0
    for piece in pieces:
        part = frames[start : start + len(piece)]
        part[:] = piece
        start += len(piece)
        if on_frames is not None:
            on_frames(part)
    assert start == len(frames), "the VAE gives 1 + 4k frames"
    return frames
