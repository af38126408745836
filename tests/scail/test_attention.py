from __future__ import annotations

import pytest
import torch

from scail.models.attention import attention

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 5, 7, 3, 8


@pytest.fixture
def query_key_value() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(BATCH, length, HEADS, SIZE, generator=generator) for length in (QUERIES, KEYS, KEYS))


def test_it_is_the_softmax_of_the_scaled_scores(query_key_value):
    query, key, value = (x.double() for x in query_key_value)
    weights = (torch.einsum("blhd,bmhd->bhlm", query, key) / SIZE**0.5).softmax(dim=-1)

    out = attention(*query_key_value)

    torch.testing.assert_close(out.double(), torch.einsum("bhlm,bmhd->blhd", weights, value), rtol=0, atol=1e-6)


def test_one_key_and_value_are_shared_by_the_batch(query_key_value):
    query, key, value = query_key_value

    shared = attention(query, key[:1], value[:1])

    repeated = attention(query, key[:1].repeat(BATCH, 1, 1, 1), value[:1].repeat(BATCH, 1, 1, 1))
    torch.testing.assert_close(shared, repeated, rtol=0, atol=0)


def test_the_order_of_keys_does_not_matter(query_key_value):
    query, key, value = query_key_value
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(1))

    permuted = attention(query, key[:, order], value[:, order])

    torch.testing.assert_close(permuted, attention(query, key, value), rtol=0, atol=1e-6)


def test_weights_sum_to_one(query_key_value):
    query, key, _ = query_key_value
    row = torch.arange(HEADS * SIZE, dtype=torch.float32).reshape(HEADS, SIZE)

    out = attention(query, key, row.expand(BATCH, KEYS, HEADS, SIZE))

    torch.testing.assert_close(out, row.expand(BATCH, QUERIES, HEADS, SIZE))


def test_heads_do_not_see_one_another(query_key_value):
    query, key, value = query_key_value
    other_value = value.clone()
    other_value[:, :, 0] += 1

    difference = attention(query, key, other_value) - attention(query, key, value)

    torch.testing.assert_close(difference[:, :, 0], torch.ones(BATCH, QUERIES, SIZE))
    assert torch.equal(difference[:, :, 1:], torch.zeros(BATCH, QUERIES, HEADS - 1, SIZE))
