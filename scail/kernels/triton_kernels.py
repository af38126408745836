"""The Triton kernels; import this module only where Triton is.

One program works on one row, and a row's memory is read once: it waits in registers, or in the first-level cache,
between the reduction over it and what is done with the result. Roundings are those of the plain versions. Numbers are
compile-time constants: the compiler of a whole graph would hand them over in float64, and all that meets them is too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from scail.kernels.reference import FLOAT8

_FLOAT8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-12)


@triton.jit
def _qk_norm_rotary_kernel(
    qkv, weight_q, weight_k, cos, sin, query, key, length,
    SIZE: tl.constexpr, HALF_HEAD: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    source = qkv + row * 3 * SIZE + part * SIZE
    weight = weight_q
    target = query
    if part == 1:
        weight = weight_k
        target = key
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < SIZE, other=0.0).to(tl.float32)
        squares += x * x
    inverse = tl.rsqrt(tl.sum(squares) / SIZE + EPS)
    table = (row % length) * HALF_HEAD
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < SIZE, other=0.0)
        w = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) * inverse * w).to(x.dtype).to(tl.float32)
        even, odd = tl.split(tl.reshape(normed, (BLOCK // 2, 2)))
        pair = (start // 2 + tl.arange(0, BLOCK // 2)) % HALF_HEAD
        c = tl.load(cos + table + pair).to(tl.float32)
        s = tl.load(sin + table + pair).to(tl.float32)
        rotated = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BLOCK,))
        tl.store(target + row * SIZE + at, rotated.to(x.dtype), mask=at < SIZE)


@triton_op("scail::qk_norm_rotary", mutates_args={})
def qk_norm_rotary(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, head_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    batch_size, length, triple = qkv.shape
    size = triple // 3
    shape = (batch_size, length, size // head_size, head_size)
    query, key = qkv.new_empty(shape), qkv.new_empty(shape)
    wrap_triton(_qk_norm_rotary_kernel)[(batch_size * length, 2)](
        qkv, weight_q, weight_k, cos, sin, query, key, length,
        SIZE=size, HALF_HEAD=head_size // 2, BLOCK=min(1024, triton.next_power_of_2(size)), EPS=eps, num_warps=4,
    )  # fmt: skip
    return query, key


@triton.jit
def _qk_norm_rotary_float8_kernel(
    qkv, weight_q, weight_k, cos, sin, key_mean, scales_q, scales_k, query, key, length,
    SIZE: tl.constexpr, HALF_HEAD: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    source = qkv + row * 3 * SIZE + part * SIZE
    weight = weight_q
    scales = scales_q
    target = query
    if part == 1:
        weight = weight_k
        scales = scales_k
        target = key
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < SIZE, other=0.0).to(tl.float32)
        squares += x * x
    inverse = tl.rsqrt(tl.sum(squares) / SIZE + EPS)
    table = (row % length) * HALF_HEAD
    mean = key_mean + (row // length) * SIZE
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < SIZE
        x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x * inverse * w, (BLOCK // 2, 2)))
        pair = (start // 2 + tl.arange(0, BLOCK // 2)) % HALF_HEAD
        c = tl.load(cos + table + pair).to(tl.float32)
        s = tl.load(sin + table + pair).to(tl.float32)
        rotated = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BLOCK,))
        if part == 1:
            rotated -= tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + at // (2 * HALF_HEAD), mask=inside, other=1.0)
        rounded = tl.clamp(rotated / scale, -_FLOAT8_MAX, _FLOAT8_MAX).to(target.dtype.element_ty)
        tl.store(target + row * SIZE + at, rounded, mask=inside)


@triton_op("scail::qk_norm_rotary_float8", mutates_args={})
def qk_norm_rotary_float8(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    key_mean: Tensor, scales_q: Tensor, scales_k: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch_size, length, _ = qkv.shape
    _, num_heads, head_size = key_mean.shape
    shape, size = (batch_size, length, num_heads, head_size), num_heads * head_size
    query, key = qkv.new_empty(shape, dtype=FLOAT8), qkv.new_empty(shape, dtype=FLOAT8)
    wrap_triton(_qk_norm_rotary_float8_kernel)[(batch_size * length, 2)](
        qkv, weight_q, weight_k, cos, sin, key_mean, scales_q, scales_k, query, key, length,
        SIZE=size, HALF_HEAD=head_size // 2, BLOCK=min(1024, triton.next_power_of_2(size)), EPS=eps, num_warps=4,
    )  # fmt: skip
    return query, key


@triton.jit
def _store_quantized(x, target, scales, row, at, SIZE: tl.constexpr):
    scale = tl.maximum(tl.max(tl.abs(x)), _TINY) / _FLOAT8_MAX
    tl.store(scales + row, scale)
    tl.store(target + row * SIZE + at, (x / scale).to(target.dtype.element_ty), mask=at < SIZE)


@triton.jit
def _quantize_rows_kernel(source, target, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    loaded = tl.load(source + row * SIZE + at, mask=at < SIZE, other=0.0)
    x = loaded.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2 * inner)  # x / 2 · (1 + tanh(inner))
        x = x.to(loaded.dtype).to(tl.float32)
    _store_quantized(x, target, scales, row, at, SIZE)


@triton_op("scail::quantize_rows", mutates_args={})
def quantize_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    num_rows, size = x.shape
    target = torch.empty_like(x, dtype=FLOAT8)
    scales = x.new_empty((num_rows, 1), dtype=torch.float32)
    block = triton.next_power_of_2(size)
    wrap_triton(_quantize_rows_kernel)[(num_rows,)](
        x, target, scales, SIZE=size, BLOCK=block, GELU=gelu, num_warps=8 if block <= 8192 else 16
    )
    return target, scales


@triton.jit
def _norm_quantize_kernel(
    source, update, gate, factor, offset, total, target, scales, length, gate_stride, stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    item = row // length
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    loaded = tl.load(source + row * SIZE + at, mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    if HAS_UPDATE:
        added = tl.load(update + row * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + item * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + added).to(loaded.dtype)
        tl.store(total + row * SIZE + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / SIZE, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / SIZE + EPS)
    scale = tl.load(factor + item * stride + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(offset + item * stride + at, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(normed * scale + shift, target, scales, row, at, SIZE)


@triton_op("scail::norm_quantize", mutates_args={})
def norm_quantize(x: Tensor, factor: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    target, scales = _like_rows(x)
    _launch_norm(x, None, None, factor, offset, None, target, scales, eps)
    return target, scales


@triton_op("scail::add_norm_quantize", mutates_args={})
def add_norm_quantize(
    x: Tensor, update: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x)
    target, scales = _like_rows(x)
    _launch_norm(x, update, gate, factor, offset, total, target, scales, eps)
    return total, target, scales


def _like_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FLOAT8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _launch_norm(
    x: Tensor, update: Tensor | None, gate: Tensor | None, factor: Tensor, offset: Tensor,
    total: Tensor | None, target: Tensor, scales: Tensor, eps: float,
) -> None:  # fmt: skip
    """Where there is no update, `x` stands for what is not read and not written."""
    batch_size, length, size = x.shape
    wrap_triton(_norm_quantize_kernel)[(batch_size * length,)](
        x,
        x if update is None else update,
        x if gate is None else gate,
        factor,
        offset,
        x if total is None else total,
        target,
        scales,
        length,
        0 if gate is None or len(gate) == 1 else size,
        0 if len(factor) == 1 else size,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        EPS=eps,
        HAS_UPDATE=update is not None,
        HAS_GATE=gate is not None,
        num_warps=8,
    )
