"""Our pass through the VAE's network: frames go by in pieces, and every layer keeps the last ones that it saw.

The weights and their layout are the library's; so is the function, but for the order of sums. The library takes one
latent frame after another through all layers. Here every level of the network takes as many frames at once as its
memory allows: a GPU wants large pictures, and the largest ones are what memory is spent on.

Activations are (B, T, H, W, C). What a causal convolution reads is a window: the two frames before, zeros at the start
of a clip, and then the new ones, with a border of zeros around each; the norm before the convolution writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scail import kernels

# Numbers in the largest activation of a piece: four frames of 512 x 896 with 96 channels, 352 MB in bfloat16.
PIECE_NUMBERS = 4 * 512 * 896 * 96

Past = dict[nn.Module, Tensor]  # by layer, the end of what it has read


def encode(model: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents, as the network gives them: not normalised.

    Args:
        model: Wan 2.1's architecture, of any size.
        pixels: (B, 3, 1 + 4k, H, W).

    Returns:
        Each (B, 16, 1 + k, H / 8, W / 8).
    """
    past: Past = {}
    batch, _, num_frames, height, width = pixels.shape
    per_group = 4 * batch * height * width * model.encoder.conv_in.out_channels  # four frames are one latent frame
    size = 4 * max(1, PIECE_NUMBERS // per_group)
    pieces = pixels.permute(0, 2, 3, 4, 1).tensor_split([*range(1 + size, num_frames, size)], dim=1)
    encoded = torch.cat([_encode_piece(model, piece, past) for piece in pieces], dim=1)
    mean, log_variance = encoded.permute(0, 4, 1, 2, 3).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)  # as the library's distribution does


def decode(model: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """Pixels of latents (B, 16, 1 + k, h, w) that are not normalised, a few frames at a time.

    Yields:
        (B, n, 8 · h, 8 · w, 3), not clamped; 1 + 4k frames in all.
    """
    past: Past = {}
    decoder = model.decoder
    x = _frame_wise(latents.permute(0, 2, 3, 4, 1), model.post_quant_conv)
    x = _middle(_causal(x, decoder.conv_in, past), decoder.mid_block, past)
    for piece in _rise(x, [*decoder.up_blocks], past):
        pixels = _causal(piece, decoder.conv_out, past, norm=decoder.norm_out)
        del piece  # it would wait for the next one
        yield pixels


def _rise(x: Tensor, blocks: Sequence[Any], past: Past) -> Iterator[Tensor]:
    """What comes out of the last block, each block taking as many frames at once as its memory allows."""
    if not blocks:
        yield x
        return
    block, *rest = blocks
    batch, _, height, width, _ = x.shape
    pieces = [*torch.split(x, max(1, PIECE_NUMBERS // (batch * height * width * _cost(block))), dim=1)]
    del x  # a piece is given up by whoever works on it, as soon as it can be
    while pieces:
        yield from _rise(_up(pieces.pop(0), block, past), rest, past)


def _cost(block: Any) -> int:
    """Numbers that a level puts out for one pixel of one frame that it reads; more, where they wait for the next."""
    if block.upsamplers is None:
        return cast(int, block.resnets[-1].out_dim)
    (upsampler,) = block.upsamplers
    frames = 2 if upsampler.mode == "upsample3d" else 1
    return cast(int, frames * frames * 4 * upsampler.resample[1].out_channels)


def _up(x: Tensor, block: Any, past: Past) -> Tensor:
    for resnet in block.resnets:
        x = _residual_block(x, resnet, past)
    return x if block.upsamplers is None else _upsample(x, block.upsamplers[0], past)


def _encode_piece(model: AutoencoderKLWan, x: Tensor, past: Past) -> Tensor:
    """Means and log variances side by side, (B, t, h, w, 32)."""
    encoder = model.encoder
    x = _causal(x, encoder.conv_in, past)
    for layer in encoder.down_blocks:
        x = _downsample(x, layer, past) if hasattr(layer, "resample") else _residual_block(x, layer, past)
    x = _middle(x, encoder.mid_block, past)
    x = _causal(x, encoder.conv_out, past, norm=encoder.norm_out)
    return _frame_wise(x, model.quant_conv)


def _causal(x: Tensor, conv: nn.Module, past: Past, *, norm: nn.Module | None = None) -> Tensor:
    """A convolution over three frames of `x`, or of SiLU of its norm."""
    conv = cast(nn.Conv3d, conv)
    return kernels.window_conv(_window(x, conv, past, norm), conv.weight, cast(Tensor, conv.bias))


def _residual_block(x: Tensor, block: Any, past: Past) -> Tensor:
    inner = _causal(x, block.conv1, past, norm=block.norm1)
    window = _window(inner, block.conv2, past, block.norm2)
    del inner  # a large piece's worth of memory
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _frame_wise(x, block.conv_shortcut)
    return kernels.window_conv(window, block.conv2.weight, block.conv2.bias, residual=shortcut)


def _window(x: Tensor, conv: nn.Module, past: Past, norm: nn.Module | None) -> Tensor:
    gamma = None if norm is None else cast(Tensor, norm.gamma).flatten()
    window, past[conv] = kernels.norm_silu_window(x, gamma, past.get(conv))
    return window


def _middle(x: Tensor, block: Any, past: Past) -> Tensor:
    first, last = block.resnets
    (attention,) = block.attentions
    x = _residual_block(x, first, past)
    x = _attend(x, attention)
    return _residual_block(x, last, past)


def _attend(x: Tensor, attention: Any) -> Tensor:
    """Self-attention of one head within each frame."""
    batch, num_frames, height, width, size = x.shape
    tokens = x.view(batch * num_frames, 1, height * width, size)
    normed = F.rms_norm(tokens.float(), (size,), attention.norm.gamma.flatten().float(), 1e-12).to(x.dtype)
    query, key, value = F.linear(normed, attention.to_qkv.weight.flatten(1), attention.to_qkv.bias).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(query, key, value)
    return (tokens + F.linear(attended, attention.proj.weight.flatten(1), attention.proj.bias)).view(x.shape)


def _downsample(x: Tensor, layer: Any, past: Past) -> Tensor:
    """Half the size; and, but for the clip's first frame, half the frames."""
    pad, conv = layer.resample
    assert isinstance(pad, nn.ZeroPad2d)
    x = _frame_wise(F.pad(x, (0, 0, 0, 1, 0, 1)), conv)
    if layer.mode != "downsample3d":
        return x
    before = past.get(layer)
    past[layer] = x[:, -1:].clone()
    first = x[:, :0] if before is not None else x[:, :1]
    seen = x if before is None else torch.cat((before, x), dim=1)
    joined = torch.cat((seen[:, 0:-2:2], seen[:, 1:-1:2], seen[:, 2::2]), dim=-1)
    return torch.cat((first, _over_time(joined, layer.time_conv)), dim=1)


def _upsample(x: Tensor, layer: Any, past: Past) -> Tensor:
    """Twice the size; and, but for the clip's first frame, twice the frames."""
    if layer.mode == "upsample3d":
        x = _split_frames(x, layer, past)
    conv = layer.resample[1]
    return kernels.upsampled_conv(F.pad(x, (0, 0, 1, 1, 1, 1)), conv.weight, conv.bias)


def _split_frames(x: Tensor, layer: Any, past: Past) -> Tensor:
    """Two frames of each; the first of a clip stays alone, and those after it see zeros in its place."""
    batch, _, height, width, size = x.shape
    first = x[:, :0]
    if layer not in past:
        first, x = x[:, :1], x[:, 1:]
        past[layer] = x.new_zeros((batch, 2, height, width, size))
    seen = torch.cat((past[layer], x), dim=1)
    past[layer] = seen[:, -2:].clone()
    split = _over_time(torch.cat((seen[:, :-2], seen[:, 1:-1], seen[:, 2:]), dim=-1), layer.time_conv)
    split = split.view(batch, -1, height, width, 2, size).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)  # (B, 2 t, H, W, C)
    return torch.cat((first, split), dim=1)


def _over_time(joined: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution over three frames and one pixel: a matrix product over the frames' channels side by side."""
    return F.linear(joined, conv.weight.flatten(2).permute(0, 2, 1).flatten(1), conv.bias)


def _frame_wise(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution that sees one frame at a time."""
    conv = cast(nn.Conv2d | nn.Conv3d, conv)
    weight = conv.weight.squeeze(2) if conv.weight.dim() == 5 else conv.weight
    if weight.shape[-1] == 1:
        return F.linear(x, weight.flatten(1), conv.bias)
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(frames, weight, conv.bias, stride=conv.stride[-2:], padding=conv.padding[-2:])
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:2], *out.shape[-2:], -1)
