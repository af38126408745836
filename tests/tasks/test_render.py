"""The GPU task in one process: what overlaps, what is shared, what is tried again."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scail import ScailPipeline
from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY, RuntimeConfig, SamplingParams
from scail.encodings import EncodingCache
from scail.errors import CheckpointError, GenerationError, OutOfMemoryError
from scail.fingerprint import checkpoint_fingerprint
from scail.probe import probe_video
from scail.quality import Verdict
from scail.streamed_video import StreamedVideo
from scail.types import ScailOutput
from scail.video import encode_video
from tasks import render, resident
from tasks.attempts import read_attempts
from tasks.checkpoint import inspect_checkpoint
from tasks.errors import DeviceFaultError, ScratchFullError, policy_for
from tasks.inputs import ClipInputs
from tasks.jobs import AttemptStage, ClipJob, ClipMetrics, ClipRequest, ClipStatus
from tasks.render import render_clip
from tasks.resident import load_encodings, load_pipeline, pipeline_spec, room
from tasks.settings import Settings
from tasks.storage import DEFAULT_POLICY

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 5


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name, seed in (("a.png", 0), ("b.png", 1)):
        picture = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(picture).save(folder / name)
    encode_video(folder / "pose.mp4", np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8), fps=24.0, metadata={})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "SCAIL_TINY"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    return folder


@pytest.fixture(autouse=True)
def _fresh_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SCAIL_SCRATCH_DIR", str(tmp_path / "scratch"))
    load_pipeline.cache_clear()
    load_encodings.cache_clear()
    yield
    room.forget()


def spec_of(checkpoint: Path, **changes):
    return pipeline_spec(str(checkpoint), checkpoint_fingerprint(checkpoint), settings=Settings(), **changes)


def job(media: Path, number: int, *, fingerprint: str = "model", **request) -> ClipJob:
    row = {
        "row": number,
        "clip_id": f"clip-{number}",
        "reference": str(media / "a.png"),
        "pose": str(media / "pose.mp4"),
        "prompt": "a dancer",
        "width": WIDTH,
        "height": HEIGHT,
    }
    params = SamplingParams(num_inference_steps=2, guidance_scale=4.0, shift=5.0, seed=number)
    return ClipJob(
        request=ClipRequest(**row | request), key=f"{number:032x}", params=params, checkpoint_fingerprint=fingerprint
    )


class Recorder:
    """When each stage of each clip ran, in this process."""

    def __init__(self) -> None:
        self.intervals: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        self._clip = threading.local()

    def begin(self, clip_id: str) -> None:
        self._clip.id = clip_id

    @contextmanager
    def stage(self, name: str, seconds: float):
        start = time.perf_counter()
        time.sleep(seconds)
        yield
        self.intervals[self._clip.id][name] = (start, time.perf_counter())


@pytest.fixture
def recorder(media, monkeypatch) -> Recorder:
    """Stages that only take time: a third of a clip's time before the GPU, a third on it, a third after it."""
    recorder = Recorder()
    frames = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)

    def fetch(job, _scratch_dir, **_):
        recorder.begin(job.clip_id)

    def decode(*_args, **_kwargs) -> ClipInputs:
        with recorder.stage("prepare", 0.15):
            return ClipInputs(frames[0], frames, 24.0, (HEIGHT, WIDTH), probe_video(media / "pose.mp4"), 1.0)

    class Pipeline:
        device = torch.device("cpu")
        attention, quantization, memory, loras = "sdpa", "none", "resident", ()

        def render(self, *_args, on_frames, **_kwargs) -> ScailOutput:
            with recorder.stage("gpu", 1.0):
                on_frames(frames)
                return ScailOutput(frames, torch.zeros(1), {"denoise": 0.3}, 0.0, 0)

    finish = StreamedVideo.finish

    def encode(video: StreamedVideo) -> None:
        with recorder.stage("encode", 0.1):
            finish(video)

    monkeypatch.setattr(render, "fetch_inputs", fetch)
    monkeypatch.setattr(render, "decode_inputs", decode)
    monkeypatch.setattr(render, "load_pipeline", lambda *_args: Pipeline())
    monkeypatch.setattr(render, "identity_of", lambda *_args: 1.0)
    monkeypatch.setattr(StreamedVideo, "finish", encode)
    return recorder


def test_one_clip_is_on_the_gpu_while_its_neighbours_are_prepared_and_encoded(recorder, media, tmp_path):
    jobs = [job(media, number) for number in range(6)]
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint="fake")

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(task, jobs))

    assert {result.status for result in results} == {ClipStatus.RENDERED}
    clips = sorted(recorder.intervals.values(), key=lambda clip: clip["gpu"])
    for earlier, later in itertools.pairwise(clips):
        assert earlier["gpu"][1] <= later["gpu"][0], "two clips were on the GPU at once"
        assert earlier["encode"][0] < later["gpu"][1], "the next clip waited until this one was encoded"
    for earlier, later in itertools.pairwise(clips[1:]):  # the first two come in together
        assert later["prepare"][0] < earlier["gpu"][1], "the next clip's inputs were not fetched meanwhile"


def test_a_clip_that_the_next_one_may_kill_while_it_is_encoded_is_on_record_as_off_the_gpu(
    recorder, media, tmp_path, monkeypatch
):
    output, stages, encode = str(tmp_path / "out"), [], StreamedVideo.finish

    def finish(video: StreamedVideo) -> None:
        attempts = read_attempts(output, job(media, 1).key, policy=DEFAULT_POLICY)
        stages.extend(attempt.stage for attempt in attempts)
        encode(video)

    monkeypatch.setattr(StreamedVideo, "finish", finish)

    render_clip.fn(job(media, 1), output_uri=output, run_id="run", checkpoint="fake")

    assert stages == [AttemptStage.ENCODING]


def test_clips_that_share_a_reference_a_pose_or_a_prompt_encode_it_once(media, checkpoint, tmp_path):
    fingerprint = checkpoint_fingerprint(checkpoint)
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))
    rows = [{}, {}, {"reference": str(media / "b.png")}, {"prompt": "a runner"}]

    results = [task(job(media, number, fingerprint=fingerprint, **row)) for number, row in enumerate(rows)]

    assert [result.metrics.cache_hits for result in results] == [
        (),
        ("prompt", "negative_prompt", "image", "reference", "pose"),
        ("prompt", "negative_prompt", "pose"),
        ("negative_prompt", "image", "reference", "pose"),
    ]


def test_an_empty_prompt_and_an_empty_negative_prompt_are_one_encoding(media, checkpoint, monkeypatch):
    pipeline = load_pipeline(spec_of(checkpoint))
    cache, encoded = EncodingCache(max_bytes=2**24), []
    encode = ScailPipeline.encode_prompt
    monkeypatch.setattr(ScailPipeline, "encode_prompt", lambda self, text: encoded.append(text) or encode(self, text))
    picture, pose = np.asarray(Image.open(media / "a.png")), np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    one_step = SamplingParams(num_inference_steps=1, guidance_scale=4.0)

    hits = []
    for prompt in ("", "a dancer"):
        cache.begin_clip()
        pipeline(picture, pose, prompt, negative_prompt="", params=one_step, size=(HEIGHT, WIDTH), encodings=cache)
        hits.append(cache.hits)

    assert encoded == ["", "a dancer"]
    assert hits == [[], ["negative_prompt", "image", "reference", "pose"]]  # of earlier clips, not of itself


def test_shared_encodings_change_no_pixel(media, checkpoint):
    pipeline = load_pipeline(spec_of(checkpoint))
    reference = np.asarray(Image.open(media / "a.png"))
    pose = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    params, encodings = SamplingParams(num_inference_steps=2, seed=3), EncodingCache(max_bytes=2**24)

    plain = pipeline(reference, pose, "hi", params=params, size=(HEIGHT, WIDTH))
    first = pipeline(reference, pose, "hi", params=params, size=(HEIGHT, WIDTH), encodings=encodings)
    encodings.begin_clip()
    second = pipeline(reference, pose, "hi", params=params, size=(HEIGHT, WIDTH), encodings=encodings)

    assert len(encodings.hits) == 5
    assert torch.equal(plain.latents, first.latents)
    assert torch.equal(plain.latents, second.latents)


def test_the_cache_of_encodings_keeps_to_its_bytes_and_forgets_the_oldest():
    cache, calls = EncodingCache(max_bytes=8), []

    def encode(text: str) -> torch.Tensor:
        calls.append(text)
        return torch.zeros(1)  # 4 bytes

    for text in ("a", "b", "a", "c", "a", "b"):
        cache.get("prompt", encode, text)

    assert calls == ["a", "b", "c", "b"]


def test_equal_bytes_of_another_shape_are_other_content():
    cache = EncodingCache(max_bytes=1000)

    first = cache.get("pose", torch.clone, torch.zeros(2, 3))
    second = cache.get("pose", torch.clone, torch.zeros(3, 2))

    assert (first.shape, second.shape) == ((2, 3), (3, 2))


def test_a_clip_that_another_run_has_published_counts_as_skipped(recorder, media, tmp_path):
    task = partial(render_clip.fn, job(media, 1), output_uri=str(tmp_path / "out"), checkpoint="fake")

    statuses = [task(run_id=run_id).status for run_id in ("run-1", "run-1", "run-2")]

    assert statuses == [ClipStatus.RENDERED, ClipStatus.RENDERED, ClipStatus.SKIPPED]


def test_a_clip_that_another_run_renders_is_left_to_it(recorder, media, tmp_path):
    task = partial(render_clip.fn, job(media, 1), output_uri=str(tmp_path / "out"), checkpoint="fake")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(task, run_id="run-1")
        time.sleep(0.2)
        second = pool.submit(task, run_id="run-2").result()

    assert second is None
    assert first.result().status is ClipStatus.RENDERED


def test_a_fault_of_the_gpu_ends_the_worker_and_not_a_process_of_ours(recorder, media, tmp_path, monkeypatch):
    ended = []

    def broken(*_args, **_kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken.device = torch.device("cpu")
    monkeypatch.setattr(render, "load_pipeline", lambda *_args: SimpleNamespace(render=broken))
    monkeypatch.setattr(render, "replace_process", lambda: ended.append(1))
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint="fake")

    for number, is_worker in enumerate((False, True)):
        monkeypatch.setattr(render, "in_dask_worker", lambda is_worker=is_worker: is_worker)
        with pytest.raises(DeviceFaultError):
            task(job(media, number))

    assert len(ended) == 1


def test_the_gpu_is_free_again_after_a_clip_failed_on_it(recorder, media, tmp_path, monkeypatch):
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint="fake")
    with monkeypatch.context() as patched:
        patched.setattr(render, "compute", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            task(job(media, 1))

    assert task(job(media, 2)).status is ClipStatus.RENDERED


def test_metrics_tell_every_attempt(recorder, media, tmp_path, monkeypatch):
    task = partial(render_clip.fn, job(media, 1), output_uri=str(tmp_path / "out"), run_id="run", checkpoint="fake")
    with monkeypatch.context() as patched:
        patched.setenv("SCAIL_MIN_FREE_SCRATCH_BYTES", str(2**62))
        with pytest.raises(ScratchFullError):
            task()

    metrics = task().metrics

    assert metrics.attempts == 2
    assert [attempt.outcome for attempt in metrics.attempt_log] == ["ScratchFullError", "published"]
    assert metrics.attempt_log[-1].stage is AttemptStage.PUBLISHING


def test_a_black_clip_is_rendered_once_more_on_the_exact_path(media, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SCAIL_COMPILED", "true")
    specs, decode = [], ScailPipeline.decode_pieces

    def load(spec):
        specs.append(spec.runtime)
        return load_pipeline(replace(spec, runtime=replace(spec.runtime, compiled=False)))  # a compiler may be missing

    def black_unless_exact(pipeline, latents):
        return (frames * (len(specs) > 1) for frames in decode(pipeline, latents))

    monkeypatch.setattr(render, "load_pipeline", load)
    monkeypatch.setattr(ScailPipeline, "decode_pieces", black_unless_exact)
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))
    row = job(media, 1, fingerprint=checkpoint_fingerprint(checkpoint))

    with pytest.raises(GenerationError, match="there is nothing to see: black percent 100, above 50"):
        task(row)
    result = task(row)

    assert (specs[0].compiled, specs[0].attention) == (True, None)
    assert specs[1] == RuntimeConfig(attention="sdpa", memory=specs[0].memory)
    assert [attempt.outcome for attempt in result.metrics.attempt_log] == ["GenerationError", "published"]


def test_a_clip_of_noise_is_published_and_to_be_looked_at(media, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SCAIL_QUALITY_GRAIN", "-2,-1")
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))

    result = task(job(media, 1, fingerprint=checkpoint_fingerprint(checkpoint)))

    assert result.status is ClipStatus.RENDERED
    assert result.is_to_review
    assert result.quality.verdict is Verdict.FAILED_QUALITY
    assert ("grain", -1.0) in {(finding.name, finding.bound) for finding in result.quality.findings}
    assert result.quality.limits == Settings().quality.limits()._asdict()
    assert None not in (result.quality.numbers.identity, result.quality.numbers.join_jump)
    assert ClipMetrics.model_validate_json(result.metrics.model_dump_json()) == result.metrics


def too_large_for(policies, monkeypatch):
    """Clips run out of memory unless the model is placed in another way than `policies`."""
    whole_render = ScailPipeline.render

    def bounded(self, *args, **kwargs):
        if self.memory in policies:
            raise OutOfMemoryError(f"does not fit as {self.memory}")
        return whole_render(self, *args, **kwargs)

    monkeypatch.setattr(ScailPipeline, "render", bounded)


def attempts_at(task, number_of_attempts):
    for _ in range(number_of_attempts):
        with pytest.raises(OutOfMemoryError):
            task()


def test_a_clip_without_room_is_tried_again_then_under_the_next_cheaper_policy(
    media, checkpoint, tmp_path, monkeypatch, caplog
):
    too_large_for({"resident"}, monkeypatch)
    fingerprint = checkpoint_fingerprint(checkpoint)
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))
    first = partial(task, job(media, 1, fingerprint=fingerprint))

    attempts_at(first, 2)
    metrics, next_metrics = first().metrics, task(job(media, 2, fingerprint=fingerprint)).metrics

    assert (metrics.memory, metrics.attempts) == ("balanced", 3)
    assert metrics.notes == ("out of memory as resident: balanced since",)
    assert (next_metrics.memory, next_metrics.attempts) == ("balanced", 1)  # nobody runs into the same wall again
    assert "goes on as balanced" in caplog.text


def test_memory_policies_come_one_after_the_other_down_to_the_last(media, checkpoint, tmp_path, monkeypatch):
    too_large_for({"resident", "balanced"}, monkeypatch)
    clip = job(media, 1, fingerprint=checkpoint_fingerprint(checkpoint))
    task = partial(render_clip.fn, clip, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))

    attempts_at(task, 3)

    assert task().metrics.memory == "low"


def test_a_model_that_did_not_fit_leaves_before_the_next_is_loaded_though_its_error_is_kept(
    media, checkpoint, tmp_path, monkeypatch
):
    too_large_for({"resident"}, monkeypatch)
    clip = job(media, 1, fingerprint=checkpoint_fingerprint(checkpoint))
    task = partial(render_clip.fn, clip, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))
    pipelines, kept = [], []
    load = resident._load

    def counted(spec):
        assert not any(pipeline() for pipeline in pipelines)
        pipelines.append(weakref.ref(loaded := load(spec)))
        return loaded

    monkeypatch.setattr(resident, "_load", counted)
    for _ in range(2):
        try:
            task()
        except OutOfMemoryError as error:
            kept.append(error)  # as Prefect keeps it in the state of the attempt

    assert task().metrics.memory == "balanced"
    assert (len(kept), len(pipelines)) == (2, 2)


def test_without_a_cheaper_policy_the_clip_fails(media, checkpoint, tmp_path, monkeypatch):
    too_large_for({"resident", "balanced", "low"}, monkeypatch)
    clip = job(media, 1, fingerprint=checkpoint_fingerprint(checkpoint))
    task = partial(render_clip.fn, clip, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))

    attempts_at(task, 4)

    last = OutOfMemoryError("full")
    assert policy_for(last).max_attempts == 4


def test_a_profile_whose_arithmetic_is_not_to_be_had_is_rendered_exactly_and_says_so(media, checkpoint, tmp_path):
    clip = job(media, 1, fingerprint=checkpoint_fingerprint(checkpoint)).model_copy(update={"profile": "quality"})

    metrics = render_clip.fn(clip, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint)).metrics

    assert (metrics.profile, metrics.quantization, metrics.attention) == ("quality", "none", "sdpa")
    assert metrics.notes == (
        "profile quality asks for fp8; rendered with exact products",
        "profile quality asks for attention in float8; rendered with an exact one",
    )


def test_a_lora_of_the_settings_is_in_the_pixels_the_fingerprint_and_the_metrics(
    media, checkpoint, tmp_path, monkeypatch
):
    lora = tmp_path / "style.safetensors"
    save_file({"blocks.0.ffn.2.diff_b": torch.full((48,), 3.0)}, lora)
    plain = checkpoint_fingerprint(checkpoint)
    monkeypatch.setenv("SCAIL_LORA", f"{lora}:0.5")
    model = inspect_checkpoint(str(checkpoint))
    task = partial(render_clip.fn, output_uri=str(tmp_path / "out"), run_id="run", checkpoint=str(checkpoint))

    metrics = task(job(media, 1, fingerprint=model.fingerprint)).metrics

    assert model.fingerprint != plain
    assert metrics.loras == model.loras == ("style.safetensors:0.5",)
    bias = load_pipeline(pipeline_spec(str(checkpoint), model.fingerprint, settings=Settings())).transformer
    assert (bias.state_dict()["blocks.0.ffn.2.bias"] > 1).all()
    with pytest.raises(CheckpointError, match="has the fingerprint"):
        task(job(media, 2, fingerprint=plain))  # planned by somebody without the LoRA


def test_another_model_is_loaded_only_when_the_one_before_has_gone(checkpoint, monkeypatch):
    alive = []
    load = resident._load

    def counted(spec):
        gc.collect()
        alive.append(sum(pipeline() is not None for pipeline in pipelines))
        pipelines.append(weakref.ref(loaded := load(spec)))
        return loaded

    pipelines: list[weakref.ref] = []
    monkeypatch.setattr(resident, "_load", counted)

    for profile in ("exact", "quality", "exact", "exact"):
        load_pipeline(spec_of(checkpoint, profile=profile))

    assert alive == [0, 0, 0]
