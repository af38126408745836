"""The Wan 2.1 video VAE: pixels (B, 3, F, H, W) in [-1, 1] and latents (B, 16, f, h, w), normalised by channel.

Weights and their names are those of diffusers' `AutoencoderKLWan`, the pass through them is ours (`causal_vae`), and so
is the normalisation, which that class leaves to its callers. Latents enter and leave in float32 whatever the dtype of
the weights. The official script rounds mean and 1/std to bfloat16, which puts 1/std up to 0.4 % off; here both stay
float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scail.config import TEMPORAL_STRIDE, VaeConfig
from scail.models import causal_vae


class VideoVae(nn.Module):
    """Encodes and decodes on the device of its input."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_config(cls, config: VaeConfig) -> VideoVae:
        return cls(
            AutoencoderKLWan(
                base_dim=config.base_size,
                z_dim=config.latent_channels,
                dim_mult=list(config.channel_multipliers),
                num_res_blocks=config.num_res_blocks,
                temperal_downsample=list(config.temporal_downsample),
            )
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """The most likely latents of `pixels`, normalised.

        Args:
            pixels: (B, 3, F, H, W) in [-1, 1]; H and W multiples of 8. Frames beyond the last 1 + 4k are ignored.

        Returns:
            Float32 (B, 16, 1 + (F - 1) // 4, H / 8, W / 8).
        """
        num_frames = 1 + (pixels.shape[2] - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
        means, _ = causal_vae.encode(self.model, pixels[:, :, :num_frames].to(self.model.dtype))
        mean, std = self._statistics(pixels.device)
        return (means.float() - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of normalised latents.

        Args:
            latents: (B, 16, f, h, w).

        Returns:
            (B, 3, 1 + 4 · (f - 1), 8 · h, 8 · w) in the dtype of the weights, clamped to [-1, 1] as officially.
        """
        return torch.cat([*self.decode_pieces(latents)], dim=2)

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """The pixels of `decode`, a few frames at a time, so that memory holds neither the clip nor its layers."""
        mean, std = self._statistics(latents.device)
        for piece in causal_vae.decode(self.model, (latents.float() * std + mean).to(self.model.dtype)):
            yield piece.clamp(-1, 1).permute(0, 4, 1, 2, 3)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents by channel, each (C, 1, 1, 1)."""
        config = self.model.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
