"""float8 layers: how far they are from the exact ones, and that nothing else is touched."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from scail.quantization import QUANTIZED_LAYERS, Float8FeedForward, Float8Linear, quantize_blocks
from scail.types import Conditioning


def conditioning() -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 12, 32), (1, 17, 40), (1, 16, 1, 8, 8), (1, 16, 2, 4, 4)
    return Conditioning(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.fixture
def quantized(pipeline):
    transformer = deepcopy(pipeline.transformer)
    quantize_blocks(transformer)
    return transformer


def test_a_float8_layer_is_near_the_exact_one():
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 128), torch.randn(3, 50, 256)

    quantized = Float8Linear.of(linear)(x)

    exact = linear(x)
    assert quantized.shape == exact.shape
    assert 0.005 < (quantized - exact).norm() / exact.norm() < 0.05  # 3.7 % at the 14B's sizes, measured


def test_only_the_large_layers_of_the_blocks_are_quantised(quantized):
    names = {name for name, module in quantized.named_modules() if isinstance(module, Float8Linear)}

    assert names == {f"blocks.{i}.{name}" for i in range(len(quantized.blocks)) for name in QUANTIZED_LAYERS}
    assert all(isinstance(block.ffn, Float8FeedForward) for block in quantized.blocks)


def test_weights_take_one_byte_each(quantized):
    weights = [module.weight for module in quantized.modules() if isinstance(module, Float8Linear)]

    assert {weight.element_size() for weight in weights} == {1}


def test_a_quantised_network_is_near_the_exact_one(pipeline, quantized):
    latents, timesteps = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0])
    exact, ours = (net(latents, timesteps, net.prepare(conditioning())) for net in (pipeline.transformer, quantized))

    error = float((ours - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.06
