"""The GPU task: one row in, one published clip out. A thin shell around `ScailPipeline`: fetch → call → write."""

from __future__ import annotations

import logging
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from scail.config import PROFILES
from scail.errors import GenerationError, OutOfMemoryError
from scail.ffmpeg_process import ffmpeg_version, find_ffmpeg
from tasks import errors, storage
from tasks.attempts import OpenAttempt, open_attempt
from tasks.inputs import ClipInputs, decode_inputs, fetch_inputs
from tasks.jobs import Attempt, AttemptStage, ClipJob, ClipMetrics, ClipQuality, ClipResult, ClipStatus, DoneRecord
from tasks.plan import find_done, result_of
from tasks.progress import progress_sink
from tasks.resident import load_encodings, load_pipeline, pipeline_spec, room
from tasks.scratch import clip_scratch
from tasks.settings import Settings
from tasks.thrift import tidy
from tasks.turns import Turn
from tasks.watchdog import time_limit
from tasks.worker import in_dask_worker, replace_process

if TYPE_CHECKING:
    from pydantic import BaseModel

    from scail import ScailOutput, ScailPipeline
    from scail.quality import QualityLimits
    from scail.types import ClipPixels
    from scail.video import Frames

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]  # stage, units done, units in all

VIDEO, POSTER, METRICS = "video.mp4", "poster.jpg", "metrics.json"


@task(
    name="render-clip",
    task_run_name="{job.request.clip_id}",
    cache_policy=NO_CACHE,
    retries=errors.MAX_MEMORY_ATTEMPTS - 1,
    retry_delay_seconds=errors.RETRY_DELAYS_SECONDS,
    retry_jitter_factor=errors.RETRY_JITTER,
    retry_condition_fn=errors.retry_here,
)
def render_clip(job: ClipJob, *, output_uri: str, run_id: str, checkpoint: str | None = None) -> ClipResult | None:
    """Render and publish one clip, unless a done record says that somebody has.

    Args:
        job: What to render.
        output_uri: The folder of all clips.
        run_id: Of the flow run that asks.
        checkpoint: Local checkpoint folder, by default this machine's own; its fingerprint must be the job's.

    Returns:
        The clip's result; None while another run renders it.

    Raises:
        InvalidInputError: If the reference or the pose cannot be used; the message names row and column.
        CheckpointError: If the model cannot be loaded or is not the one that the job was planned for.
        StorageError: If a file cannot be read or written.
        TooManyStartsError: If the clip has taken too many workers with it.
    """
    settings = Settings()
    if done := find_done(output_uri, job.key, policy=settings.storage_policy()):
        return result_of_earlier(job, *done, output_uri=output_uri, run_id=run_id)
    try:
        with (
            open_attempt(output_uri, job.key, run_id=run_id, settings=settings) as attempt,
            clip_scratch(settings.scratch_dir, job.key, min_free_bytes=settings.min_free_scratch_bytes) as folder,
        ):
            if not (folder / METRICS).exists():
                render_to_folder(job, folder, attempt, checkpoint=checkpoint or settings.checkpoint, settings=settings)
            reporter(job)("publish", 0, 0)
            attempt.enter(AttemptStage.PUBLISHING)
            attempt.confirm()
            with time_limit(settings.stage_limit_seconds):
                record, metrics = publish_clip(job, folder, attempt.log, output_uri, settings)
    except errors.RenderedElsewhereError:
        return None
    except Exception as error:
        recover_from(error)
        raise
    finally:
        tidy()
    return result_of(job.request, ClipStatus.RENDERED).of_done(record, metrics, output_uri)


def result_of_earlier(
    job: ClipJob, record: DoneRecord, metrics: ClipMetrics, *, output_uri: str, run_id: str
) -> ClipResult:
    """The result of a clip that was published since the run was planned: by the run itself, or by another one."""
    ours = bool(metrics.attempt_log) and metrics.attempt_log[-1].run_id == run_id
    status = ClipStatus.RENDERED if ours else ClipStatus.SKIPPED
    return result_of(job.request, status).of_done(record, metrics, output_uri)


def render_to_folder(
    job: ClipJob, clip_dir: Path, attempt: OpenAttempt, *, checkpoint: str, settings: Settings
) -> None:
    """Leave video, poster and, last, the metrics of a clip in a local folder.

    While this clip is on the GPU the next one is prepared; its frames are encoded as they come, and when the last has
    come the GPU is the next clip's, while this one's encoding ends.
    """
    from scail.streamed_video import StreamedVideo
    from scail.video import write_poster

    limit = partial(time_limit, settings.stage_limit_seconds)
    report = reporter(job)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with Turn() as turn:
            with limit():
                inputs, pixels = prepare(job, clip_dir, report, seconds, settings=settings)
            turn.compute()
            with limit():  # not before: the clip that computed until now may have needed another one
                spec = pipeline_spec(checkpoint, job.checkpoint_fingerprint, profile=job.profile, settings=settings)
                if attempt.follows(GenerationError):  # a kernel may have failed in silence, or a kept encoding be bad
                    spec = spec.on_the_exact_path()
                    load_encodings.cache_clear()
                pipeline = load_pipeline(spec)
            attempt.enter(AttemptStage.COMPUTING)
            video = stack.enter_context(
                StreamedVideo(clip_dir / VIDEO, fps=inputs.fps, metadata=provenance(job), ffmpeg=settings.ffmpeg)
            )
            with limit():
                output, cache_hits = compute(
                    pipeline, job, pixels, attempt, report, on_frames=video.write, settings=settings
                )
                likeness = identity_of(pipeline, inputs, output)
        attempt.enter(AttemptStage.ENCODING)
        seconds |= output.seconds
        with limit(), cpu_stage("quality", report, seconds):
            quality = quality_of(output, inputs, likeness, settings.quality.limits())
        with limit(), cpu_stage("encode_mp4", report, seconds):
            video.finish()
            write_poster(clip_dir / POSTER, output.frames[len(output.frames) // 2])
    metrics = clip_metrics(
        job, inputs, output, seconds=seconds, cache_hits=cache_hits, pipeline=pipeline, quality=quality
    )
    (clip_dir / METRICS).write_bytes(_json(metrics))


def prepare(
    job: ClipJob, scratch_dir: Path, report: Report, seconds: dict[str, float], *, settings: Settings
) -> tuple[ClipInputs, ClipPixels]:
    """A clip's pictures, on this machine and decoded; and what the encoders read of them."""
    from scail.preprocess import clip_pixels

    with cpu_stage("fetch", report, seconds):
        paths = fetch_inputs(job, scratch_dir, policy=settings.storage_policy())
    with cpu_stage("decode", report, seconds):
        inputs = decode_inputs(paths, job, ffmpeg=settings.ffmpeg)
    with cpu_stage("preprocess", report, seconds):
        return inputs, clip_pixels(inputs.reference, inputs.pose, job.request.size)


def compute(
    pipeline: ScailPipeline,
    job: ClipJob,
    pixels: ClipPixels,
    attempt: OpenAttempt,
    report: Report,
    *,
    on_frames: Callable[[Frames], None],
    settings: Settings,
) -> tuple[ScailOutput, tuple[str, ...]]:
    """The rendered clip, and which encodings it shared with earlier ones; `on_frames` gets its frames as they come."""

    def on_step(done: int, total: int) -> None:
        report("denoise", done, total)
        attempt.reached(done)
        attempt.check(finishing=done == total)

    encodings = load_encodings(job.checkpoint_fingerprint, settings.encoding_cache_bytes)
    encodings.begin_clip()
    with errors.device_faults_named():
        output = pipeline.render(
            pixels,
            job.request.prompt,
            negative_prompt=job.request.negative_prompt,
            params=job.params,
            on_step=on_step,
            on_frames=on_frames,
            encodings=encodings,
        )
    room.was_enough()
    return output, tuple(encodings.hits)


def identity_of(pipeline: ScailPipeline, inputs: ClipInputs, output: ScailOutput) -> float:
    """While the clip still has the GPU: it asks the image encoder about a few frames."""
    from scail.identity import identity

    with errors.device_faults_named():
        return identity(pipeline, inputs.reference, output.frames)


def quality_of(output: ScailOutput, inputs: ClipInputs, likeness: float, limits: QualityLimits) -> ClipQuality:
    """The clip's numbers and verdict.

    Raises:
        GenerationError: If there is nothing to see: it is rendered once more.
    """
    from scail.quality import judge, measure

    numbers = measure(
        output.frames,
        inputs.reference,
        inputs.pose,
        fps=inputs.fps,
        latents=output.latents.numpy(),
        identity=likeness,
    )
    verdict, findings = judge(numbers, limits)
    quality = ClipQuality(verdict=verdict, numbers=numbers, findings=findings, limits=limits._asdict())
    if any(finding.is_fatal for finding in findings):
        raise GenerationError(f"there is nothing to see: {quality.note}")
    return quality


def reporter(job: ClipJob) -> Report:
    """Says how far a clip is. A function, since Dask pickles the task's own code, and no context variable can be."""
    return partial(progress_sink.get(), job.clip_id)


@contextmanager
def cpu_stage(name: str, report: Report, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and take its time, without waiting for the GPU: that is at work on another clip."""
    report(name, 0, 0)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def recover_from(error: Exception) -> None:
    """Leave the process fit for the next clip, or end it where nothing else helps."""
    if isinstance(error, OutOfMemoryError):
        _let_go_of_locals(error)
        room.was_too_small()
    if isinstance(error, errors.DeviceFaultError) and in_dask_worker():
        replace_process()


def _let_go_of_locals(error: BaseException | None) -> None:
    """Empty the frames that an error came through: Prefect keeps it, and with it a model and a clip's tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def provenance(job: ClipJob) -> dict[str, Any]:
    """What the mp4 itself says about how it was made."""
    return {
        "clip_id": job.clip_id,
        "key": job.key,
        "prompt": job.request.prompt,
        "negative_prompt": job.request.negative_prompt,
        **asdict(job.params),
        "checkpoint": job.checkpoint_fingerprint,
        "scail_batch_renders": version("scail-batch-renders"),
    }


def clip_metrics(
    job: ClipJob,
    inputs: ClipInputs,
    output: ScailOutput,
    *,
    seconds: dict[str, float],
    cache_hits: tuple[str, ...],
    pipeline: ScailPipeline,
    quality: ClipQuality,
) -> ClipMetrics:
    """Everything that is known about a clip once its video is encoded."""
    import torch

    num_frames, height, width = output.frames.shape[:3]
    on_gpu = pipeline.device.type == "cuda"
    return ClipMetrics(
        clip_id=job.clip_id,
        key=job.key,
        num_frames=num_frames,
        num_dropped_frames=output.num_dropped_frames,
        width=width,
        height=height,
        fps=inputs.fps,
        prompt=job.request.prompt,
        negative_prompt=job.request.negative_prompt,
        params=job.params,
        reference_uri=storage.redact(job.request.reference),
        pose_uri=storage.redact(job.request.pose),
        reference_size=inputs.reference_size,
        pose_size=(inputs.pose_info.height, inputs.pose_info.width),
        pose_num_frames=inputs.pose_info.num_frames,
        pose_kept_share=inputs.pose_kept_share,
        seconds=seconds,
        peak_memory_gib=output.peak_memory_gib,
        attempts=1,  # with the log of all of them, once the clip is published
        cache_hits=cache_hits,
        device=torch.cuda.get_device_name(pipeline.device) if on_gpu else f"{platform.machine()} CPU",
        attention=pipeline.attention,
        profile=job.profile,
        quantization=pipeline.quantization,
        memory=pipeline.memory,
        loras=pipeline.loras,
        notes=notes_of(job, pipeline),
        quality=quality,
        checkpoint_fingerprint=job.checkpoint_fingerprint,
        versions=software_versions(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def notes_of(job: ClipJob, pipeline: ScailPipeline) -> tuple[str, ...]:
    """Where a clip was rendered in another way than was asked for."""
    from scail.models.attention import FLOAT8_BACKENDS

    profile, notes = PROFILES[job.profile], []
    if profile.quantization not in {"none", pipeline.quantization}:
        instead = "exact products" if pipeline.quantization == "none" else pipeline.quantization
        notes.append(f"profile {job.profile} asks for {profile.quantization}; rendered with {instead}")
    if profile.attention and pipeline.attention not in FLOAT8_BACKENDS:
        notes.append(f"profile {job.profile} asks for attention in {profile.attention}; rendered with an exact one")
    if profile.step_distilled and not pipeline.loras:
        notes.append(f"profile {job.profile} is for step-distilled weights; no LoRA is known to be in these")
    return (*notes, *([room.note] if room.note else []))


def publish_clip(
    job: ClipJob, clip_dir: Path, attempts: tuple[Attempt, ...], output_uri: str, settings: Settings
) -> tuple[DoneRecord, ClipMetrics]:
    """Media, then metrics, then the done record: whoever is stopped in between leaves nothing that looks whole."""
    policy = settings.storage_policy()
    folder = f"clips/{job.clip_id}"
    metrics_uri = storage.join(output_uri, folder, METRICS)
    start = datetime.now(UTC)
    if storage.exists(metrics_uri, policy=policy):
        storage.delete(metrics_uri, policy=policy)  # another content's, under the same clip_id: no longer whole
    video_md5, _ = (
        storage.publish_file(clip_dir / name, storage.join(output_uri, folder, name), policy=policy)
        for name in (VIDEO, POSTER)
    )
    metrics = ClipMetrics.model_validate_json((clip_dir / METRICS).read_bytes())
    seconds = metrics.seconds | {"publish": (datetime.now(UTC) - start).total_seconds()}
    metrics = metrics.model_copy(update={"seconds": seconds, "attempts": len(attempts), "attempt_log": attempts})
    storage.publish_bytes(metrics_uri, _json(metrics), policy=policy)
    record = DoneRecord(
        key=job.key,
        clip_id=job.clip_id,
        video=f"{folder}/{VIDEO}",
        poster=f"{folder}/{POSTER}",
        metrics=f"{folder}/{METRICS}",
        video_size=(clip_dir / VIDEO).stat().st_size,
        video_md5=video_md5,
    )
    storage.publish_bytes(storage.join(output_uri, "done", f"{job.key}.json"), _json(record), policy=policy)
    return record, metrics


def software_versions() -> dict[str, str]:
    """Versions of everything that can change a pixel or a time."""
    packages = ("scail-batch-renders", "torch", "diffusers", "transformers", "prefect", "decord")
    own = {"python": platform.python_version(), "ffmpeg": ffmpeg_version(find_ffmpeg(Settings().ffmpeg))}
    return own | {name: version(name) for name in packages}


def _json(model: BaseModel) -> bytes:
    return (model.model_dump_json(indent=2) + "\n").encode()
