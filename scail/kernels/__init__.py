"""Element-wise work that the compiler does not fuse well, as Triton kernels.

Each has a plain version in `reference`, which runs everywhere and says what is meant; the functions here take the
kernel where the tensors are on a GPU that has Triton, and the plain version elsewhere and while gradients are wanted,
which the kernels do not give.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from scail.kernels import reference

HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    from scail.kernels import triton_kernels, triton_vae


def _takes_kernel(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and not torch.is_grad_enabled()


def _takes_convolution(x: Tensor) -> bool:
    """The convolutions want a copy engine, and 200 KB of shared memory: Hopper, or Blackwell of the data centre."""
    return _takes_kernel(x) and x.dtype.itemsize == 2 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def qk_norm_rotary(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, *, head_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a self-attention: RMS norm over the hidden size, then the rotation of each head's pairs.

    Args:
        qkv: (B, L, 3 · D), queries, keys and values side by side.
        weight_q, weight_k: (D,), of the norms.
        cos, sin: (L, head_size / 2).
        head_size: Of one head; D is a multiple of it.
        eps: Of the norms.

    Returns:
        Queries and keys, each (B, L, heads, head_size), contiguous.
    """
    if _takes_kernel(qkv):
        return triton_kernels.qk_norm_rotary(qkv, weight_q, weight_k, cos, sin, head_size, eps)
    return reference.qk_norm_rotary(qkv, weight_q, weight_k, cos, sin, head_size, eps)


def qk_norm_rotary_float8(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key_mean: Tensor,
    scales_q: Tensor,
    scales_k: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rotary`, its four quarters mixed (`reference.mix_quarters`), in float8: rounded once.

    Args:
        qkv, weight_q, weight_k, cos, sin, eps: Of `qk_norm_rotary`.
        key_mean: (B, heads, head_size), taken from every key before it is mixed.
        scales_q, scales_k: float32 (heads,), by which queries and keys are divided.

    Returns:
        Queries and keys, each float8 (B, L, heads, head_size), contiguous.
    """
    tensors = (qkv, weight_q, weight_k, cos, sin, key_mean.contiguous(), scales_q, scales_k)
    if _takes_kernel(qkv) and reference.mixes(key_mean.shape[-1]):
        return triton_kernels.qk_norm_rotary_float8(*tensors, eps)
    return reference.qk_norm_rotary_float8(*tensors, eps)


def token_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, smallest and largest of each channel over all tokens of `x` (B, L, D): each float32 (B, 1, D)."""
    if _takes_kernel(x) and x.stride(-1) == 1:
        return triton_kernels.token_range(x)
    return reference.token_range(x)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 (e4m3) of `x` with one scale for each row, its last axis.

    Args:
        x: (..., K).

    Returns:
        float8 (..., K), and float32 (..., 1): their product is `x` but for rounding.
    """
    if _takes_kernel(x):
        return triton_kernels.quantize_rows(x.contiguous(), None, False)
    return reference.quantize_rows(x)


def sum_quantize_rows(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `x` (B, L, D) plus `other`, (B, L, D) or (B, 1, D), in one pass, not rounded between."""
    if _takes_kernel(x):
        return triton_kernels.quantize_rows(x.contiguous(), other.contiguous(), False)
    return reference.sum_quantize_rows(x, other)


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of GELU (tanh form) of `x`, likewise."""
    if _takes_kernel(x):
        return triton_kernels.quantize_rows(x.contiguous(), None, True)
    return reference.gelu_quantize_rows(x)


def norm_quantize(x: Tensor, factor: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Layer norm, scale and shift, and `quantize_rows` of what comes out, in one pass and without rounding between.

    Args:
        x: (B, L, D).
        factor, offset: (1 or B, 1, D), both of one batch size.
        eps: Of the norm.

    Returns:
        float8 (B, L, D), and float32 (B, L, 1).
    """
    if _takes_kernel(x):
        return triton_kernels.norm_quantize(x.contiguous(), factor.contiguous(), offset.contiguous(), eps)
    return reference.norm_quantize(x, factor, offset, eps)


def add_norm_quantize(
    x: Tensor, update: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` plus the gated `update` (B, L, D), and `norm_quantize` of the sum, in one pass.

    Args:
        x, update: (B, L, D).
        gate: (1 or B, 1, D), by which the update is multiplied; None: as it is.
        factor, offset, eps: Of `norm_quantize`.

    Returns:
        The sum, in the dtype of `x`; then what `norm_quantize` gives.
    """
    if _takes_kernel(x):
        gate = None if gate is None else gate.contiguous()
        return triton_kernels.add_norm_quantize(
            x.contiguous(), update.contiguous(), gate, factor.contiguous(), offset.contiguous(), eps
        )
    return reference.add_norm_quantize(x, update, gate, factor, offset, eps)


def norm_silu_window(x: Tensor, gamma: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a causal convolution over three frames reads, and what the next piece of the clip has to begin with.

    Args:
        x: (B, T, H, W, C), the new frames.
        gamma: (C,), weights of an RMS norm over the channels, which SiLU follows; None leaves `x` as it is.
        past: (B, 2, H + 2, W + 2, C), what this gave for the frames before, and which it may write over; None at the
            start of a clip: zeros.

    Returns:
        The window (B, 2 + T, H + 2, W + 2, C) with a border of zeros, and its last two frames.
    """
    if _takes_kernel(x):
        return triton_vae.norm_silu_window(x, gamma, past)
    return reference.norm_silu_window(x, gamma, past)


def window_conv(window: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """A convolution of 3 x 3 x 3 over a window (B, 2 + T, H + 2, W + 2, C) -> (B, T, H, W, C'), plus `residual`.

    Args:
        window: From `norm_silu_window`.
        weight: (C', C, 3, 3, 3).
        bias: (C',).
        residual: (B, T, H, W, C').
    """
    if _takes_convolution(window):
        return triton_vae.window_conv(window, weight, bias, residual)
    return reference.window_conv(window, weight, bias, residual)


def upsampled_conv(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pictures twice the size, each pixel repeated, and a convolution of 3 x 3 over them.

    The kernel never makes the large picture: it sums weights that meet the same pixel, which rounds them once more.

    Args:
        window: (B, T, H + 2, W + 2, C), pictures with a border of zeros.
        weight: (C', C, 3, 3).
        bias: (C',).

    Returns:
        (B, T, 2 · H, 2 · W, C').
    """
    if _takes_convolution(window) and window.shape[-1] % 8 == 0:
        return triton_vae.upsampled_conv(window, weight, bias)
    return reference.upsampled_conv(window, weight, bias)
