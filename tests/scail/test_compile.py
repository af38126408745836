"""How often the compiler is asked again, counted with a backend that compiles nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from scail.bench import random_conditioning
from scail.config import SCAIL_TINY
from scail.models.transformer import ScailTransformer
from scail.types import LatentShape

MAX_GRAPHS = 5  # of both parts of a block: for the first size, for the tokens of its last block, for any other size
SIZES = [LatentShape(*grid) for grid in ((3, 8, 8), (5, 8, 8), (1, 16, 8), (2, 8, 12))]
CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch):
    """Grows by one with every graph that is compiled."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield seen
    torch._dynamo.reset()


@torch.inference_mode()
def test_clips_of_many_sizes_and_lengths_are_compiled_a_few_times_and_come_out_the_same(graphs):
    config = replace(SCAIL_TINY, transformer=replace(SCAIL_TINY.transformer, num_layers=2))
    torch.manual_seed(0)
    network, plain = (ScailTransformer(config.transformer) for _ in range(2))
    plain.load_state_dict(network.state_dict())
    network.compile_blocks()

    for shape in SIZES:
        conditioning = random_conditioning(config, shape, CPU, torch.float32)
        latents = torch.randn(1, 16, shape.num_frames, shape.height, shape.width)
        sides, plain_sides = (
            [one.prepare(conditioning), one.with_context(one.prepare(conditioning), conditioning.context * 2)]
            for one in (network, plain)
        )
        velocities = network.velocities(latents, torch.tensor([500.0]), sides)
        expected = plain.velocities(latents, torch.tensor([500.0]), plain_sides)
        network.velocities(latents, torch.tensor([250.0]), sides[:1])
        torch.testing.assert_close(velocities, expected)

    assert len(graphs) <= MAX_GRAPHS
