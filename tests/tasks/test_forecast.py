import random
from dataclasses import replace

import pytest

from scail.config import PROFILES, SamplingParams
from tasks import storage
from tasks.forecast import (
    MAX_TIMINGS_PER_RUN,
    MEASURED,
    Law,
    Timing,
    Work,
    fit,
    forecast_clips,
    read_history,
    timings_of,
    work_of,
)
from tasks.jobs import ClipRequest
from tasks.storage import DEFAULT_POLICY
from tests.tasks.test_results import metrics_of

TRUE_LAW = Law(per_token=4.5e-5, per_pair=1.6e-9, fixed=0.6, per_megapixel=0.07)
QUALITY = PROFILES["quality"].sampling
SIZES = ((512, 896), (896, 512), (384, 672), (256, 448), (704, 1280))


def timing_of(number, *, law=TRUE_LAW, size=(512, 896), num_frames=81, steps=50, guidance=4.0, noise=1.0, **changes):
    work = work_of(num_frames, size, steps * (2 if guidance > 1 else 1))
    other = law.fixed + law.per_megapixel * work.megapixels
    values = {
        "key": f"key-{number}",
        "device": "NVIDIA H200",
        "checkpoint_fingerprint": "abc",
        "pose_uri": f"gs://studio/poses/{number}.mp4",
        "pose_num_frames": num_frames,
        "num_frames": num_frames,
        "height": size[0],
        "width": size[1],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "denoise_seconds": (law.seconds(work) - other) * noise,
        "other_seconds": other * noise,
        "finished_at": f"2026-01-02T03:{number // 60 % 60:02}:{number % 60:02}+00:00",
    }
    return Timing(**values | changes)


def history(count, *, seed=0, sigma=0.03, **fixed):
    rng = random.Random(seed)
    varied = {
        "size": lambda: rng.choice(SIZES),
        "num_frames": lambda: rng.choice((41, 61, 81)),
        "steps": lambda: rng.choice((4, 20, 50)),
        "guidance": lambda: rng.choice((1.0, 4.0)),
    }
    return [
        timing_of(
            number,
            noise=rng.lognormvariate(0, sigma),
            **{name: choose() for name, choose in varied.items() if name not in fixed},
            **fixed,
        )
        for number in range(count)
    ]


def clip(number=0, **changes):
    values = {"row": number + 2, "clip_id": f"c{number}", "reference": "r.png", "pose": f"gs://other/{number}.mp4"}
    return ClipRequest(**values | changes)


def forecast(clips, timings, *, fingerprint="abc", model="SCAIL_14B", device=None, price=None, params=QUALITY):
    return forecast_clips(
        [(request, params) for request in clips],
        timings,
        checkpoint_fingerprint=fingerprint,
        model_name=model,
        device=device,
        price_per_gpu_hour=price,
    )


def true_seconds(size=(512, 896), num_frames=81, num_forwards=100):
    return TRUE_LAW.seconds(work_of(num_frames, size, num_forwards))


def test_a_full_clip_has_the_tokens_that_the_network_sees():
    assert work_of(81, (512, 896), 100) == Work(100, 48_832, pytest.approx(81 * 512 * 896 / 1e6))


@pytest.mark.parametrize("size", [(512, 896), (256, 448), (704, 1280)])
@pytest.mark.parametrize(("steps", "guidance", "num_forwards"), [(50, 4.0, 100), (4, 1.0, 4)])
def test_a_known_law_is_recovered_within_a_few_per_cent(size, steps, guidance, num_forwards):
    timings = [timing_of(999, num_frames=81, pose_uri="gs://other/0.mp4"), *history(120)]
    request = clip(0, height=size[0], width=size[1])
    params = replace(QUALITY, num_inference_steps=steps, guidance_scale=guidance)

    found = forecast([request], timings, params=params)

    assert found.gpu_seconds == pytest.approx(true_seconds(size, 81, num_forwards), rel=0.04)


def test_clips_of_one_size_alone_forecast_that_size_exactly_and_another_with_sense():
    alike = history(40, size=(512, 896), num_frames=81, steps=50, guidance=4.0)

    same = forecast([clip()], alike)
    smaller = forecast([clip(height=256, width=448)], alike)

    assert same.gpu_seconds == pytest.approx(true_seconds(), rel=0.02)
    assert smaller.gpu_seconds == pytest.approx(true_seconds((256, 448)), rel=0.25)
    assert smaller.gpu_seconds < same.gpu_seconds / 6  # a quarter of the tokens, and attention a sixteenth


def test_one_earlier_clip_is_enough_for_a_forecast_but_not_for_a_range():
    found = forecast([clip()], history(1, size=(512, 896), num_frames=81, steps=50, guidance=4.0, sigma=0.0))

    assert found.gpu_seconds == pytest.approx(true_seconds(), rel=0.01)
    assert found.range_seconds is None


def test_the_range_is_what_a_tenth_of_the_earlier_clips_stayed_below_and_above():
    found = forecast([clip()], history(400, sigma=0.1))

    low, high = (seconds / found.gpu_seconds for seconds in found.range_seconds)
    assert low == pytest.approx(0.88, abs=0.04)  # exp(∓1.28 × 0.1)
    assert high == pytest.approx(1.14, abs=0.04)


def test_a_few_disturbed_clips_do_not_bend_the_forecast():
    disturbed = [timing_of(1000 + number, noise=6.0) for number in range(8)]

    found = forecast([clip(max_frames=81)], [*history(100, num_frames=81), *disturbed])

    assert found.gpu_seconds == pytest.approx(true_seconds(), rel=0.04)


def test_only_the_same_checkpoint_on_the_last_device_teaches():
    own = history(20, num_frames=81)
    of_another_checkpoint = [
        timing_of(number, noise=9.0, checkpoint_fingerprint="xyz", finished_at="2026-02-02T00:00:00+00:00")
        for number in range(20)
    ]
    on_an_older_device = [
        timing_of(number, noise=3.0, key=f"old-{number}", device="NVIDIA A100", finished_at="2025-01-01T00:00:00+00:00")
        for number in range(20)
    ]

    found = forecast([clip()], [*of_another_checkpoint, *own, *on_an_older_device])
    on_the_older = forecast([clip()], [*own, *on_an_older_device], device="a100")

    assert found.device == "NVIDIA H200"
    assert found.gpu_seconds == pytest.approx(true_seconds(), rel=0.04)
    assert on_the_older.device == "NVIDIA A100"
    assert on_the_older.gpu_seconds == pytest.approx(3 * true_seconds(), rel=0.04)


def test_a_pose_seen_before_has_the_length_it_had():
    timings = [timing_of(1, num_frames=41, pose_uri="gs://studio/short.mp4"), *history(30, num_frames=81)]

    known = forecast([clip(pose="gs://studio/short.mp4")], timings)
    unknown = forecast([clip()], timings)

    assert known.gpu_seconds == pytest.approx(true_seconds(num_frames=41), rel=0.04)
    assert unknown.gpu_seconds == pytest.approx(true_seconds(num_frames=81), rel=0.04)
    assert "unknown length" in unknown.basis
    assert "unknown length" not in known.basis


def test_max_frames_shortens_a_clip():
    found = forecast([clip(max_frames=41)], history(60, num_frames=81))

    assert found.gpu_seconds == pytest.approx(true_seconds(num_frames=41), rel=0.15)


def test_without_history_the_forecast_is_our_own_measurement_and_says_so():
    found = forecast([clip(number) for number in range(3)], [], fingerprint=None, price=3.6)

    measured = MEASURED["SCAIL_14B", "NVIDIA H200"]
    assert found.gpu_seconds == pytest.approx(3 * (100 * measured.forward_seconds + measured.other_seconds))
    assert found.cost == pytest.approx(found.gpu_seconds / 3600 * 3.6)
    assert found.range_seconds is None
    assert "a guess from 5.93 s per forward at full size on NVIDIA H200" in str(found)


@pytest.mark.parametrize(("model", "device"), [("SCAIL_14B", "CPU"), ("SCAIL_TINY", None), ("SCAIL_14B", "A100")])
def test_where_nothing_was_measured_there_is_no_forecast(model, device):
    found = forecast([clip()], [], model=model, device=device, price=2.0)

    assert found.gpu_seconds is None
    assert found.cost is None
    assert str(found).startswith("no forecast: ")


def test_a_forecast_reads_as_a_sentence():
    alike = history(40, size=(512, 896), num_frames=81, steps=50, guidance=4.0, sigma=0.05)

    text = str(forecast([clip(number) for number in range(20)], alike, price=4.0))

    assert text.startswith("forecast: ")
    assert " of GPU time (p10–p90 " in text  # noqa: RUF001
    assert ", cost " in text
    assert "learned from 40 earlier clips of this checkpoint on NVIDIA H200" in text


def test_times_of_a_cpu_are_not_called_gpu_time():
    text = str(forecast([clip()], history(6, device="x86_64 CPU")))

    assert "compute time" in text
    assert "GPU" not in text


def test_no_coefficient_is_negative_whatever_the_clips_took():
    rng = random.Random(1)
    for _ in range(200):
        timings = [timing_of(number, size=rng.choice(SIZES), noise=rng.lognormvariate(0, 1.5)) for number in range(4)]
        law, _ = fit(timings)

        assert min(law) >= 0.0
        assert law.seconds(work_of(81, (512, 896), 100)) > 0.0


def test_a_long_run_leaves_a_sample_from_its_beginning_to_its_end():
    clips = [metrics_of(f"c{number}") for number in range(3 * MAX_TIMINGS_PER_RUN + 7)]

    timings = timings_of(clips)

    assert MAX_TIMINGS_PER_RUN / 2 < len(timings) <= MAX_TIMINGS_PER_RUN
    assert timings[0].key == "key-of-c0"
    assert int(timings[-1].key.removeprefix("key-of-c")) > len(clips) - 10


def test_history_is_read_from_the_newest_runs_and_a_damaged_file_is_left_out(tmp_path):
    for run_id, lines in (
        ("20260101T000000Z-a", timing_of(1).model_dump_json()),
        ("20260102T000000Z-b", "{ not json"),
        ("20260103T000000Z-c", timing_of(3).model_dump_json()),
    ):
        storage.publish_bytes(f"{tmp_path}/runs/{run_id}/timings.jsonl", lines.encode())

    found = read_history(str(tmp_path), policy=DEFAULT_POLICY)

    assert [timing.key for timing in found] == ["key-3", "key-1"]
    assert read_history(str(tmp_path / "nowhere"), policy=DEFAULT_POLICY) == []


def test_guidance_of_one_or_less_costs_one_forward_a_step():
    timings = history(60, num_frames=81)

    guided = forecast([clip()], timings, params=SamplingParams(guidance_scale=4.0))
    unguided = forecast([clip()], timings, params=SamplingParams(guidance_scale=1.0))

    assert unguided.gpu_seconds == pytest.approx(guided.gpu_seconds / 2, rel=0.03)
