"""float8 linear layers: weights quantised once, activations by row as they come.

e4m3 has a sign, 4 bits of exponent and 3 of mantissa: a rounding error of up to 3 % of each number, spread evenly.
Every output channel of a weight and every token of an activation has a scale of its own, so that one large number
costs its row only. What stays in bfloat16: embeddings, norms, modulation, the keys and values of both
cross-attentions (computed once for a clip: nothing to win) and the head (whose error nothing averages out).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from scail.kernels import gelu_quantize_rows, quantize_rows
from scail.kernels.reference import quantize_rows as quantize_rows_plain
from scail.models.transformer import ScailTransformer

QUANTIZED_LAYERS = ("self_attn.qkv", "self_attn.out", "cross_attn.q", "cross_attn.out", "ffn.0", "ffn.2")


class Float8Linear(nn.Module):
    """A linear layer whose product is computed in float8.

    Attributes:
        weight: float8 (N, K).
        weight_scale: float32 (1, N).
        bias: (N,).
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Float8Linear:
        values, scales = quantize_rows_plain(linear.weight.detach())
        return cls(values, scales.t().contiguous(), linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.of_quantized(*quantize_rows(x.flatten(0, -2))).view(*x.shape[:-1], -1)

    def of_quantized(self, values: Tensor, scales: Tensor) -> Tensor:
        """The product for input that is quantised already: float8 (M, K), float32 (M, 1) → (M, N)."""
        if not values.is_cuda:  # the CPU has no product by row and column scales
            product = (values.float() * scales) @ (self.weight.float() * self.weight_scale.t()).t()
            return (product + self.bias.float()).to(self.bias.dtype)
        return torch._scaled_mm(
            values,
            self.weight.t(),
            scales,
            self.weight_scale,
            self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,
        )


class Float8FeedForward(nn.Sequential):
    """Linear, GELU, linear; GELU and the second layer's quantisation are one pass over the hidden tokens."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self[0], cast(Float8Linear, self[2])
        values, scales = gelu_quantize_rows(first(x).flatten(0, -2))
        return second.of_quantized(values, scales).view(*x.shape[:-1], -1)


def quantize_blocks(transformer: ScailTransformer) -> None:
    """Replace the large linear layers of a transformer's blocks by float8 ones, one after the other."""
    for block in transformer.transformer_blocks():
        for name in QUANTIZED_LAYERS:
            parent, _, child = name.rpartition(".")
            module = block.get_submodule(parent)
            linear = module.get_submodule(child)
            assert isinstance(linear, nn.Linear)
            module.register_module(child, Float8Linear.of(linear))
        block.ffn = Float8FeedForward(*block.ffn.children())
