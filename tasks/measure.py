"""What `scail bench` runs: the parts of the benchmark that were asked for, on this machine's device."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from scail.config import Quantization
from tasks.errors import RefusedError
from tasks.resident import choose_device
from tasks.settings import Settings

if TYPE_CHECKING:
    from scail.bench_goals import Row, Workload
    from scail.config import RuntimeConfig

# What each of them measures is in `PARTS_HELP`; those that build the whole model stand together.
PARTS = ("clip", "forward", "float8", "clips", "memory", "vae", "pose")
DEFAULT_PARTS = ("clip", "forward", "vae", "pose")
PARTS_HELP = (
    "Parts, with commas: `clip` (each stage of one clip), `forward` and `float8` (one forward beside diffusers and the "
    "ceilings, whole clips by it, kernels), `clips` (a warm worker's clips, the GPU's busy share), `memory` (what each "
    "policy holds and costs), `vae`, `pose`."
)
MEMORY_QUANTIZATIONS: tuple[Quantization, ...] = ("fp8", "none")
FLOAT8_ATTENTION = "flash_attention_3_float8"


def measure(
    model: str,
    *,
    num_frames: int,
    height: int,
    width: int,
    num_steps: int,
    only: Iterable[str] = DEFAULT_PARTS,
    num_clips: int = 20,
) -> tuple[str, str]:
    """Lines for the terminal, and the same as a JSON document.

    Raises:
        RefusedError: If there is no such model or part.
    """
    from scail.bench import device_name
    from scail.bench_goals import Workload, pose_rows, rows_table, vae_rows, without_goals
    from scail.bench_memory import memory_rows
    from scail.config import SCAIL_14B, SCAIL_TINY

    models = {"14b": SCAIL_14B, "tiny": SCAIL_TINY}
    if model not in models:
        raise RefusedError(f"model is {model!r}; expected one of {', '.join(models)}")
    only = tuple(only)
    if unknown := [part for part in only if part not in PARTS]:
        raise RefusedError(f"--only names {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    settings = Settings()
    device, dtype = choose_device(settings.device, settings.dtype)
    work = Workload(models[model], device, dtype, num_frames, height, width, compiled=settings.compiled)
    lines: list[str] = []
    document: dict[str, Any] = {"device": device_name(device), "model": work.config.name}
    rows: list[Row] = []
    if "vae" in only:
        rows += vae_rows(work)
        _release()
    if "pose" in only:
        rows += pose_rows(work)
    if {"clip", "forward", "clips"} & {*only}:
        rows += _exact(work, only, document, lines, num_steps=num_steps, num_clips=num_clips)
        _release()
    if "float8" in only:
        rows += _float8(work, document, num_steps=num_steps)
        _release()
    if "memory" in only:
        for quantization in MEMORY_QUANTIZATIONS:
            rows += memory_rows(work, quantization)
            _release()
    rows = rows if work.has_goals else without_goals(rows)
    document["rows"] = [asdict(row) | {"is_met": row.is_met} for row in rows]
    return "\n\n".join([*lines, rows_table(rows)]), json.dumps(document, indent=2) + "\n"


def _exact(
    work: Workload, only: tuple[str, ...], document: dict[str, Any], lines: list[str], *, num_steps: int, num_clips: int
) -> list[Row]:
    """What is measured with the exact path's model on the device."""
    from scail.bench import bench_clip, random_pipeline, table
    from scail.bench_goals import clip_rows, forward_rows
    from scail.config import RuntimeConfig

    rows: list[Row] = []
    runtime = RuntimeConfig(compiled=work.compiled)
    pipeline = random_pipeline(work.config, device=work.device, dtype=work.dtype, runtime=runtime)
    if {"clip", "forward"} & {*only}:
        document["clip"] = bench_clip(**_clip_of(work, runtime), num_steps=num_steps, pipeline=pipeline)
        lines.append(table(document["clip"]))
    if "forward" in only:
        forward = forward_rows(work, pipeline)
        rows += [*forward, *clip_rows("exact", document["clip"], forward[0].reached, minutes=8.0)]
        document["kernels"] = {"forward, exact": _kernels(work, pipeline)}
    if "clips" in only:
        rows += _warm_worker(work, pipeline, num_clips)
    return rows


def _float8(work: Workload, document: dict[str, Any], *, num_steps: int) -> list[Row]:
    """The same with matrix products, and where the device has it self-attention, in float8."""
    from scail.bench import bench_clip, random_pipeline
    from scail.bench_goals import clip_rows, quantized_rows
    from scail.config import RuntimeConfig
    from scail.models.attention import fits

    attention = FLOAT8_ATTENTION if fits(FLOAT8_ATTENTION, work.device, work.dtype) else None
    runtime = RuntimeConfig(compiled=work.compiled, quantization="fp8", attention=attention)
    pipeline = random_pipeline(work.config, device=work.device, dtype=work.dtype, runtime=runtime)
    result = bench_clip(**_clip_of(work, runtime), num_steps=num_steps, pipeline=pipeline)
    document["clip, float8"] = result
    document.setdefault("kernels", {})["forward, float8"] = _kernels(work, pipeline)
    rows = quantized_rows(work, pipeline)
    return [*rows, *clip_rows("float8", result, rows[0].reached, minutes=5.7)]


def _warm_worker(work: Workload, pipeline: Any, num_clips: int) -> list[Row]:
    from scail.bench_goals import FAST_STEPS, Row
    from scail.config import SamplingParams
    from tasks.warm_worker import render_clips, write_clips

    params = SamplingParams(num_inference_steps=FAST_STEPS, guidance_scale=1.0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        clips = write_clips(
            folder, num_clips=num_clips + 1, num_frames=work.num_frames, height=work.height, width=work.width
        )
        times = render_clips(pipeline, clips, folder, params)
    note = f"{num_clips} clips of {FAST_STEPS} steps without guidance, after a first one"
    return [
        Row("warm worker, a clip", "s", times.seconds_per_clip, 17.0, note=note),
        Row("warm worker, GPU busy", "%", 100 * times.busy_share, 97.0, at_least=True, note=note),
    ]


def _kernels(work: Workload, pipeline: Any) -> list[dict[str, Any]]:
    from scail.bench_goals import forward_seconds, top_kernels

    return top_kernels(lambda: forward_seconds(pipeline, work), work.device)


def _clip_of(work: Workload, runtime: RuntimeConfig) -> dict[str, Any]:
    return {
        "config": work.config,
        "device": work.device,
        "dtype": work.dtype,
        "num_frames": work.num_frames,
        "height": work.height,
        "width": work.width,
        "runtime": runtime,
    }


def _release() -> None:
    """What the part before left on the device is not this one's."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
