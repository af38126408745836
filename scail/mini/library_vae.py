"""The VAE as diffusers runs it, a few frames after the other with a cache for every layer: what our pass is held to."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from scail.models.vae import VideoVae


class LibraryVae(VideoVae):
    """The weights of another `VideoVae`, which stay where they are."""

    def encode(self, pixels: Tensor) -> Tensor:
        latents = self.model.encode(pixels.to(self.model.dtype)).latent_dist.mode().float()
        mean, std = self._scales(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._scales(latents)
        return self.model.decode((latents.float() * std + mean).to(self.model.dtype)).sample

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        yield self.decode(latents)

    def _scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents by channel, each (C, 1, 1, 1)."""
        config = self.model.config
        mean, std = (
            like.new_tensor(values).float().view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
