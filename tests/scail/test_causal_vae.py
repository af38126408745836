"""Our pass through the VAE against the library's, in whatever pieces the frames go by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from scail.config import SCAIL_14B, SCAIL_MINI, VaeConfig
from scail.models import causal_vae
from scail.models.vae import VideoVae

TOLERANCE = 1e-5  # relative, root of mean squares: both are float32 and add in another order

WHOLE_CLIP, SOME_FRAMES, ONE_FRAME = 10**9, 30_000, 1  # numbers in the largest activation of a piece

CONFIGS = {
    "14b, narrower": replace(SCAIL_14B.vae, base_size=8),
    "mini, narrower": replace(SCAIL_MINI.vae, base_size=8),
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request) -> AutoencoderKLWan:
    config: VaeConfig = request.param
    torch.manual_seed(0)
    network = VideoVae.from_config(config).model.requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # norms and biases too
    return network


@pytest.fixture(params=[WHOLE_CLIP, SOME_FRAMES, ONE_FRAME])
def _piece_size(request, monkeypatch):
    monkeypatch.setattr(causal_vae, "PIECE_NUMBERS", request.param)


every_length = pytest.mark.parametrize("num_frames", [1, 5, 17])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def decode(model: AutoencoderKLWan, latents: Tensor) -> Tensor:
    return torch.cat([*causal_vae.decode(model, latents)], dim=1).permute(0, 4, 1, 2, 3)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


@every_length
@pytest.mark.usefixtures("_piece_size")
def test_encoding_gives_what_the_library_encodes(model, num_frames):
    pixels = random(2, 3, num_frames, 16, 24).clamp(-1, 1)
    expected = model.encode(pixels).latent_dist

    mean, log_variance = causal_vae.encode(model, pixels)

    assert_equal(mean, expected.mean)
    assert_equal(log_variance, expected.logvar)


@every_length
@pytest.mark.usefixtures("_piece_size")
def test_decoding_gives_what_the_library_decodes(model, num_frames):
    latents = random(2, 16, 1 + (num_frames - 1) // 4, 2, 3)

    pixels = decode(model, latents)

    assert_equal(pixels.clamp(-1, 1), model.decode(latents).sample)


def test_a_piece_holds_no_more_than_memory_allows(model, monkeypatch):
    frame_numbers = 16 * 24 * model.config.base_dim
    monkeypatch.setattr(causal_vae, "PIECE_NUMBERS", 4 * frame_numbers)

    lengths = [piece.shape[1] for piece in causal_vae.decode(model, random(1, 16, 6, 2, 3))]

    assert sum(lengths) == 21
    assert max(lengths) == 4


def test_frames_come_before_the_last_latents_are_touched(model, monkeypatch):
    monkeypatch.setattr(causal_vae, "PIECE_NUMBERS", ONE_FRAME)
    latents = random(1, 16, 3, 2, 3)
    broken = latents.clone()
    broken[:, :, 1:] = torch.nan  # whatever comes later, the first frame is the first latent frame's

    first = next(causal_vae.decode(model, broken))

    torch.testing.assert_close(first, next(causal_vae.decode(model, latents)))
