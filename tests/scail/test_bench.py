from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scail.bench import bench_clip, forward_flop, num_tokens, random_pipeline, table, to_json
from scail.config import SCAIL_14B, SCAIL_TINY
from scail.types import Conditioning, LatentShape

CPU = torch.device("cpu")
LONGEST_CLIP = LatentShape.of_clip(81, 512, 896)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_clip(SCAIL_TINY, device=CPU, dtype=torch.float32, num_frames=5, height=32, width=64, num_steps=2)


@pytest.fixture(scope="module")
def tiny_pipeline():
    return random_pipeline(SCAIL_TINY, device=CPU, dtype=torch.float32)


def conditioning_of(shape: LatentShape) -> Conditioning:
    return Conditioning(
        context=torch.zeros(1, 512, SCAIL_TINY.transformer.text_size),
        image_embeds=torch.zeros(1, 257, SCAIL_TINY.transformer.image_size),
        reference_latents=torch.zeros(1, 16, 1, shape.height, shape.width),
        pose_latents=torch.zeros(1, 16, shape.num_frames, shape.height // 2, shape.width // 2),
    )


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers_in(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_the_longest_clip_has_48832_tokens_and_a_forward_of_3_15e15_flop():
    assert num_tokens(SCAIL_14B.transformer, LONGEST_CLIP) == 48_832
    assert forward_flop(SCAIL_14B.transformer, LONGEST_CLIP) == pytest.approx(3.15e15, rel=0.01)


@pytest.mark.parametrize("shape", [LatentShape(1, 4, 4), LatentShape(3, 4, 8), LatentShape(2, 8, 12)])
def test_tokens_are_counted_as_the_blocks_see_them(tiny_pipeline, record_calls, shape):
    transformer = tiny_pipeline.transformer
    calls = record_calls(transformer.blocks[0].self_attn)
    latents = torch.zeros(1, 16, shape.num_frames, shape.height, shape.width)

    transformer(latents, torch.tensor([500.0]), transformer.prepare(conditioning_of(shape)))

    assert calls[0][0].shape[1] == num_tokens(SCAIL_TINY.transformer, shape)


def test_flop_are_those_that_torch_counts_in_the_blocks(tiny_pipeline):
    shape = LatentShape(3, 4, 8)
    transformer = tiny_pipeline.transformer
    prepared = transformer.prepare(conditioning_of(shape))
    latents = torch.zeros(1, 16, shape.num_frames, shape.height, shape.width)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(latents, torch.tensor([500.0]), prepared)

    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    parts = [
        f"blocks.{i}.{part}" for i in range(len(transformer.blocks)) for part in ("self_attn", "cross_attn", "ffn")
    ]
    assert forward_flop(SCAIL_TINY.transformer, shape) == sum(by_module[f"ScailTransformer.{part}"] for part in parts)


def test_every_layer_but_the_last_costs_the_same():
    one, two, three = (
        forward_flop(replace(SCAIL_14B.transformer, num_layers=num_layers), LONGEST_CLIP) for num_layers in (1, 2, 3)
    )

    assert three - two == two - one > one


def test_a_benchmark_is_plain_json(result):
    assert json.loads(to_json(result)) == result


def test_every_number_of_a_benchmark_is_finite_and_positive(result):
    result = {**result, "clip": {**result["clip"], "seed": 1}}  # a seed of zero is none of its measurements
    del result["first_clip_extra_seconds"]  # a difference of two times, which other processes disturb

    numbers = numbers_in(result)

    assert len(numbers) > 15
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_a_benchmark_says_what_was_measured(result):
    assert result["model"] == "SCAIL_TINY"
    assert result["device"] == "cpu"
    assert result["dtype"] == "float32"
    assert result["clip"]["num_frames"] == 5
    assert result["clip"]["num_inference_steps"] == 2
    assert result["num_tokens"] == 8 + 16 + 4
    assert result["frames_finite"] is True


def test_rates_follow_from_the_seconds(result):
    assert result["forward_seconds"] == pytest.approx(result["seconds"]["denoise"] / 4)
    assert result["forward_flop_per_second"] == pytest.approx(result["forward_flop"] / result["forward_seconds"])
    share = result["forward_flop_per_second"] / result["matmul_flop_per_second"]
    assert result["share_of_matmul_ceiling"] == pytest.approx(share)


def test_the_table_has_a_line_for_every_stage(result):
    lines = table(result).splitlines()

    for stage in result["seconds"]:
        assert sum(line.startswith(stage) for line in lines) == 1
    assert any(line.startswith("peak memory") for line in lines)


def test_random_weights_are_the_same_every_time(tiny_pipeline):
    again = random_pipeline(SCAIL_TINY, device=CPU, dtype=torch.float32)

    for name in ("transformer", "vae", "text_encoder", "image_encoder"):
        state, other = getattr(tiny_pipeline, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(weight, other[key]) for key, weight in state.items())


def test_tokens_of_random_text_are_as_many_as_its_characters(tiny_pipeline):
    token_ids, mask = tiny_pipeline.tokenizer("ab")

    assert token_ids.shape == mask.shape == (1, 512)
    assert mask.sum() == 2
    assert token_ids[0, :3].tolist() == [ord("a"), ord("b"), 0]
