"""The values that cross module borders, and the glossary of their axes.

B C F H W   pixels: batch, colour, frame, row, column
b c f h w   the latent grid; (B, C, F, H, W) everywhere inside `scail`
L D         tokens: sequence, width
frames      uint8 (F, H, W, 3) RGB, only at the border of `scail`

81 frames at 512 x 896 are 21 x 64 x 112 latents and 1,792 reference + 37,632 video + 9,408 pose = 48,832 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scail.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, TransformerConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class LatentShape:
    """The latent grid of a clip."""

    num_frames: int
    height: int
    width: int

    @classmethod
    def of_clip(cls, num_frames: int, height: int, width: int) -> LatentShape:
        """The grid of `num_frames` pictures; trailing frames beyond 1 + 4k have no latent frame of their own."""
        return cls(1 + (num_frames - 1) // TEMPORAL_STRIDE, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)

    @property
    def num_output_frames(self) -> int:
        return 1 + TEMPORAL_STRIDE * (self.num_frames - 1)


def num_tokens(config: TransformerConfig, shape: LatentShape) -> int:
    """Reference, video and pose tokens of a clip."""
    grid = (shape.height // config.patch_size) * (shape.width // config.patch_size)
    return grid + shape.num_frames * grid + shape.num_frames * grid // 4


@dataclass(frozen=True)
class ClipPixels:
    """A clip's reference and pose as the encoders read them, on the CPU.

    Attributes:
        reference: Float32 (1, 3, 1, H, W), about -1 … 1.
        pose: Float32 (1, 3, F, H / 2, W / 2) in -1 … 1.
    """

    reference: Tensor
    pose: Tensor

    @property
    def num_frames(self) -> int:
        return self.pose.shape[2]

    @property
    def shape(self) -> LatentShape:
        return LatentShape.of_clip(self.num_frames, *self.reference.shape[-2:])

    def describe(self) -> str:
        height, width = self.reference.shape[-2:]
        return f"{self.num_frames} frames of {height} x {width}"


@dataclass(frozen=True)
class Conditioning:
    """What the transformer is conditioned on, for one side of the guidance.

    Attributes:
        context: Text states (B, L, text_size); padded positions are exact zeros and are attended.
        image_embeds: Image encoder states (B, N, image_size), class token first.
        reference_latents: (B, 16, 1, h, w), normalised.
        pose_latents: (B, 16, f, h/2, w/2), normalised.
    """

    context: Tensor
    image_embeds: Tensor
    reference_latents: Tensor
    pose_latents: Tensor


@dataclass(frozen=True)
class ScailOutput:
    """One rendered clip.

    Attributes:
        frames: uint8 (F', H, W, 3), RGB.
        latents: float32 (1, 16, f, h, w) on the CPU, what the frames were decoded from.
        seconds: Time by stage, in the order in which the stages ran.
        peak_memory_gib: Most device memory held at once; on a CPU, the process's peak resident size.
        num_dropped_frames: Trailing pose frames without a latent frame of their own, 0 to 3.
    """

    frames: NDArray[np.uint8]
    latents: Tensor
    seconds: dict[str, float]
    peak_memory_gib: float
    num_dropped_frames: int
