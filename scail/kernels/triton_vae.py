"""The Triton kernels of the video VAE; import this module only where Triton is.

Activations are (B, T, H, W, C). A window is what a convolution over three frames reads: two frames that it has seen
before, then the new ones, each with a border of zeros one pixel wide. So no tap needs a mask: laid out flat, a tap is
the same memory some pixels further, and the convolution is a matrix product whose left side moves. The columns of a
tap lie side by side in memory and count as one row of the product; rows at the border are computed and not stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scail.kernels import reference


@triton.jit
def _norm_silu_window_kernel(
    x, gamma, past, window, num_frames, height, width,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_PAST: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    area = (height + 2) * (width + 2)
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = pixel // (width + 2) - 1, pixel % (width + 2) - 1
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    channel = tl.arange(0, BLOCK)
    stored = (pixel < area)[:, None] & (channel < SIZE)[None]
    loaded = inside[:, None] & (channel < SIZE)[None]
    in_window = pixel.to(tl.int64)[:, None] * SIZE + channel[None]
    in_x = (row * width + column).to(tl.int64)[:, None] * SIZE + channel[None]
    frame_size = area.to(tl.int64) * SIZE
    weight = tl.load(gamma + channel, mask=channel < SIZE, other=0.0).to(tl.float32)[None]
    window += batch * (num_frames + 2) * frame_size
    x += batch * num_frames * height * width * SIZE
    if HAS_PAST:
        older = tl.load(past + batch * 2 * frame_size + in_window, mask=stored, other=0.0)
        newer = tl.load(past + (batch * 2 + 1) * frame_size + in_window, mask=stored, other=0.0)
    else:
        older = tl.zeros([ROWS, BLOCK], window.dtype.element_ty)
        newer = tl.zeros([ROWS, BLOCK], window.dtype.element_ty)
    tl.store(window + in_window, older, mask=stored)
    tl.store(window + frame_size + in_window, newer, mask=stored)
    for frame in range(num_frames):
        value = tl.load(x + frame * height * width * SIZE + in_x, mask=loaded, other=0.0).to(tl.float32)
        if NORM:
            value = value * tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + 1e-12)[:, None] * weight
            value = value * tl.sigmoid(value)
        older = newer
        newer = value.to(window.dtype.element_ty)
        tl.store(window + (frame + 2) * frame_size + in_window, newer, mask=stored)
    tl.store(past + batch * 2 * frame_size + in_window, older, mask=stored)
    tl.store(past + (batch * 2 + 1) * frame_size + in_window, newer, mask=stored)


def norm_silu_window(x: Tensor, gamma: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    batch_size, num_frames, height, width, size = x.shape
    window = x.new_empty((batch_size, num_frames + 2, height + 2, width + 2, size))
    has_past = past is not None
    if past is None:
        past = x.new_empty((batch_size, 2, height + 2, width + 2, size))
    block = triton.next_power_of_2(size)
    rows = max(1, 2048 // block)
    grid = (triton.cdiv((height + 2) * (width + 2), rows), batch_size)
    _norm_silu_window_kernel[grid](
        x, window if gamma is None else gamma, past, window, num_frames, height, width,
        SIZE=size, BLOCK=block, ROWS=rows, HAS_PAST=has_past, NORM=gamma is not None, num_warps=4,
    )  # fmt: skip
    return window, past


class Tile(NamedTuple):
    """How a convolution is cut up: pixels and channels of the output at once, numbers of a tap at a time.

    A block has a power of two columns; three quarters of one are made of two, `columns` and `rest`.
    """

    rows: int
    columns: int
    rest: int
    depth: int
    num_warps: int
    num_stages: int


# The fastest of those that were tried on an H100, by channels of the output; shares of the 740 TFLOP/s of its matrix
# products: 96 channels 55 %, 192 76 %, 384 86 %.
_TILES = (
    (16, Tile(256, 16, 0, 64, 8, 4)),
    (96, Tile(256, 64, 32, 64, 8, 4)),
    (192, Tile(128, 128, 64, 64, 8, 4)),
    (384, Tile(256, 128, 0, 64, 8, 4)),
)


@triton.jit
def _conv_kernel(
    window, weight, weight_rest, bias, residual, out, height, width, num_frames,
    C_OUT: tl.constexpr, TAP_SIZE: tl.constexpr, FRAMES: tl.constexpr, TAPS: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, DEPTH: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    steps: tl.constexpr = (TAP_SIZE + DEPTH - 1) // DEPTH
    wide = width + 2
    first_channel = tl.program_id(0) * (COLUMNS + REST)
    frame = tl.program_id(2) // (SCALE * SCALE)  # of all clips of the batch
    phase = tl.program_id(2) % (SCALE * SCALE)
    down, right = phase // SCALE, phase % SCALE
    first_row = tl.program_id(1) * ROWS
    first_weight = phase * C_OUT + first_channel
    window_frame = frame + (FRAMES - 1) * (frame // num_frames)
    base = (window_frame * (height + 2) + down) * wide + right + first_row
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if REST:
        total_rest = tl.zeros([ROWS, REST], tl.float32)
    for step in range(FRAMES * TAPS * steps):
        tap = step // steps  # of frames and rows; the columns lie side by side
        depth = (step % steps) * DEPTH
        a = window.load([base + ((tap // TAPS) * (height + 2) + tap % TAPS) * wide, depth])  # beyond the columns: zeros
        b = weight.load([first_weight, tap * TAP_SIZE + depth])
        total = tl.dot(a, b.T, total)
        if REST:
            b_rest = weight_rest.load([first_weight + COLUMNS, tap * TAP_SIZE + depth])
            total_rest = tl.dot(a, b_rest.T, total_rest)
    flat = first_row + tl.arange(0, ROWS)
    row, column = flat // wide, flat % wide
    kept = (row < height) & (column < width)
    at = (frame.to(tl.int64) * height * SCALE + row * SCALE + down) * width * SCALE + column * SCALE + right
    _store(total, bias, residual, out, at * C_OUT, kept, first_channel, C_OUT, COLUMNS, HAS_RESIDUAL)
    if REST:
        _store(total_rest, bias, residual, out, at * C_OUT, kept, first_channel + COLUMNS, C_OUT, REST, HAS_RESIDUAL)


@triton.jit
def _store(
    total, bias, residual, out, at, kept, first_channel,
    C_OUT: tl.constexpr, COLUMNS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    channel = first_channel + tl.arange(0, COLUMNS)
    mask = kept[:, None] & (channel < C_OUT)[None]
    place = at[:, None] + channel[None]
    total += tl.load(bias + channel, mask=channel < C_OUT, other=0.0).to(tl.float32)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def window_conv(window: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    c_out, c_in = weight.shape[:2]
    if missing := -c_in % 8:  # the copy engine wants 16 bytes a pixel
        window = F.pad(window, (0, missing))
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
    weight = weight.permute(0, 2, 3, 4, 1).reshape(c_out, -1)  # by frame, row, column and channel
    return _conv(window, weight, bias, residual, num_taps=3, tile=_tile(c_out))


def upsampled_conv(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    c_out = len(weight)
    return _conv(window, reference.phase_weights(weight), bias, None, num_taps=2, tile=_tile(c_out))


def _tile(c_out: int) -> Tile:
    return next((tile for limit, tile in _TILES if c_out <= limit), _TILES[-1][1])


def _conv(
    window: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, num_taps: int, tile: Tile
) -> Tensor:
    """Three taps in time and space; or two in space, once for each of the four pixels that come of one."""
    batch_size, long, tall, wide, c_in = window.shape
    frames, scale = (3, 1) if num_taps == 3 else (1, 2)
    num_frames, height, width, c_out = long - frames + 1, tall - 2, wide - 2, len(bias)
    out = window.new_empty((batch_size, num_frames, height * scale, width * scale, c_out))
    num_pixels = batch_size * long * tall * wide - num_taps + 1
    pixels = TensorDescriptor(window, [num_pixels, num_taps * c_in], [c_in, 1], [tile.rows, tile.depth])  # they overlap
    weight_block = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth])
    weight_rest = TensorDescriptor.from_tensor(weight, [tile.rest, tile.depth]) if tile.rest else weight_block
    grid = (
        triton.cdiv(c_out, tile.columns + tile.rest),
        triton.cdiv(height * wide, tile.rows),
        batch_size * num_frames * scale * scale,
    )
    _conv_kernel[grid](
        pixels, weight_block, weight_rest, bias, out if residual is None else residual.contiguous(), out,
        height, width, num_frames,
        C_OUT=c_out, TAP_SIZE=num_taps * c_in, FRAMES=frames, TAPS=num_taps, SCALE=scale,
        ROWS=tile.rows, COLUMNS=tile.columns, REST=tile.rest, DEPTH=tile.depth, HAS_RESIDUAL=residual is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
