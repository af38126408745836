"""The GPU task: one row in, one published clip out. A thin shell around `ScailPipeline`: fetch → call → write."""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from scail.ffmpeg_process import ffmpeg_version, find_ffmpeg
from tasks import errors, storage
from tasks.inputs import ClipInputs, decode_inputs, fetch_inputs
from tasks.jobs import ClipJob, ClipMetrics, ClipResult, ClipStatus, DoneRecord
from tasks.plan import find_done, result_of
from tasks.progress import progress_sink
from tasks.resident import load_pipeline
from tasks.settings import Settings

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

    from scail import ScailOutput

logger = logging.getLogger(__name__)

VIDEO, POSTER, METRICS = "video.mp4", "poster.jpg", "metrics.json"


@task(
    name="render-clip",
    task_run_name="{job.request.clip_id}",
    cache_policy=NO_CACHE,
    retries=errors.MAX_ATTEMPTS - 1,
    retry_delay_seconds=errors.RETRY_DELAYS_SECONDS,
    retry_jitter_factor=errors.RETRY_JITTER,
    retry_condition_fn=errors.retry_if_transient,
)
def render_clip(job: ClipJob, *, output_uri: str, checkpoint: str) -> ClipResult:
    """Render and publish one clip, unless a done record says that somebody has.

    What was rendered stays in scratch until it is published, so that an attempt after a failed publication does
    not render again.

    Args:
        job: What to render.
        output_uri: The folder of all clips.
        checkpoint: Local checkpoint folder; its fingerprint must be the job's.

    Raises:
        InvalidInputError: If the reference or the pose cannot be used; the message names row and column.
        CheckpointError: If the model cannot be loaded or is not the one that the job was planned for.
        StorageError: If a file cannot be read or written; `transient` ones are tried again.
    """
    settings = Settings()
    result = result_of(job.request, ClipStatus.RENDERED)
    if done := find_done(output_uri, job.key, policy=settings.storage_policy()):
        return result.of_done(*done, output_uri)
    scratch_dir = settings.scratch_dir / job.key
    clip_dir = scratch_dir / "clip"
    try:
        if not (clip_dir / METRICS).exists():
            render_to_folder(job, clip_dir, checkpoint=checkpoint, settings=settings)
        record, metrics = publish_clip(job, clip_dir, output_uri, settings)
    except BaseException as error:
        if not errors.is_transient(error):
            shutil.rmtree(scratch_dir, ignore_errors=True)
        raise
    shutil.rmtree(scratch_dir, ignore_errors=True)
    progress_sink.get()(job.clip_id, "done", 0, 0)
    return result.of_done(record, metrics, output_uri)


def render_to_folder(job: ClipJob, clip_dir: Path, *, checkpoint: str, settings: Settings) -> None:
    """Leave video, poster and, last, the metrics of a clip in a local folder."""
    from scail.timing import StageClock
    from scail.video import encode_video, write_poster

    request, policy = job.request, settings.storage_policy()
    report = partial(progress_sink.get(), job.clip_id)
    pipeline = load_pipeline(checkpoint, job.checkpoint_fingerprint, settings.device, settings.dtype)
    clock = StageClock(pipeline.device)
    clip_dir.mkdir(parents=True, exist_ok=True)
    with clock.stage("fetch"):
        report("fetch", 0, 0)
        paths = fetch_inputs(job, clip_dir.parent, policy=policy)
    with clock.stage("decode"):
        report("decode", 0, 0)
        inputs = decode_inputs(paths, job, ffmpeg=settings.ffmpeg)
    output = pipeline(
        inputs.reference,
        inputs.pose,
        request.prompt,
        negative_prompt=request.negative_prompt,
        params=job.params,
        size=request.size,
        on_step=partial(report, "denoise"),
    )
    clock.seconds |= output.seconds
    with clock.stage("encode_mp4"):
        report("encode_mp4", 0, 0)
        encode_video(clip_dir / VIDEO, output.frames, fps=inputs.fps, metadata=provenance(job), ffmpeg=settings.ffmpeg)
        write_poster(clip_dir / POSTER, output.frames[len(output.frames) // 2])
    metrics = clip_metrics(job, inputs, output, seconds=clock.seconds, device=pipeline.device)
    (clip_dir / METRICS).write_bytes(_json(metrics))


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
    device: torch.device,
) -> ClipMetrics:
    """Everything that is known about a clip once its video is encoded."""
    import torch

    num_frames, height, width = output.frames.shape[:3]
    on_gpu = device.type == "cuda"
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
        attempts=task_run.run_count or 1,
        device=torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        checkpoint_fingerprint=job.checkpoint_fingerprint,
        versions=software_versions(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def publish_clip(job: ClipJob, clip_dir: Path, output_uri: str, settings: Settings) -> tuple[DoneRecord, ClipMetrics]:
    """Media, then metrics, then the done record: whoever is stopped in between leaves nothing that looks whole."""
    policy = settings.storage_policy()
    folder = f"clips/{job.clip_id}"
    metrics_uri = storage.join(output_uri, folder, METRICS)
    start = datetime.now(UTC)
    if storage.exists(metrics_uri, policy=policy):
        storage.delete(metrics_uri, policy=policy)  # another content's, under the same clip_id: no longer whole
    for name in (VIDEO, POSTER):
        storage.publish_file(clip_dir / name, storage.join(output_uri, folder, name), policy=policy)
    metrics = ClipMetrics.model_validate_json((clip_dir / METRICS).read_bytes())
    seconds = metrics.seconds | {"publish": (datetime.now(UTC) - start).total_seconds()}
    metrics = metrics.model_copy(update={"seconds": seconds})
    storage.publish_bytes(metrics_uri, _json(metrics), policy=policy)
    video = (clip_dir / VIDEO).read_bytes()
    record = DoneRecord(
        key=job.key,
        clip_id=job.clip_id,
        video=f"{folder}/{VIDEO}",
        poster=f"{folder}/{POSTER}",
        metrics=f"{folder}/{METRICS}",
        video_size=len(video),
        video_md5=hashlib.md5(video, usedforsecurity=False).hexdigest(),
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
