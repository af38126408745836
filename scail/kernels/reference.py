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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=TINY) / FLOAT8_MAX
    return (x.float() / scales).to(FLOAT8), scales


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of `x` (M, K) with one scale for each row, float32 (M, 1)."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=TINY) / INT8_MAX
    return (x.float() / scales).round().to(torch.int8), scales


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(F.gelu(x, approximate="tanh"))
