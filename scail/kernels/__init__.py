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
    from scail.kernels import triton_kernels


def _takes_kernel(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and not torch.is_grad_enabled()


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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 (e4m3) of `x` with one scale for each row.

    Args:
        x: (M, K).

    Returns:
        float8 (M, K), and float32 (M, 1): their product is `x` but for rounding.
    """
    if _takes_kernel(x):
        return triton_kernels.quantize_rows(x, False)
    return reference.quantize_rows(x)


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of GELU (tanh form) of `x`, in one pass."""
    if _takes_kernel(x):
        return triton_kernels.quantize_rows(x, True)
    return reference.gelu_quantize_rows(x)
