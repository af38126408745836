"""The VAE in one pass over all frames: the same function as the library's chunk by chunk one, and trainable.

The library encodes four frames and decodes one latent frame at a time, and carries the last frames of every layer over.
With a small network a GPU then waits for launches, whatever the batch. Since every layer is causal, the whole clip can
pass at once, if three things are kept: a convolution sees zeros before the first frame; the first frame alone skips the
layers that join or split frames; and those that split see zeros in its place.

Inside this module activations are (B, T, H, W, C), so that frames fold into the batch without a copy and a convolution
over three frames is one over a picture with thrice the channels, which is what GPUs are best at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scail.kernels import reference
from scail.models.vae import VideoVae


def encode(vae: VideoVae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents, as the network gives them: not normalised.

    Args:
        vae: Wan 2.1's architecture, of any size.
        pixels: (B, 3, 1 + 4k, H, W).

    Returns:
        Each (B, 16, 1 + k, H / 8, W / 8).
    """
    encoder = vae.model.encoder
    x = _causal_conv(pixels.permute(0, 2, 3, 4, 1), encoder.conv_in)
    for layer in encoder.down_blocks:
        x = _downsample(x, layer) if hasattr(layer, "resample") else _residual_block(x, layer)
    x = _middle(x, encoder.mid_block)
    x = _causal_conv(_norm_silu(x, encoder.norm_out), encoder.conv_out)
    mean, log_variance = _causal_conv(x, vae.model.quant_conv).permute(0, 4, 1, 2, 3).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)  # as the library's distribution does


def decode(vae: VideoVae, latents: Tensor) -> Tensor:
    """Pixels (B, 3, 1 + 4k, 8 · h, 8 · w) of latents (B, 16, 1 + k, h, w) that are not normalised; not clamped."""
    decoder = vae.model.decoder
    x = _causal_conv(latents.permute(0, 2, 3, 4, 1), vae.model.post_quant_conv)
    x = _middle(_causal_conv(x, decoder.conv_in), decoder.mid_block)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual_block(x, layer)
        if block.upsamplers is not None:
            x = _upsample(x, block.upsamplers[0])
    return _causal_conv(_norm_silu(x, decoder.norm_out), decoder.conv_out).permute(0, 4, 1, 2, 3)


def encode_normalised(vae: VideoVae, pixels: Tensor) -> Tensor:
    """What `VideoVae.encode` returns."""
    mean, std = latent_statistics(vae, pixels.device)
    return (encode(vae, pixels)[0].float() - mean) / std


def decode_normalised(vae: VideoVae, latents: Tensor) -> Tensor:
    """What `VideoVae.decode` returns, before it is clamped."""
    mean, std = latent_statistics(vae, latents.device)
    return decode(vae, latents.float() * std + mean)


def latent_statistics(vae: VideoVae, device: torch.device) -> tuple[Tensor, Tensor]:
    """The official mean and standard deviation by channel, which the pipeline normalises by; each (16, 1, 1, 1)."""
    config = vae.model.config
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def _causal_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """A causal convolution; of a single frame only the last tap sees anything."""
    conv = cast(nn.Conv3d, conv)
    num_taps = conv.kernel_size[0]
    if num_taps == 1 or x.shape[1] == 1:
        return _spatial_conv(x, conv, conv.weight[:, :, -1])
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, num_taps - 1, 0))
    taps = [padded[:, tap : tap + x.shape[1]] for tap in range(num_taps)]
    return _spatial_conv(torch.cat(taps, dim=-1), conv, _stacked(conv))


def _downsample(x: Tensor, layer: nn.Module) -> Tensor:
    pad, conv = cast(nn.Sequential, layer.resample)
    x = _frame_wise(F.pad(x, (0, 0, 0, 1, 0, 1)), cast(nn.Conv2d, conv)) if isinstance(pad, nn.ZeroPad2d) else x
    if layer.mode != "downsample3d" or x.shape[1] == 1:
        return x
    joined = torch.cat((x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]), dim=-1)
    conv_3d = cast(nn.Conv3d, layer.time_conv)
    return torch.cat((x[:, :1], _spatial_conv(joined, conv_3d, _stacked(conv_3d))), dim=1)


def _upsample(x: Tensor, layer: nn.Module) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[1] > 1:
        first, rest = x[:, :1], x[:, 1:]
        split = _causal_conv(rest, cast(nn.Module, layer.time_conv))
        batch, num_frames, height, width, channels = rest.shape
        split = split.view(batch, num_frames, height, width, 2, channels).permute(0, 1, 4, 2, 3, 5)
        x = torch.cat((first, split.reshape(batch, 2 * num_frames, height, width, channels)), dim=1)
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # nearest
    return _frame_wise(x, cast(nn.Conv2d, cast(nn.Sequential, layer.resample)[1]))


def _residual_block(x: Tensor, block: Any) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _causal_conv(x, block.conv_shortcut)
    x = _causal_conv(_norm_silu(x, block.norm1), block.conv1)
    return shortcut + _causal_conv(_norm_silu(x, block.norm2), block.conv2)


def _middle(x: Tensor, block: nn.Module) -> Tensor:
    first, last = cast(nn.ModuleList, block.resnets)
    (attention,) = cast(nn.ModuleList, block.attentions)
    x = _residual_block(x, first)
    x = attention(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)  # frame by frame
    return _residual_block(x, last)


def _norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    gamma = cast(Tensor, norm.gamma).flatten()
    return _fused_norm_silu()(x, gamma) if x.is_cuda else reference.norm_silu(x, gamma)


@lru_cache(maxsize=1)
def _fused_norm_silu() -> Callable[[Tensor, Tensor], Tensor]:
    """One pass over memory forwards and one backwards, in place of about twenty: most of a training step's traffic."""
    return torch.compile(reference.norm_silu, dynamic=True)


def _stacked(conv: nn.Conv3d) -> Tensor:
    """Weights of a convolution over time as those of one over pictures with the frames' channels side by side."""
    return conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)


def _spatial_conv(x: Tensor, conv: nn.Conv3d, weight: Tensor) -> Tensor:
    batch, num_frames = x.shape[:2]
    padding = weight.shape[-1] // 2
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory
    out = F.conv2d(frames, weight.contiguous(memory_format=torch.channels_last), conv.bias, padding=padding)
    out = out.permute(0, 2, 3, 1)
    return out.view(batch, num_frames, *out.shape[1:])


def _frame_wise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    batch, num_frames = x.shape[:2]
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(frames, weight, conv.bias, stride=conv.stride, padding=conv.padding)
    out = out.permute(0, 2, 3, 1)
    return out.view(batch, num_frames, *out.shape[1:])
