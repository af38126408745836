"""What the kernels compute, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
INT8_MAX = 127.0  # not 128, so that the numbers lie evenly about zero
TINY = 1e-12  # keeps the scale of a row of zeros above zero


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis; computed in float32 as the official one, returned in the dtype of `x`."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of `x` (B, L, heads, head_size) by (L, head_size / 2); computed in float32."""
    even, odd = rearrange(x.float(), "... (pairs two) -> two ... pairs", two=2)
    cos, sin = cos[:, None].float(), sin[:, None].float()  # (L, 1, head_size / 2)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def qk_norm_rotary(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, head_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    query, key, _ = qkv.chunk(3, dim=-1)
    query, key = (
        rearrange(rms_norm(x, weight, eps), "b l (heads d) -> b l heads d", d=head_size)
        for x, weight in ((query, weight_q), (key, weight_k))
    )
    return rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)


def qk_norm_rotary_float8(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    key_mean: Tensor, scales_q: Tensor, scales_k: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, key = qk_norm_rotary(qkv.float(), weight_q, weight_k, cos, sin, key_mean.shape[-1], eps)
    mixed = mix_quarters(query) / scales_q[:, None], mix_quarters(key - key_mean[:, None]) / scales_k[:, None]
    query8, key8 = (x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8) for x in mixed)
    return query8, key8


def mix_quarters(x: Tensor) -> Tensor:
    """Four numbers of `x` (..., N), one of each quarter, become their sum and three differences, halved.

    The same change of axes for queries and keys leaves every product of theirs as it was. What it is for: a number's
    rounding is a share of that number, so that a channel in which all tokens are large makes most of the error; spread
    over four channels it makes half of that.
    """
    if not mixes(x.shape[-1]):
        return x
    a, b, c, d = x.chunk(4, dim=-1)
    return torch.cat(((a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)), dim=-1) / 2


def mixes(head_size: int) -> bool:
    """Whether a quarter of a head has whole pairs."""
    return head_size % 8 == 0


def token_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.float().mean(dim=1, keepdim=True)
    return mean, x.amin(dim=1, keepdim=True).float(), x.amax(dim=1, keepdim=True).float()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=TINY) / FLOAT8_MAX
    return (x.float() / scales).to(FLOAT8), scales


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of `x` (M, K) with one scale for each row, float32 (M, 1)."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=TINY) / INT8_MAX
    return (x.float() / scales).round().to(torch.int8), scales


def sum_quantize_rows(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x.float() + other.float())


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(F.gelu(x.float(), approximate="tanh"))


def scaled_norm(x: Tensor, factor: Tensor, offset: Tensor, eps: float) -> Tensor:
    """LayerNorm of `x` (B, L, D), times `factor` plus `offset` (1 or B, 1, D); float32 throughout."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * factor.float() + offset.float()


def gated_sum(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """`x` plus `update`, times `gate` (1 or B, 1, D) where there is one; rounded once."""
    return (x.float() + (update.float() if gate is None else update.float() * gate.float())).to(x.dtype)


def norm_quantize(x: Tensor, factor: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return quantize_rows(scaled_norm(x, factor, offset, eps))


def add_norm_quantize(
    x: Tensor, update: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = gated_sum(x, update, gate)
    return total, *norm_quantize(total, factor, offset, eps)


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Vectors (..., C) of unit mean square, scaled by channel, through SiLU in float32."""
    return F.silu(rms_norm(x, gamma, TINY).float()).to(x.dtype)


def norm_silu_window(x: Tensor, gamma: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
    if gamma is not None:
        x = norm_silu(x, gamma)
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    window = torch.cat((torch.zeros_like(x[:, :1]).expand(-1, 2, -1, -1, -1) if past is None else past, x), dim=1)
    return window, window[:, -2:].clone()


def window_conv(window: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    out = F.conv3d(window.permute(0, 4, 1, 2, 3), weight, bias).permute(0, 2, 3, 4, 1)
    return out if residual is None else out + residual


def upsampled_conv(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    frames = window[:, :, 1:-1, 1:-1].flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    return out.permute(0, 2, 3, 1).reshape(*window.shape[:2], *out.shape[-2:], -1)


def phase_weights(weight: Tensor) -> Tensor:
    """Weights (4 · C', 4 · C) by which the four pixels that come of one are made of 2 x 2 pixels before upsampling.

    Three taps on pixels that come in equal pairs see two different ones: taps on the same one are summed, in float32.
    """
    pairs = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    summed = torch.einsum("oirc,pkr,qlc->pqokli", weight.float(), pairs, pairs)  # (2, 2, C', 2, 2, C)
    return summed.flatten(0, 2).flatten(1).to(weight.dtype)
