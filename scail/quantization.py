"""Linear layers of the transformer with weights of one byte a number.

fp8     e4m3: a sign, 4 bits of exponent and 3 of mantissa, a rounding error of up to 3 % of each number. Hopper, Ada.
int8    127 steps either side of zero: an error of up to 0.4 % of the largest number of a row. Ampere too.

Every output channel of a weight and every token of an activation has a scale of its own, so that one large number
costs its row only. Weights are rounded once, by `scail convert --quantize` or when a bfloat16 checkpoint is loaded, to
the same numbers; activations are rounded as they come. The keys and values of both cross-attentions are computed once
a clip, so that rounding their input would win nothing: their weights are small at rest and multiplied in full.

What stays as it was is 1.5 % of the weights and would add as much error as all the rest: head (2.4 % of relative error
in fp8, alone), modulation tables (2.3 %), time embedding (2.0 %), image embedding (1.5 %), patch embeddings (1.3 %),
time projection (0.8 %), text embedding (0.2 %); norms and biases. docs/performance.md has the table.

On a CPU the same rounded numbers are multiplied, in float32 (fp8) or exactly (int8), slowly: so that errors can be
stated anywhere.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scail.config import Quantization
from scail.kernels import add_norm_quantize, gelu_quantize_rows, norm_quantize, quantize_rows, sum_quantize_rows
from scail.kernels.reference import gated_sum, quantize_rows_int8, scaled_norm
from scail.kernels.reference import quantize_rows as quantize_rows_plain
from scail.models.rope import RotaryTable
from scail.models.transformer import KeyValue, ScailTransformer, TransformerBlock

QUANTIZED_LAYERS = ("self_attn.qkv", "self_attn.out", "cross_attn.q", "cross_attn.out", "ffn.0", "ffn.2")
SMALL_AT_REST_LAYERS = ("cross_attn.text_kv", "cross_attn.image_kv")  # multiplied in full
SCALE_SUFFIX = "_scale"  # of a weight's name, for that of its scales

_MIN_FP8 = (8, 9)  # compute capability of Ada
_MIN_INT8 = (8, 0)  # of Ampere
_MIN_INT8_ROWS = 17  # of torch._int_mm on a GPU
_INT8_ROWS_AT_ONCE = 8192  # its sums take 4 bytes each: of a whole clip, 2.7 GB in the MLP


class QuantizedRows(NamedTuple):
    """Tokens that a norm has quantised already: one byte a number (B, L, D), and float32 (B, L, 1)."""

    values: Tensor
    scales: Tensor


class QuantizedLinear(nn.Module):
    """A linear layer with one byte a weight.

    Attributes:
        weight: (N, K), float8 or int8.
        weight_scale: float32 (1, N).
        bias: (N,), in the dtype of the result.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def dequantized(self) -> Tensor:
        """(N, K) in the dtype of the bias."""
        return (self.weight.float() * self.weight_scale.t()).to(self.bias.dtype)


class SmallAtRestLinear(QuantizedLinear):
    """Its product is that of the dequantised weight, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized(), self.bias)


class DynamicLinear(QuantizedLinear):
    """Its input is quantised too, row by row; the product is computed in numbers of one byte."""

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        return self._of_rows(*(x if isinstance(x, QuantizedRows) else self.quantize(x)))

    def of_gelu(self, x: Tensor) -> Tensor:
        """The layer of GELU (tanh form) of `x`; one pass over it less."""
        return self._of_rows(*self.gelu_quantize(x))

    def of_sum(self, x: Tensor, other: Tensor) -> Tensor:
        """The layer of `x` (B, L, K) plus `other`, (B, L, K) or (B, 1, K); likewise."""
        return self._of_rows(*self.sum_quantize(x, other))

    def _of_rows(self, values: Tensor, scales: Tensor) -> Tensor:
        product = self.of_quantized(values.flatten(0, -2), scales.flatten(0, -2))
        return product.view(*values.shape[:-1], -1)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (..., K) in one byte a number, and the scale of each row, float32 (..., 1)."""
        raise NotImplementedError

    def sum_quantize(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """`quantize` of the sum of `x` and `other`."""
        raise NotImplementedError

    def gelu_quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`quantize` of GELU of `x`."""
        raise NotImplementedError

    def of_quantized(self, values: Tensor, scales: Tensor) -> Tensor:
        """The product for input that is quantised already: (M, K) of one byte, float32 (M, 1) → (M, N)."""
        raise NotImplementedError


class Float8Linear(DynamicLinear):
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(x)

    def sum_quantize(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return sum_quantize_rows(x, other)

    def gelu_quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_quantize_rows(x)

    def of_quantized(self, values: Tensor, scales: Tensor) -> Tensor:
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


class Int8Linear(DynamicLinear):
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows_int8(x)

    def sum_quantize(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows_int8(x.float() + other.float())

    def gelu_quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows_int8(F.gelu(x, approximate="tanh"))

    def of_quantized(self, values: Tensor, scales: Tensor) -> Tensor:
        rows = range(0, len(values), _INT8_ROWS_AT_ONCE)
        return torch.cat(
            [self._product(*(x[row : row + _INT8_ROWS_AT_ONCE] for x in (values, scales))) for row in rows]
        )

    def _product(self, values: Tensor, scales: Tensor) -> Tensor:
        if values.is_cuda and len(values) < _MIN_INT8_ROWS:
            product = values.float() @ self.weight.float().t()
        else:
            product = torch._int_mm(values, self.weight.t()).float()
        return (product * scales * self.weight_scale + self.bias.float()).to(self.bias.dtype)


class QuantizedFeedForward(nn.Sequential):
    """Linear, GELU, linear; GELU and the second layer's quantisation are one pass over the hidden tokens."""

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        return cast(DynamicLinear, self[2]).of_gelu(self[0](x))


class QuantizedBlock(TransformerBlock):
    """A block whose norms hand on rows of one byte a number: residual, norm and quantisation are one pass."""

    def __init__(self, block: TransformerBlock, quantization: Quantization) -> None:
        """Take a block's weights over, the linear layers quantised."""
        nn.Module.__init__(self)
        self.eps, self.modulation, self.quantization = block.eps, block.modulation, quantization
        for name, child in block.named_children():
            self.add_module(name, child)
        for name in (*QUANTIZED_LAYERS, *SMALL_AT_REST_LAYERS):
            parent, _, leaf = name.rpartition(".")
            module = self.get_submodule(parent)
            linear = module.get_submodule(leaf)
            assert isinstance(linear, nn.Linear)
            layer = LAYER_CLASSES[quantization] if name in QUANTIZED_LAYERS else SmallAtRestLinear
            module.register_module(leaf, layer(*quantize_weight(linear.weight, quantization), linear.bias.detach()))
        self.ffn = QuantizedFeedForward(*self.ffn.children())

    def attend(self, tokens: Tensor, modulation: Tensor, rotary: RotaryTable, span: slice | None = None) -> Tensor:
        shift, scale, *_ = self._rows(modulation)
        return self.self_attn(self._norm(tokens, 1 + scale.float(), shift.float()), rotary, span)

    def finish(self, tokens: Tensor, update: Tensor, modulation: Tensor, text: KeyValue, image: KeyValue) -> Tensor:
        _, _, attn_gate, ffn_shift, ffn_scale, ffn_gate = self._rows(modulation)
        norm = self.cross_attn_norm
        tokens, rows = self._add_norm(tokens, update, attn_gate, norm.weight[None, None], norm.bias[None, None])
        update = self.cross_attn(rows, text, image)
        tokens, rows = self._add_norm(tokens, update, None, 1 + ffn_scale.float(), ffn_shift.float())
        return tokens + ffn_gate * self.ffn(rows)

    def _norm(self, tokens: Tensor, factor: Tensor, offset: Tensor) -> QuantizedRows:
        if self.quantization == "fp8":
            return QuantizedRows(*norm_quantize(tokens, factor, offset, self.eps))
        return QuantizedRows(*quantize_rows_int8(scaled_norm(tokens, factor, offset, self.eps)))

    def _add_norm(
        self, tokens: Tensor, update: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor
    ) -> tuple[Tensor, QuantizedRows]:
        """The tokens with the gated update, and their norm."""
        if self.quantization == "fp8":
            tokens, *rows = add_norm_quantize(tokens, update, gate, factor, offset, self.eps)
            return tokens, QuantizedRows(*rows)
        tokens = gated_sum(tokens, update, gate)
        return tokens, self._norm(tokens, factor, offset)


LAYER_CLASSES: dict[str, type[DynamicLinear]] = {"fp8": Float8Linear, "int8": Int8Linear}
WEIGHT_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def quantize_weight(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in one byte a number, and its scales (1, N), float32."""
    quantize = quantize_rows_plain if quantization == "fp8" else quantize_rows_int8
    values, scales = quantize(weight.detach())
    return values, scales.t().contiguous()


def quantize_blocks(transformer: ScailTransformer, quantization: Quantization = "fp8") -> None:
    """Replace a transformer's blocks by quantised ones, one after the other."""
    for index, block in enumerate(list(transformer.transformer_blocks())):
        transformer.blocks[index] = QuantizedBlock(block, quantization)


def is_quantized_weight(key: str) -> bool:
    """Whether a tensor of a transformer's checkpoint is a weight that quantisation replaces."""
    block, _, name = key.removeprefix("blocks.").partition(".")
    layer, _, leaf = name.rpartition(".")
    layers = (*QUANTIZED_LAYERS, *SMALL_AT_REST_LAYERS)
    return key.startswith("blocks.") and block.isdigit() and leaf == "weight" and layer in layers


def is_fast_on(device: torch.device, quantization: Quantization) -> bool:
    """Whether the device multiplies such numbers itself."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (_MIN_FP8 if quantization == "fp8" else _MIN_INT8)
