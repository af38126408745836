from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from scail.bench import bench_clip, forward_flop, linear_flop, random_pipeline
from scail.bench_goals import (
    Row,
    Workload,
    clip_rows,
    forward_seconds,
    pose_rows,
    quantized_rows,
    rows_table,
    top_kernels,
    vae_rows,
)
from scail.bench_peers import library_forward_seconds, median_seconds
from scail.config import SCAIL_14B, SCAIL_TINY
from scail.types import LatentShape

CPU = torch.device("cpu")
WORK = Workload(SCAIL_TINY, CPU, torch.float32, num_frames=5, height=32, width=64, compiled=False)


@pytest.fixture(scope="module")
def tiny_pipeline():
    return random_pipeline(SCAIL_TINY, device=CPU, dtype=torch.float32)


def is_a_time(number: float | None) -> bool:
    return number is not None and math.isfinite(number) and number > 0


def test_goals_are_those_of_the_largest_clip_of_the_real_model_on_a_gpu():
    largest = Workload(SCAIL_14B, torch.device("cuda"), torch.bfloat16, 81, 512, 896, compiled=True)

    assert largest.has_goals
    assert replace(largest, height=896, width=512).has_goals
    assert not replace(largest, num_frames=77).has_goals
    assert not replace(largest, config=SCAIL_TINY).has_goals
    assert not replace(largest, device=CPU).has_goals


@pytest.mark.parametrize(
    ("reached", "goal", "at_least", "is_met"),
    [(1.0, 1.2, False, True), (1.3, 1.2, False, False), (97.5, 97.0, True, True), (96.0, 97.0, True, False)],
)
def test_a_goal_is_an_upper_limit_or_a_lower_one(reached, goal, at_least, is_met):
    assert Row("figure", "s", reached, goal, at_least).is_met is is_met


def test_without_a_goal_nothing_is_met_or_missed():
    assert Row("figure", "s", 1.0).is_met is None


def test_the_vae_is_timed_beside_the_librarys_pass():
    decode, encode = vae_rows(WORK)

    assert (decode.figure, encode.figure) == ("VAE decode", "VAE encode, pose and reference")
    assert all(is_a_time(number) for row in (decode, encode) for number in (row.reached, row.beside))


def test_the_pose_renderer_has_a_goal_for_each_kind_of_device():
    (row,) = pose_rows(WORK)

    assert is_a_time(row.reached)
    assert row.goal == 15.0


def test_diffusers_network_takes_any_number_of_tokens():
    for length in (114, 97):  # 97 is prime: one row of patches
        assert is_a_time(library_forward_seconds(SCAIL_TINY.transformer, length, CPU, torch.float32, compiled=False))


def test_a_quantised_forward_has_no_ceiling_where_there_is_no_float8(tiny_pipeline):
    (row,) = quantized_rows(WORK, tiny_pipeline, name="float8 products", goal=3.3)

    assert row.figure == "forward, float8 products"
    assert is_a_time(row.reached)
    assert row.beside is None


def test_whole_clips_are_computed_from_stages_and_forwards():
    stages = {"encode_pose": 1.0, "denoise": 100.0, "decode_latents": 2.0}

    fast, full = clip_rows("exact", {"seconds": stages}, 0.5, minutes=8.0)

    assert fast.reached == 1.0 + 2.0 + 4 * 0.5
    assert full.reached == (1.0 + 2.0 + 100 * 0.5) / 60


def test_matrix_products_and_attention_are_a_forward():
    config, shape = SCAIL_14B.transformer, LatentShape.of_clip(81, 512, 896)

    assert linear_flop(config, shape) / forward_flop(config, shape) == pytest.approx(1.17 / 3.15, abs=0.01)


def test_a_clip_can_be_measured_with_the_model_that_is_there(tiny_pipeline):
    clip = {"num_frames": 5, "height": 32, "width": 64, "num_steps": 1}

    result = bench_clip(SCAIL_TINY, device=CPU, dtype=torch.float32, **clip, pipeline=tiny_pipeline)

    assert result["attention"] == tiny_pipeline.attention
    assert is_a_time(forward_seconds(tiny_pipeline, WORK))


def test_kernels_are_told_by_their_share():
    x = torch.randn(128, 128)

    kernels = top_kernels(lambda: torch.tanh(x @ x), CPU, limit=3)

    assert "aten::mm" in {kernel["kernel"] for kernel in kernels}
    assert 0 < sum(kernel["share"] for kernel in kernels) <= 1
    assert [kernel["milliseconds"] for kernel in kernels] == sorted(
        (kernel["milliseconds"] for kernel in kernels), reverse=True
    )


def test_the_table_says_what_is_met_and_beside_what():
    rows = [
        Row("VAE decode", "s", 0.8, 1.2, beside=2.37, note="diffusers"),
        Row("warm worker, GPU busy", "%", 90.0, 97.0, at_least=True),
        Row("pose renderer, a frame", "ms", 0.7),
    ]

    _, first, second, third = rows_table(rows).splitlines()

    assert "≤ 1.2 s met" in first
    assert first.endswith("2.37 diffusers")
    assert "≥ 97 % not met" in second
    assert "met" not in third


def test_the_median_leaves_the_first_calls_out():
    durations = iter([9.0, 9.0, 1.0, 3.0, 2.0])
    clock = [0.0]

    def call() -> None:
        clock[0] += next(durations)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("scail.bench_peers.time.perf_counter", lambda: clock[0])
        assert median_seconds(call, CPU, repeats=3, warm_up=2) == 2.0
