"""Our pass through the VAE against the library's, in whatever pieces the frames go by."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LargestTotal(TorchDispatchMode):
    """Bytes of all tensors that were alive at once, of those that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.largest = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self._add(-num_bytes)

    def _add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.largest = max(self.largest, self.num_bytes)


def test_the_largest_clip_is_decoded_within_four_gib(monkeypatch):
    """Counted on the meta device, with the shapes that the kernels make; an H100 reported 2 % less than this count."""

    def window(x, _gamma, past):
        batch, num_frames, height, width, size = x.shape
        shape = (batch, 2, height + 2, width + 2, size)
        return x.new_empty((batch, num_frames + 2, *shape[2:])), x.new_empty(shape) if past is None else past

    def conv(window, weight, _bias, residual=None):  # held by the caller while the kernel runs
        batch, num_frames, height, width, _ = window.shape
        return window.new_empty((batch, num_frames - 2, height - 2, width - 2, len(weight)))

    def upsampled(window, weight, _bias):
        batch, num_frames, height, width, _ = window.shape
        return window.new_empty((batch, num_frames, 2 * height - 4, 2 * width - 4, len(weight)))

    monkeypatch.setattr(causal_vae.kernels, "norm_silu_window", window)
    monkeypatch.setattr(causal_vae.kernels, "window_conv", conv)
    monkeypatch.setattr(causal_vae.kernels, "upsampled_conv", upsampled)
    monkeypatch.setattr(causal_vae.F, "scaled_dot_product_attention", lambda query, _key, _value: query.clone())
    with torch.device("meta"):
        vae = VideoVae.from_config(SCAIL_14B.vae).to(torch.bfloat16).requires_grad_(False)
        latents = torch.empty(1, 16, 21, 64, 112)

    with LargestTotal() as total:
        num_frames = sum(pixels.shape[2] for pixels in vae.decode_pieces(latents))

    assert num_frames == 81
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert 3.0 < (weights + total.largest) / 2**30 < 4.0
