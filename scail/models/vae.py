"""The Wan 2.1 video VAE: pixels (B, 3, F, H, W) in [-1, 1] and latents (B, 16, f, h, w), normalised by channel.

The network is diffusers' `AutoencoderKLWan`; the normalisation is ours, since that class leaves it to its callers.
Latents enter and leave in float32 whatever the dtype of the weights. The official script rounds mean and 1/std to
bfloat16, which puts 1/std up to 0.4 % off; here both stay float32.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scail.config import VaeConfig


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
        latents = self.model.encode(pixels.to(self.model.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of normalised latents.

        Args:
            latents: (B, 16, f, h, w).

        Returns:
            (B, 3, 1 + 4 · (f - 1), 8 · h, 8 · w) in the dtype of the weights, clamped to [-1, 1] by the library as by
            the official code.
        """
        mean, std = self._statistics(latents)
        return self.model.decode((latents.float() * std + mean).to(self.model.dtype)).sample

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents by channel, each (C, 1, 1, 1)."""
        config = self.model.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=latents.device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
