from __future__ import annotations

import pytest
import torch

from scail.config import SCAIL_TINY
from scail.models.vae import VideoVae


@pytest.fixture(scope="module")
def vae() -> VideoVae:
    torch.manual_seed(0)
    return VideoVae.from_config(SCAIL_TINY.vae).eval().requires_grad_(False)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_nine_frames_are_three_latent_frames_and_back(vae, pixels):
    latents = vae.encode(pixels)
    decoded = vae.decode(latents)

    assert latents.shape == (1, 16, 3, 4, 6)
    assert decoded.shape == pixels.shape
    assert decoded.abs().max() <= 1


def test_the_first_latent_frame_knows_nothing_of_later_frames(vae, pixels):
    alone = vae.encode(pixels[:, :, :1])
    of_clip = vae.encode(pixels)[:, :, :1]

    torch.testing.assert_close(alone, of_clip, rtol=0, atol=1e-5)


def test_frames_beyond_the_last_whole_group_of_four_are_ignored(vae, pixels):
    torch.testing.assert_close(vae.encode(pixels[:, :, :8]), vae.encode(pixels[:, :, :5]), rtol=0, atol=0)


def test_latents_are_normalised_by_channel(vae, pixels):
    config = vae.model.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))

    raw = vae.model.encode(pixels).latent_dist.mode()

    latents = vae.encode(pixels)
    torch.testing.assert_close(latents * std + mean, raw)
    torch.testing.assert_close(vae.decode(latents), vae.model.decode(latents * std + mean).sample, rtol=0, atol=1e-4)


def test_latents_are_float32_and_pixels_in_the_dtype_of_the_weights(pixels):
    half = VideoVae.from_config(SCAIL_TINY.vae).to(torch.bfloat16)

    latents = half.encode(pixels)

    assert latents.dtype == torch.float32
    assert half.decode(latents).dtype == torch.bfloat16
