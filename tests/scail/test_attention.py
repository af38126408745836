from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import pytest
import torch

from scail import kernels
from scail.kernels import qk_norm_rotary
from scail.kernels.reference import mix_quarters
from scail.models import attention
from scail.models.attention import BACKENDS, QkNorm, choose_attention, passes, relative_error, sdpa
from scail.models.transformer import KeyValue
from scail.types import Conditioning

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 5, 7, 3, 8
CPU = torch.device("cpu")


@pytest.fixture
def query_key_value() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(BATCH, length, HEADS, SIZE, generator=generator) for length in (QUERIES, KEYS, KEYS))


def test_it_is_the_softmax_of_the_scaled_scores(query_key_value):
    query, key, value = (x.double() for x in query_key_value)
    weights = (torch.einsum("blhd,bmhd->bhlm", query, key) / SIZE**0.5).softmax(dim=-1)

    out = sdpa(*query_key_value)

    torch.testing.assert_close(out.double(), torch.einsum("bhlm,bmhd->blhd", weights, value), rtol=0, atol=1e-6)


def test_one_key_and_value_are_shared_by_the_batch(query_key_value):
    query, key, value = query_key_value

    shared = sdpa(query, *KeyValue(key[:1], value[:1]).of_batch(BATCH))

    assert torch.equal(shared, sdpa(query, key[:1].repeat(BATCH, 1, 1, 1), value[:1].repeat(BATCH, 1, 1, 1)))


def test_the_order_of_keys_does_not_matter(query_key_value):
    query, key, value = query_key_value
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(1))

    permuted = sdpa(query, key[:, order], value[:, order])

    torch.testing.assert_close(permuted, sdpa(query, key, value), rtol=0, atol=1e-6)


def test_weights_sum_to_one(query_key_value):
    query, key, _ = query_key_value
    row = torch.arange(HEADS * SIZE, dtype=torch.float32).reshape(HEADS, SIZE)

    out = sdpa(query, key, row.expand(BATCH, KEYS, HEADS, SIZE))

    torch.testing.assert_close(out, row.expand(BATCH, QUERIES, HEADS, SIZE))


def test_heads_do_not_see_one_another(query_key_value):
    query, key, value = query_key_value
    other_value = value.clone()
    other_value[:, :, 0] += 1

    difference = sdpa(query, key, other_value) - sdpa(query, key, value)

    torch.testing.assert_close(difference[:, :, 0], torch.ones(BATCH, QUERIES, SIZE))
    assert torch.equal(difference[:, :, 1:], torch.zeros(BATCH, QUERIES, HEADS - 1, SIZE))


def without_scale(query, key, value):
    return sdpa(query * SIZE**0.5, key, value)


def not_a_number(query, _key, _value):
    return torch.full_like(query, float("nan"))


def black(query, _key, _value):
    return torch.zeros_like(query)


def slightly_off(query, key, value):
    return sdpa(query, key, value) * 1.02


def broken(_query, _key, _value):
    raise RuntimeError("no kernel image is available")


@pytest.fixture
def as_cudnn(monkeypatch) -> Iterator[None]:
    """Lets a test put a function of its own in cuDNN's place, on the CPU."""
    monkeypatch.setattr(attention, "fits", lambda name, _device, _dtype: name == "cudnn")
    passes.cache_clear()
    yield
    passes.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_pytorchs_own_choice_is_taken(dtype):
    assert choose_attention(CPU, dtype) == "sdpa"


@pytest.mark.parametrize("backend", [without_scale, not_a_number, black, slightly_off])
def test_a_backend_that_computes_something_else_is_passed_over_with_a_warning(monkeypatch, as_cudnn, backend):
    monkeypatch.setitem(BACKENDS, "cudnn", backend)

    with pytest.warns(UserWarning, match="cudnn is wrong on cpu"):
        assert choose_attention(CPU, torch.bfloat16) == "sdpa"


def test_a_backend_that_raises_is_passed_over_with_a_warning(monkeypatch, as_cudnn):
    monkeypatch.setitem(BACKENDS, "cudnn", broken)

    with pytest.warns(UserWarning, match="cudnn failed on cpu: no kernel image"):
        assert choose_attention(CPU, torch.bfloat16) == "sdpa"


def test_a_backend_that_is_right_is_taken(monkeypatch, as_cudnn):
    monkeypatch.setitem(BACKENDS, "cudnn", sdpa)

    assert choose_attention(CPU, torch.bfloat16) == "cudnn"


def test_what_a_backend_makes_of_the_product_is_held_against_float32_too(monkeypatch, as_cudnn):
    def of_qkv(qkv, norm, span, *, is_rotated=True):
        cos, sin = (norm.cos, norm.sin) if is_rotated else (torch.ones_like(norm.cos), torch.zeros_like(norm.sin))
        query, key = qk_norm_rotary(qkv, norm.weight_q, norm.weight_k, cos, sin, head_size=norm.head_size, eps=norm.eps)
        value = qkv.chunk(3, dim=-1)[2].unflatten(-1, (-1, norm.head_size))
        assert span is None
        return sdpa(query, key, value), torch.zeros(1, 1, 4, norm.head_size)

    monkeypatch.setitem(BACKENDS, "cudnn", sdpa)
    monkeypatch.setitem(attention.OF_QKV, "cudnn", of_qkv)
    right = choose_attention(CPU, torch.bfloat16)
    passes.cache_clear()
    monkeypatch.setitem(attention.OF_QKV, "cudnn", partial(of_qkv, is_rotated=False))

    assert right == "cudnn"
    with pytest.warns(UserWarning, match="cudnn is wrong on cpu"):
        assert choose_attention(CPU, torch.bfloat16) == "sdpa"


def test_bfloat16_alone_is_within_a_third_of_what_a_backend_may_be_off():
    assert 0 < relative_error("sdpa", CPU) < attention.MAX_RELATIVE_ERROR / 3


def test_a_backend_is_used_for_every_softmax_of_every_block(monkeypatch, pipeline):
    lengths = []

    def counting(query, key, value):
        lengths.append((query.shape[1], key.shape[1]))
        return sdpa(query, key, value)

    monkeypatch.setitem(BACKENDS, "cudnn", counting)
    transformer = deepcopy(pipeline.transformer)
    shapes = (1, 12, 32), (1, 17, 40), (1, 16, 1, 4, 4), (1, 16, 2, 2, 2)

    transformer.use_attention("cudnn")
    prepared = transformer.prepare(Conditioning(*(torch.zeros(shape) for shape in shapes)))
    transformer(torch.zeros(1, 16, 2, 4, 4), torch.tensor([500.0]), prepared)

    num_video, num_tokens = 8, 4 + 8 + 2
    one_block = [(num_tokens, num_tokens), (num_tokens, 12), (num_tokens, 17)]
    last_block = [(num_video, num_tokens), (num_video, 12), (num_video, 17)]
    assert lengths == one_block * (len(transformer.blocks) - 1) + last_block


@pytest.fixture
def float8_kernel(monkeypatch):
    """Takes the place of FlashAttention-3, which runs on a GPU alone; multiplies the same numbers, and keeps them."""
    seen = []

    def kernel(query, key, value, query_scale, key_scale, value_scale, softmax_scale):
        seen.extend((query, key, value))
        query, key, value = (
            x.float() * scale[:, None, :, None]
            for x, scale in ((query, query_scale), (key, key_scale), (value, value_scale))
        )
        scores = softmax_scale * torch.einsum("blhd,bmhd->bhlm", query, key)
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1), value)

    monkeypatch.setattr(attention, "_flash_attention_3_float8", kernel)
    return seen


@pytest.mark.parametrize("head_size", [12, 32])
def test_float8_attention_rounds_what_is_left_without_the_means(float8_kernel, head_size):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 33, 3, head_size, generator=generator) for _ in range(3))
    key, value = key + 30 * torch.randn(1, 1, 3, head_size, generator=generator), value + 50

    out = attention.flash_attention_3_float8(query, key, value)

    exact = sdpa(query, key, value)
    assert out.shape == exact.shape
    assert (out - exact).norm() / (exact - value.mean(dim=1, keepdim=True)).norm() < attention.MAX_FLOAT8_ERROR
    assert all(x.dtype == torch.float8_e4m3fn and x.shape[-1] % 16 == 0 for x in float8_kernel)
    largest = [x.float().abs().amax(dim=(1, 3)) for x in float8_kernel]
    assert all(torch.allclose(head, torch.tensor(448.0)) for x in largest for head in x.flatten())  # nothing is wasted


@pytest.mark.parametrize("head_size", [12, 32])
@pytest.mark.parametrize("span", [None, slice(5, 20)])
@pytest.mark.parametrize("some_tokens", [8, 2048])
def test_float8_attention_of_one_product_is_that_of_its_parts(float8_kernel, monkeypatch, head_size, span, some_tokens):
    monkeypatch.setattr(attention, "_SOME_TOKENS", some_tokens)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    size, length = 3 * head_size, 33
    qkv = draw(2, length, 3 * size)
    qkv[..., size : 2 * size] += 5 * draw(size)  # what all keys have in common
    angles = 0.01 * draw(length, head_size // 2)
    norm = QkNorm(1 + draw(size).abs(), 1 + draw(size).abs(), angles.cos(), angles.sin(), head_size, 1e-6)

    out = sum(attention.flash_attention_3_float8_of_qkv(qkv, norm, span))

    query, key = qk_norm_rotary(
        qkv, norm.weight_q, norm.weight_k, norm.cos, norm.sin, head_size=head_size, eps=norm.eps
    )
    value = qkv[..., 2 * size :].reshape(2, length, 3, head_size)
    exact = sdpa(query if span is None else query[:, span], key, value)
    from_parts = attention.flash_attention_3_float8(query if span is None else query[:, span], key, value)
    assert out.shape == exact.shape
    error, other = ((x - exact).norm() / exact.norm() for x in (out, from_parts))
    assert error < max(1.3 * other, 0.01)
    assert all(x.float().abs().max() <= 448 for x in float8_kernel)


def test_no_query_or_key_is_larger_than_its_bound():
    """All of a token's length comes to lie in one number: the rotation adds up each pair, and mixing four of them."""
    head_size, size = 16, 48
    qkv = torch.zeros(1, 4, 3 * size)
    for first in range(16, 32, 4):  # of the second head's quarters, the first pair
        qkv[..., first : first + 2] = qkv[..., size + first : size + first + 2] = 1000.0
    qkv[:, 1::2, size : 2 * size] *= -1  # a mean of nothing
    weight = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(head_size)
    angle = torch.full((4, head_size // 2), math.pi / 4)
    norm = QkNorm(weight, weight, angle.cos(), angle.sin(), head_size, 1e-6)
    bound = math.sqrt(size) * torch.tensor([1.0, 2.0, 3.0])

    query, key = kernels.qk_norm_rotary_float8(
        qkv, weight, weight, norm.cos, norm.sin, key_mean=torch.zeros(1, 3, head_size), scales_q=bound / 448,
        scales_k=2 * bound / 448, eps=norm.eps,
    )  # fmt: skip

    exact, _ = qk_norm_rotary(qkv, weight, weight, norm.cos, norm.sin, head_size=head_size, eps=norm.eps)
    exact = mix_quarters(exact)
    assert exact[0, :, 1].max() == pytest.approx(float(bound[1]), rel=1e-5)
    assert (query.float().abs().max(), key.float().abs().max()) == (448, 224)
    torch.testing.assert_close(query.float() * bound[:, None] / 448, exact, rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("head_size", [8, 56, 128])
def test_mixing_changes_no_product(head_size):
    query, key = torch.randn(2, 5, 3, head_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    mixed, mixed_key = mix_quarters(query), mix_quarters(key)

    torch.testing.assert_close((mixed * mixed_key).sum(-1), (query * key).sum(-1))
    torch.testing.assert_close(mixed.norm(dim=-1), query.norm(dim=-1))
    torch.testing.assert_close(mix_quarters(mixed), query)  # done twice, it is undone
    assert not torch.equal(mixed, query)


def test_a_channel_in_which_all_tokens_are_large_costs_less_when_it_is_mixed(float8_kernel, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 256, 8, 32, generator=generator) for _ in range(3))
    query[..., 5] += 30.0
    exact = sdpa(query, key, value)

    mixed = attention.flash_attention_3_float8(query, key, value)
    monkeypatch.setattr(attention, "mix_quarters", lambda x: x)
    unmixed = attention.flash_attention_3_float8(query, key, value)

    error, other = ((x - exact).norm() / exact.norm() for x in (mixed, unmixed))
    assert error < 0.7 * other


def test_a_backend_that_takes_the_product_is_used_in_every_block(float8_kernel, monkeypatch, pipeline):
    monkeypatch.setitem(BACKENDS, "flash_attention_3", sdpa)
    transformer, plain = deepcopy(pipeline.transformer), pipeline.transformer
    shapes = (1, 12, 32), (1, 17, 40), (1, 16, 1, 4, 4), (1, 16, 2, 2, 2)
    conditioning = Conditioning(*(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes))
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))

    transformer.use_attention("flash_attention_3_float8")
    velocity, exact = (
        network(latents, torch.tensor([500.0]), network.prepare(conditioning)) for network in (transformer, plain)
    )

    assert len(float8_kernel) == 3 * len(transformer.blocks)
    assert 0 < (velocity - exact).norm() / exact.norm() < 0.05
    transformer.use_attention("sdpa")
    assert torch.equal(transformer(latents, torch.tensor([500.0]), transformer.prepare(conditioning)), exact)


def test_what_cannot_be_had_is_replaced_by_the_fastest_exact_one(caplog):
    assert choose_attention(CPU, torch.bfloat16, "float8") == "sdpa"
    assert choose_attention(CPU, torch.bfloat16, "cudnn") == "sdpa"
    assert [record.message.partition(" on ")[0] for record in caplog.records] == [
        "attention float8 cannot be had",
        "attention cudnn cannot be had",
    ]
