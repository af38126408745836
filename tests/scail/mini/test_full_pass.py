from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scail.config import SCAIL_MINI
from scail.mini import full_pass
from scail.mini.vae_stage import fold_normalisation
from scail.models.vae import VideoVae

TOLERANCE = 1e-5  # of values of about 1; both are float32 and add in another order


@pytest.fixture(scope="module")
def vae() -> VideoVae:
    torch.manual_seed(0)
    network = VideoVae.from_config(replace(SCAIL_MINI.vae, base_size=8)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # norms and biases too
    return network


def clip(num_frames: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, num_frames, 16, 24, generator=generator) * 2 - 1


every_length = pytest.mark.parametrize("num_frames", [1, 5, 9, 17])


@every_length
def test_encoding_in_one_pass_is_what_the_library_encodes_chunk_by_chunk(vae, num_frames):
    pixels = clip(num_frames)
    expected = vae.model.encode(pixels).latent_dist

    mean, log_variance = full_pass.encode(vae, pixels)

    assert mean.shape == (2, 16, 1 + (num_frames - 1) // 4, 2, 3)
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(log_variance, expected.logvar, rtol=0, atol=TOLERANCE)


@every_length
def test_decoding_in_one_pass_is_what_the_library_decodes_chunk_by_chunk(vae, num_frames):
    latents = torch.randn(2, 16, 1 + (num_frames - 1) // 4, 2, 3, generator=torch.Generator().manual_seed(2))
    expected = vae.model.decode(latents).sample

    pixels = full_pass.decode(vae, latents)

    assert pixels.shape == (2, 3, num_frames, 16, 24)
    torch.testing.assert_close(pixels.clamp(-1, 1), expected, rtol=0, atol=TOLERANCE)


def test_normalised_latents_are_those_of_the_pipelines_vae(vae):
    pixels = clip(5)

    latents = full_pass.encode_normalised(vae, pixels)

    torch.testing.assert_close(latents, vae.encode(pixels), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(
        full_pass.decode_normalised(vae, latents).clamp(-1, 1), vae.decode(latents), rtol=0, atol=TOLERANCE
    )


def test_gradients_of_a_clip_reach_every_layer():
    vae = VideoVae.from_config(replace(SCAIL_MINI.vae, base_size=8))

    mean, log_variance = full_pass.encode(vae, clip(5))
    (full_pass.decode(vae, mean + log_variance) - clip(5)).square().mean().backward()

    assert [name for name, parameter in vae.named_parameters() if parameter.grad is None] == []


def test_folding_gives_latents_of_mean_zero_and_deviation_one_and_changes_no_picture():
    torch.manual_seed(3)
    vae = VideoVae.from_config(replace(SCAIL_MINI.vae, base_size=8)).requires_grad_(False)
    clips = [clip(5, seed) for seed in range(4)]
    before = vae.decode(vae.encode(clips[0]))
    noise_before = full_pass.encode(vae, clips[0])[1]

    fold_normalisation(vae, clips)

    latents = torch.cat([vae.encode(pixels).transpose(0, 1).flatten(1) for pixels in clips], dim=1)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(dim=1), torch.ones(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(vae.decode(vae.encode(clips[0])), before, rtol=0, atol=1e-4)
    assert not torch.allclose(full_pass.encode(vae, clips[0])[1], noise_before)  # the noise grows with its latents


def test_folding_twice_changes_nothing_more(vae):
    network = VideoVae.from_config(replace(SCAIL_MINI.vae, base_size=8)).requires_grad_(False)
    network.load_state_dict(vae.state_dict())
    fold_normalisation(network, [clip(5)])
    once = {name: value.clone() for name, value in network.state_dict().items()}

    fold_normalisation(network, [clip(5)])

    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-3, atol=1e-3)
