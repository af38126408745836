"""The Triton kernels against their plain versions, on a GPU; the plain versions against what they mean, anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scail import kernels
from scail.kernels import reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def share_that_differs(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() != theirs.float()).float().mean())


def test_rows_come_back_within_the_rounding_of_float8():
    x = random(64, 96) * torch.logspace(-6, 6, 64)[:, None]

    values, scales = kernels.quantize_rows(x)

    assert values.dtype == torch.float8_e4m3fn
    worst = ((values.float() * scales - x).abs() / x.abs().amax(dim=1, keepdim=True)).max()
    assert worst <= 16 / 448 + 1e-6  # half of the last bit of the largest number


def test_a_row_of_zeros_stays_zeros():
    values, scales = kernels.quantize_rows(torch.zeros(2, 16))

    assert torch.equal(values.float() * scales, torch.zeros(2, 16))


def test_one_large_number_costs_its_own_row_only():
    x = random(2, 64)
    spoilt = x.clone()
    spoilt[0, 0] = 1e6

    (values, scales), (spoilt_values, spoilt_scales) = kernels.quantize_rows(x), kernels.quantize_rows(spoilt)

    assert torch.equal(values[1].float() * scales[1], spoilt_values[1].float() * spoilt_scales[1])
    assert not torch.equal(values[0].float() * scales[0], spoilt_values[0].float() * spoilt_scales[0])


def test_the_joined_steps_are_the_single_ones():
    x, other, shared = random(2, 5, 32), random(2, 5, 33)[..., :32], random(2, 1, 32)

    joined = kernels.gelu_quantize_rows(x), kernels.sum_quantize_rows(x, other), kernels.sum_quantize_rows(x, shared)

    single = F.gelu(x, approximate="tanh"), x + other, x + shared
    for (values, scales), whole in zip(joined, single, strict=True):
        expected = kernels.quantize_rows(whole)
        assert torch.equal(values.float(), expected[0].float())
        assert torch.equal(scales, expected[1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("length", "num_heads", "head_size"), [(7, 40, 128), (300, 4, 12), (33, 3, 20), (64, 4, 64)])
def test_the_query_and_key_kernel_equals_its_plain_version(length, num_heads, head_size):
    size = num_heads * head_size
    qkv = random(2, length, 3 * size, device="cuda", dtype=torch.bfloat16)
    weights = [random(size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    cos, sin = (random(length, head_size // 2 + i, device="cuda")[:, : head_size // 2].contiguous() for i in (0, 1))

    ours = kernels.qk_norm_rotary(qkv, *weights, cos, sin, head_size=head_size, eps=1e-6)

    theirs = reference.qk_norm_rotary(qkv, *weights, cos, sin, head_size, 1e-6)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.shape == (2, length, num_heads, head_size)
        assert share_that_differs(mine, its) < 1e-3  # a sum in another order, at the edge of a rounding


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("length", "num_heads", "head_size"), [(7, 40, 128), (300, 4, 56), (33, 3, 20), (64, 4, 64)])
def test_the_float8_query_and_key_kernel_equals_its_plain_version(length, num_heads, head_size):
    size = num_heads * head_size
    qkv = random(2, length, 3 * size, device="cuda", dtype=torch.bfloat16)
    weights = [random(size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    cos, sin = (random(length, head_size // 2 + i, device="cuda")[:, : head_size // 2].contiguous() for i in (0, 1))
    mean = random(2, num_heads, head_size, device="cuda")
    scales = [0.01 + random(num_heads, device="cuda").abs() / 50 for _ in range(2)]

    with torch.no_grad():
        ours = kernels.qk_norm_rotary_float8(
            qkv, *weights, cos, sin, key_mean=mean, scales_q=scales[0], scales_k=scales[1], eps=1e-6
        )

    theirs = reference.qk_norm_rotary_float8(qkv, *weights, cos, sin, mean, *scales, 1e-6)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.shape == (2, length, num_heads, head_size)
        assert share_that_differs(mine, its) < 2e-3  # at the edge of a rounding
        assert (mine.float() - its.float()).norm() / its.float().norm() < 4e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("length", "size"), [(1, 8), (1024, 128), (2500, 224), (1111, 5120)])
def test_the_token_range_kernel_equals_its_plain_version(length, size):
    qkv = random(2, length, 3 * size, device="cuda", dtype=torch.bfloat16)
    value = 5 + qkv.chunk(3, dim=-1)[2]  # zeros, which stand for what is not there, would show
    value = torch.cat((qkv, value), dim=-1)[..., 3 * size :]
    assert not value.is_contiguous() or length == 1

    with torch.no_grad():
        mean, smallest, largest = kernels.token_range(value)

    plain_mean, plain_smallest, plain_largest = reference.token_range(value)
    assert mean.shape == smallest.shape == largest.shape == (2, 1, size)
    torch.testing.assert_close(mean, plain_mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(smallest, plain_smallest)
    assert torch.equal(largest, plain_largest)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [48, 5120, 13824])
def test_the_quantising_kernels_equal_their_plain_versions(size):
    x, other = (random(2, length, size, device="cuda", dtype=torch.bfloat16)[:, :257] for length in (257, 258))
    mean = random(2, 1, size, device="cuda")

    pairs = {
        "rows": (kernels.quantize_rows(x), reference.quantize_rows(x)),
        "gelu": (kernels.gelu_quantize_rows(x), reference.gelu_quantize_rows(x)),
        "sum": (kernels.sum_quantize_rows(x, other), reference.sum_quantize_rows(x, other)),
        "sum with a mean": (kernels.sum_quantize_rows(x, mean), reference.sum_quantize_rows(x, mean)),
    }

    for name, ((values, scales), (plain_values, plain_scales)) in pairs.items():
        ours, theirs = values.float() * scales, plain_values.float() * plain_scales
        assert (ours - theirs).norm() / theirs.norm() < 2e-3, name


def norm_inputs(size: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Tokens, an update, and gate, factor and offset of two items."""
    tokens, update = (random(2, length, size, device=device, dtype=dtype)[:, :37] for length in (37, 38))
    gate, factor, offset = (random(2, rows, size, device=device, dtype=dtype)[:, :1] for rows in (1, 2, 3))
    return tokens, update, gate, 1 + 0.3 * factor, offset


def test_a_norm_that_quantises_is_the_norm_within_the_rounding_of_float8():
    tokens, update, gate, factor, offset = norm_inputs(96)

    total, values, scales = kernels.add_norm_quantize(tokens, update, gate, factor, offset, 1e-6)

    assert torch.equal(total, tokens + gate * update)
    expected = F.layer_norm(total, (96,), eps=1e-6) * factor + offset
    assert (values.float() * scales - expected).norm() / expected.norm() < 0.04
    again = kernels.norm_quantize(total, factor, offset, 1e-6)
    assert torch.equal(values.float(), again[0].float())
    assert torch.equal(scales, again[1])
    ungated, *_ = kernels.add_norm_quantize(tokens, update, None, factor, offset, 1e-6)
    assert torch.equal(ungated, tokens + update)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [48, 224, 5120])
@pytest.mark.parametrize("num_items", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_the_norm_kernels_equal_their_plain_versions(size, num_items, gated):
    tokens, update, gate, factor, offset = norm_inputs(size, device="cuda", dtype=torch.bfloat16)
    gate, factor, offset = (x[:num_items] for x in (gate, factor, offset))  # one item's serve for both

    with torch.no_grad():
        total, values, scales = kernels.add_norm_quantize(tokens, update, gate if gated else None, factor, offset, 1e-6)
        alone = kernels.norm_quantize(tokens, factor, offset, 1e-6)

    plain_total, *plain = reference.add_norm_quantize(tokens, update, gate if gated else None, factor, offset, 1e-6)
    assert share_that_differs(total, plain_total) < 1e-3
    for ours, theirs in (
        ((values, scales), plain),
        (alone, reference.norm_quantize(tokens, factor, offset, 1e-6)),
    ):
        mine, its = (values.float() * scales for values, scales in (ours, theirs))
        assert mine.shape == its.shape == tokens.shape
        assert (mine - its).norm() / its.norm() < 4e-3


def test_four_sums_of_weights_are_a_convolution_over_the_picture_twice_the_size():
    window = F.pad(random(1, 2, 5, 6, 8), (0, 0, 1, 1, 1, 1))
    weight, bias = random(4, 8, 3, 3), random(4)

    phases = reference.phase_weights(weight).view(2, 2, 4, 2, 2, 8).permute(0, 1, 2, 5, 3, 4)

    whole = reference.upsampled_conv(window, weight, bias)
    for down in range(2):
        for right in range(2):
            seen = window[0, :, down : down + 6, right : right + 7].permute(0, 3, 1, 2)
            part = F.conv2d(seen, phases[down, right], bias).permute(0, 2, 3, 1)
            torch.testing.assert_close(part, whole[0, :, down::2, right::2], rtol=0, atol=1e-5)


def test_a_window_goes_on_where_the_last_one_ended():
    x, gamma = random(1, 5, 4, 6, 8), random(8)
    whole, _ = kernels.norm_silu_window(x, gamma, None)

    first, past = kernels.norm_silu_window(x[:, :1], gamma, None)
    second, past = kernels.norm_silu_window(x[:, 1:2], gamma, past)
    third, _ = kernels.norm_silu_window(x[:, 2:], gamma, past)

    assert torch.equal(torch.cat((first, second[:, 2:], third[:, 2:]), dim=1), whole)
    assert not whole[:, :2].any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [3, 16, 96, 192, 384])
def test_the_window_kernel_equals_its_plain_version_piece_by_piece(size):
    gamma = random(size, device="cuda", dtype=torch.bfloat16)
    past = plain_past = None
    for num_frames in (1, 4, 2):
        x = random(2, num_frames, 7, 9, size, device="cuda", dtype=torch.bfloat16)
        plain, plain_past = reference.norm_silu_window(x, gamma, plain_past)

        with torch.no_grad():
            window, past = kernels.norm_silu_window(x, gamma, past)

        assert (window.float() - plain.float()).norm() / plain.float().norm() < 5e-3
        assert torch.equal(window[:, -2:], past)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("c_in", "c_out"), [(3, 96), (16, 384), (96, 96), (96, 192), (192, 384), (384, 32), (96, 3)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_convolution_kernel_equals_its_plain_version(c_in, c_out, with_residual):
    x = random(2, 3, 12, 21, c_in, device="cuda", dtype=torch.bfloat16)
    window, _ = reference.norm_silu_window(x, None, None)
    weight = random(c_out, c_in, 3, 3, 3, device="cuda", dtype=torch.bfloat16)
    bias = random(c_out, device="cuda", dtype=torch.bfloat16)
    residual = random(2, 3, 12, 21, c_out, device="cuda", dtype=torch.bfloat16) if with_residual else None
    exact = [None if tensor is None else tensor.float() for tensor in (window, weight, bias, residual)]

    with torch.no_grad():
        out = kernels.window_conv(window, weight, bias, residual)

    theirs = reference.window_conv(*exact)
    assert (out.float() - theirs).norm() / theirs.norm() < 3e-3  # one rounding to bfloat16


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("c_in", "c_out"), [(384, 192), (192, 96), (16, 8)])
def test_the_upsampling_kernel_equals_its_plain_version(c_in, c_out):
    window = F.pad(random(2, 2, 6, 11, c_in, device="cuda", dtype=torch.bfloat16), (0, 0, 1, 1, 1, 1))
    weight = random(c_out, c_in, 3, 3, device="cuda", dtype=torch.bfloat16)
    bias = random(c_out, device="cuda", dtype=torch.bfloat16)

    with torch.no_grad():
        out = kernels.upsampled_conv(window, weight, bias)

    theirs = reference.upsampled_conv(window.float(), weight.float(), bias.float())
    assert out.shape == (2, 2, 12, 22, c_out)
    assert (out.float() - theirs).norm() / theirs.norm() < 4e-3  # the sums of weights are rounded once more
