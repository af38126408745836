"""The Triton kernels; import this module only where Triton is.

One program works on one row, and a row's memory is read once: it waits in registers, or in the first-level cache,
between the reduction over it and what is done with the result. A row that waits in registers is cut into parts of a
power of two, which keep the same threads and are reduced together. Roundings are those of the plain versions. Numbers
are compile-time constants: the compiler of a whole graph would hand them over in float64, and all that meets them is
too.
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
def _inverse_rms(source, SIZE: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr):
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < SIZE, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares) / SIZE + EPS)


@triton.jit
def _rotated(x, cos, sin, BLOCK: tl.constexpr):
    """Adjacent pairs of `x` (BLOCK), each by its angle."""
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    c, s = cos.to(tl.float32), sin.to(tl.float32)
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BLOCK,))


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
    inverse = _inverse_rms(source, SIZE, BLOCK, EPS)
    table = (row % length) * HALF_HEAD
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        pair = (start // 2 + tl.arange(0, BLOCK // 2)) % HALF_HEAD
        x = tl.load(source + at, mask=at < SIZE, other=0.0)
        w = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) * inverse * w).to(x.dtype).to(tl.float32)
        rotated = _rotated(normed, tl.load(cos + table + pair), tl.load(sin + table + pair), BLOCK)
        tl.store(target + row * SIZE + at, rotated.to(target.dtype.element_ty), mask=at < SIZE)


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
    NUM_HEADS: tl.constexpr, QUARTER: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = NUM_HEADS * 4 * QUARTER
    row = tl.program_id(0).to(tl.int64)
    source, target = qkv + row * 3 * size, row * size
    table = (row % length) * (2 * QUARTER)
    cos += table
    sin += table
    if tl.program_id(1) == 0:
        _mix_and_store(
            source, weight_q, cos, sin, key_mean, scales_q, query + target,
            NUM_HEADS, QUARTER, WIDTH, HEADS, PARTS, EPS, False,
        )  # fmt: skip
    else:
        _mix_and_store(
            source + size, weight_k, cos, sin, key_mean + (row // length) * size, scales_k, key + target,
            NUM_HEADS, QUARTER, WIDTH, HEADS, PARTS, EPS, True,
        )  # fmt: skip


@triton.jit
def _mix_and_store(
    source, weight, cos, sin, mean, scales, target,
    NUM_HEADS: tl.constexpr, QUARTER: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    EPS: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """One row of queries or keys. A part of it is some heads, each quarter filled up to `WIDTH`.

    A thread has the same place of every quarter of every head, so that it loads the angles once.
    """
    block: tl.constexpr = HEADS * WIDTH
    first_head = tl.arange(0, block) // WIDTH
    within = tl.arange(0, block) % WIDTH
    squares = tl.zeros([block], tl.float32)
    quarters = ()
    for part in tl.static_range(PARTS):
        head = part * HEADS + first_head
        inside = (head < NUM_HEADS) & (within < QUARTER)
        for quarter in tl.static_range(4):
            at = (4 * head + quarter) * QUARTER + within
            x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            squares += x * x
            quarters += (x,)  # type: ignore[assignment]
    inverse = tl.rsqrt(tl.sum(squares) / (NUM_HEADS * 4 * QUARTER) + EPS)
    pair = tl.arange(0, block // 2) % (WIDTH // 2)
    angles = ()
    for quarter in tl.static_range(4):
        at = pair + quarter * (QUARTER // 2)
        has_angle = pair < QUARTER // 2
        angles += (tl.load(cos + at, mask=has_angle), tl.load(sin + at, mask=has_angle))  # type: ignore[assignment]
    for part in tl.static_range(PARTS):
        head = part * HEADS + first_head
        inside = (head < NUM_HEADS) & (within < QUARTER)
        turned = ()
        for quarter in tl.static_range(4):
            at = (4 * head + quarter) * QUARTER + within
            x = quarters[4 * part + quarter] * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            x = _rotated(x, angles[2 * quarter], angles[2 * quarter + 1], block) * inverse
            if HAS_MEAN:
                x -= tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
            turned += (x,)  # type: ignore[assignment]
        a, b, c, d = turned  # type: ignore[misc]
        factor = 0.5 / tl.load(scales + head, mask=inside, other=1.0)
        place = target + 4 * head * QUARTER + within
        _store_float8(place, ((a + b) + (c + d)) * factor, inside)
        _store_float8(place + QUARTER, ((a - b) + (c - d)) * factor, inside)
        _store_float8(place + 2 * QUARTER, ((a + b) - (c + d)) * factor, inside)
        _store_float8(place + 3 * QUARTER, ((a - b) - (c - d)) * factor, inside)


@triton.jit
def _store_float8(place, x, inside):
    tl.store(place, x.to(place.dtype.element_ty), mask=inside)  # the largest number stands for all beyond it


@triton_op("scail::qk_norm_rotary_float8", mutates_args={})
def qk_norm_rotary_float8(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    key_mean: Tensor, scales_q: Tensor, scales_k: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch_size, length, _ = qkv.shape
    _, num_heads, head_size = key_mean.shape
    shape = (batch_size, length, num_heads, head_size)
    query, key = qkv.new_empty(shape, dtype=FLOAT8), qkv.new_empty(shape, dtype=FLOAT8)
    width = triton.next_power_of_2(head_size // 4)
    heads = min(max(1, 256 // width), triton.next_power_of_2(num_heads))
    wrap_triton(_qk_norm_rotary_float8_kernel)[(batch_size * length, 2)](
        qkv, weight_q, weight_k, cos, sin, key_mean, scales_q, scales_k, query, key, length,
        NUM_HEADS=num_heads, QUARTER=head_size // 4, WIDTH=width, HEADS=heads, PARTS=triton.cdiv(num_heads, heads),
        EPS=eps, num_warps=4,
    )  # fmt: skip
    return query, key


@triton.jit
def _token_range_kernel(
    source, sums, smallest, largest, length, stride, item_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some channels of `STEPS * ROWS` tokens."""
    piece, item = tl.program_id(0), tl.program_id(2)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    low = tl.full([ROWS, BLOCK], float("inf"), tl.float32)
    high = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    first = piece * STEPS * ROWS
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        place = source + item.to(tl.int64) * item_stride + row.to(tl.int64)[:, None] * stride + at[None]
        inside = (row < length)[:, None] & (at < SIZE)[None]
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        total += x
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, -float("inf")))
    target = (item * tl.num_programs(0) + piece) * SIZE + at
    tl.store(sums + target, tl.sum(total, 0), mask=at < SIZE)
    tl.store(smallest + target, tl.min(low, 0), mask=at < SIZE)
    tl.store(largest + target, tl.max(high, 0), mask=at < SIZE)


@triton_op("scail::token_range", mutates_args={})
def token_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `x` (B, L, D), whose last axis is contiguous."""
    batch_size, length, size = x.shape
    block, rows, steps = 128, 16, 32
    pieces = triton.cdiv(length, rows * steps)
    sums, smallest, largest = (x.new_empty((batch_size, pieces, size), dtype=torch.float32) for _ in range(3))
    wrap_triton(_token_range_kernel)[(pieces, triton.cdiv(size, block), batch_size)](
        x, sums, smallest, largest, length, x.stride(1), x.stride(0),
        SIZE=size, BLOCK=block, ROWS=rows, STEPS=steps, num_warps=4,
    )  # fmt: skip
    return sums.sum(1, keepdim=True) / length, smallest.amin(1, keepdim=True), largest.amax(1, keepdim=True)


@triton.jit
def _quantize_rows_kernel(
    source, other, target, scales, rows_of_other,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, HAS_OTHER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    parts = ()
    for part in tl.static_range(PARTS):
        at = part * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        x = tl.load(source + row * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_OTHER:
            x += tl.load(other + row // rows_of_other * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            x = _gelu(x)
        largest = tl.maximum(largest, tl.abs(x))
        parts += (x,)  # type: ignore[assignment]
    _store_quantized(parts, largest, target, scales, row, SIZE, BLOCK, PARTS)


@triton.jit
def _gelu(x):
    """x times the sigmoid of 2 · sqrt(2 / pi) · (x + 0.044715 x³), whose exponential is to the base of 2."""
    return x * _reciprocal(1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))


@triton.jit
def _reciprocal(x):
    """To the last bit but one; a division takes four times the instructions, and this kernel is bound by them."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _store_quantized(
    parts, largest, target, scales, row, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    scale = tl.maximum(tl.max(largest), _TINY) / _FLOAT8_MAX
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    for part in tl.static_range(PARTS):
        at = part * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + row * SIZE + at, (parts[part] * inverse).to(target.dtype.element_ty), mask=at < SIZE)


@triton_op("scail::quantize_rows", mutates_args={})
def quantize_rows(x: Tensor, other: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    """Of `x` (..., D) and what is added to it, which has as many rows, or one for each item."""
    size = x.shape[-1]
    num_rows = x.numel() // size
    target, scales = _like_rows(x)
    wrap_triton(_quantize_rows_kernel)[(num_rows,)](
        x,
        x if other is None else other,
        target,
        scales,
        1 if other is None else num_rows * size // other.numel(),
        SIZE=size,
        **_parts(size),
        GELU=gelu,
        HAS_OTHER=other is not None,
        num_warps=8,
    )
    return target, scales


def _parts(size: int) -> dict[str, int]:
    """How a row is cut, so that few threads of a program idle at its end."""
    block = min(1024, triton.next_power_of_2(size))
    return {"BLOCK": block, "PARTS": triton.cdiv(size, block)}


@triton.jit
def _norm_quantize_kernel(
    source, update, gate, factor, offset, total, target, scales, length, gate_stride, stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
    HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    item = row // length
    sums = tl.zeros([BLOCK], tl.float32)
    parts = ()
    for part in tl.static_range(PARTS):
        at = part * BLOCK + tl.arange(0, BLOCK)
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
        sums += x
        parts += (x,)  # type: ignore[assignment]
    mean = tl.sum(sums) / SIZE
    squares = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        centred = tl.where(part * BLOCK + tl.arange(0, BLOCK) < SIZE, parts[part] - mean, 0.0)
        squares += centred * centred
    inverse = tl.rsqrt(tl.sum(squares) / SIZE + EPS)
    largest = tl.zeros([BLOCK], tl.float32)
    normed = ()
    for part in tl.static_range(PARTS):
        at = part * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        scale = tl.load(factor + item * stride + at, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(offset + item * stride + at, mask=inside, other=0.0).to(tl.float32)
        x = (parts[part] - mean) * (inverse * scale) + shift
        largest = tl.maximum(largest, tl.abs(x))
        normed += (x,)  # type: ignore[assignment]
    _store_quantized(normed, largest, target, scales, row, SIZE, BLOCK, PARTS)


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
        **_parts(size),
        EPS=eps,
        HAS_UPDATE=update is not None,
        HAS_GATE=gate is not None,
        num_warps=4,
    )
