"""What `scail bench` runs: the parts of the benchmark that were asked for, on this machine's device."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from scail.config import PROFILES, Quantization
from tasks.errors import RefusedError
from tasks.resident import choose_device
from tasks.settings import Settings

if TYPE_CHECKING:
    import torch

    from scail import ScailPipeline
    from scail.bench_goals import Row, Workload
    from scail.config import RuntimeConfig
    from tasks.warm_worker import BusyTimes

logger = logging.getLogger(__name__)

# What each of them measures is in `PARTS_HELP`; those that build the whole model stand together.
PARTS = ("clip", "forward", "float8", "int8", "clips", "workers", "memory", "load", "errors", "vae", "pose")
DEFAULT_PARTS = ("clip", "forward", "vae", "pose")
PARTS_HELP = (
    "Parts, with commas: `clip` (each stage of one clip), `forward`, `float8` and `int8` (one forward beside diffusers "
    "and the ceilings, whole clips by it, kernels), `clips` (a warm worker's clips, the GPU's busy share), `workers` "
    "(one for each GPU, against one), `memory` (what each policy holds and costs), `load` (from a disk to the first "
    "step), `errors` (of each fast path against the exact one), `vae`, `pose`."
)
MEMORY_QUANTIZATIONS: tuple[Quantization, ...] = ("fp8", "none")
# Goals: of a clip by the official recipe, and of a forward.
EXACT_MINUTES, FLOAT8_MINUTES, FLOAT8_FORWARD_SECONDS = 8.0, 5.7, 3.3


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
        RefusedError: If there is no such model or part, or a part wants more GPUs than are here.
    """
    from scail.bench import device_name
    from scail.bench_goals import Workload, rows_table, without_goals
    from scail.bench_peers import release
    from scail.config import SCAIL_14B, SCAIL_TINY

    models = {"14b": SCAIL_14B, "tiny": SCAIL_TINY}
    if model not in models:
        raise RefusedError(f"model is {model!r}; expected one of {', '.join(models)}")
    settings, only = Settings(), tuple(only)
    device, dtype = choose_device(settings.device, settings.dtype)
    _check_parts(only, device)
    work = Workload(models[model], device, dtype, num_frames, height, width, compiled=settings.compiled)
    lines: list[str] = []
    document: dict[str, Any] = {"device": device_name(device), "model": work.config.name}
    rows: list[Row] = []
    for parts, rows_of in _steps(work, only, document, lines, num_steps=num_steps, num_clips=num_clips):
        if parts & {*only}:
            rows += rows_of()
            release(device)
    rows = rows if work.has_goals else without_goals(rows)
    document["rows"] = [asdict(row) | {"is_met": row.is_met} for row in rows]
    return "\n\n".join([*lines, rows_table(rows)]), json.dumps(document, indent=2) + "\n"


def _check_parts(only: tuple[str, ...], device: torch.device) -> None:
    import torch

    if unknown := [part for part in only if part not in PARTS]:
        raise RefusedError(f"--only names {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if "workers" in only and device.type == "cuda" and torch.cuda.device_count() < 2:
        raise RefusedError("--only names workers, which wants two GPUs or more; one is here")


def _steps(
    work: Workload,
    only: tuple[str, ...],
    document: dict[str, Any],
    lines: list[str],
    *,
    num_steps: int,
    num_clips: int,
) -> list[tuple[set[str], Callable[[], list[Row]]]]:
    """What is measured one after the other, and for which parts; each has the device to itself."""
    from scail.bench_errors import error_rows
    from scail.bench_goals import pose_rows, vae_rows
    from scail.bench_memory import memory_rows

    return [
        ({"vae"}, lambda: vae_rows(work)),
        ({"pose"}, lambda: pose_rows(work)),
        ({"clip", "forward"}, lambda: _exact(work, only, document, lines, num_steps=num_steps)),
        ({"float8", "clips"}, lambda: _float8(work, only, document, num_steps=num_steps, num_clips=num_clips)),
        ({"int8"}, lambda: _int8(work, document, num_steps=num_steps)),
        ({"workers"}, lambda: _workers(work, num_clips)),
        *(({"memory"}, partial(memory_rows, work, quantization)) for quantization in MEMORY_QUANTIZATIONS),
        ({"load"}, lambda: _load(work)),
        ({"errors"}, lambda: error_rows(work)),
    ]


def _exact(
    work: Workload, only: tuple[str, ...], document: dict[str, Any], lines: list[str], *, num_steps: int
) -> list[Row]:
    """What is measured with the exact path's model on the device."""
    from scail.bench import bench_clip, table
    from scail.bench_goals import clip_rows, compile_rows, forward_rows

    runtime = _runtime(work, "none")
    pipeline = _model(work, runtime)
    document["clip"] = bench_clip(**_clip_of(work, runtime), num_steps=num_steps, pipeline=pipeline)
    lines.append(table(document["clip"]))
    if "forward" not in only:
        return []
    forward = forward_rows(work, pipeline)
    document.setdefault("kernels", {})["forward, exact"] = _kernels(work, pipeline)
    return [
        *forward,
        *clip_rows("exact", document["clip"], forward[0].reached, minutes=EXACT_MINUTES),
        *compile_rows(work, "exact", document["clip"]),
    ]


def _float8(
    work: Workload, only: tuple[str, ...], document: dict[str, Any], *, num_steps: int, num_clips: int
) -> list[Row]:
    """The same with matrix products in float8, then with self-attention in float8 too; and a worker's clips by both."""
    from scail.models.attention import FLOAT8_BACKENDS, choose_attention

    pipeline = _model(work, _runtime(work, "fp8"))
    rows: list[Row] = []
    if "float8" in only:
        rows += _quantized(work, pipeline, document, "float8 products", num_steps=num_steps)
    attention = choose_attention(work.device, work.dtype, "float8")
    if attention in FLOAT8_BACKENDS:
        pipeline.transformer.use_attention(attention)
        pipeline = replace(pipeline, attention=attention)
        if "float8" in only:
            goals = {"minutes": FLOAT8_MINUTES, "seconds": FLOAT8_FORWARD_SECONDS}
            rows += _quantized(work, pipeline, document, "float8 products and attention", num_steps=num_steps, **goals)
    if "clips" in only:
        rows += _warm_worker(work, pipeline, num_clips)
    return rows


def _int8(work: Workload, document: dict[str, Any], *, num_steps: int) -> list[Row]:
    return _quantized(work, _model(work, _runtime(work, "int8")), document, "int8", num_steps=num_steps)


def _load(work: Workload) -> list[Row]:
    from scail.bench_load import load_rows

    with TemporaryDirectory() as name:
        return load_rows(work, Path(name))


def _quantized(
    work: Workload,
    pipeline: ScailPipeline,
    document: dict[str, Any],
    name: str,
    *,
    num_steps: int,
    minutes: float | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """One path's stages, forward, kernels, whole clips; `minutes` and `seconds` are the goals of clip and forward."""
    from scail.bench import bench_clip
    from scail.bench_goals import clip_rows, compile_rows, quantized_rows

    runtime = replace(_runtime(work, pipeline.quantization), attention=pipeline.attention)
    result = bench_clip(**_clip_of(work, runtime), num_steps=num_steps, pipeline=pipeline)
    document[f"clip, {name}"] = result
    document.setdefault("kernels", {})[f"forward, {name}"] = _kernels(work, pipeline)
    rows = quantized_rows(work, pipeline, name=name, goal=seconds)
    return [
        *rows,
        *clip_rows(name, result, rows[0].reached, minutes=minutes),
        *compile_rows(work, name, result),
    ]


def _warm_worker(work: Workload, pipeline: ScailPipeline, num_clips: int) -> list[Row]:
    from tasks.warm_worker import render_clips, write_clips

    params = PROFILES["fast"].sampling
    with TemporaryDirectory() as name:
        folder = Path(name)
        clips = write_clips(
            folder, num_clips=num_clips + 1, num_frames=work.num_frames, height=work.height, width=work.width
        )
        times = render_clips(pipeline, clips, folder, params)
    return _worker_rows("warm worker", times, f"{num_clips} clips of the fast profile, after a first one")


def _workers(work: Workload, num_clips: int) -> list[Row]:
    """A worker for each GPU, against one alone; on a CPU two share it."""
    import torch

    from scail.bench_goals import Row
    from tasks.warm_worker import Fleet, WorkerPlan

    num_workers = max(2, torch.cuda.device_count())
    profile = PROFILES["fast"]
    plan = WorkerPlan(work, profile.applied_to(_runtime(work, profile.quantization)), profile.sampling, num_clips)
    with Fleet(plan, num_workers) as fleet:
        [alone] = fleet.render([0])
        logger.info("alone: %.1f clips an hour, busy %.2f %%", alone.clips_per_hour, 100 * alone.busy_share)
        together = fleet.render(range(num_workers))
    note = f"{num_clips} clips of the fast profile each, after a first one"
    ratio = sum(times.clips_per_hour for times in together) / alone.clips_per_hour
    return [
        *_worker_rows("one worker", alone, note),
        *(row for number, times in enumerate(together) for row in _worker_rows(f"worker {number} of all", times, note)),
        Row(
            f"{num_workers} workers", "x", ratio, 1.97 if num_workers == 2 else None, at_least=True,
            beside=alone.clips_per_hour, note="clips an hour of one",
        ),
    ]  # fmt: skip


def _worker_rows(name: str, times: BusyTimes, note: str) -> list[Row]:
    from scail.bench_goals import Row

    return [
        Row(f"{name}, a clip", "s", times.seconds_per_clip, 17.0, note=note),
        Row(f"{name}, GPU busy", "%", 100 * times.busy_share, 97.0, at_least=True, note=note),
    ]


def _runtime(work: Workload, quantization: Quantization) -> RuntimeConfig:
    from scail.config import RuntimeConfig

    return RuntimeConfig(compiled=work.compiled, quantization=quantization)


def _model(work: Workload, runtime: RuntimeConfig) -> ScailPipeline:
    from scail.bench import random_pipeline

    return random_pipeline(work.config, device=work.device, dtype=work.dtype, runtime=runtime)


def _kernels(work: Workload, pipeline: ScailPipeline) -> list[dict[str, Any]]:
    from scail.bench_goals import forward_of, top_kernels

    return top_kernels(forward_of(pipeline, work), work.device)


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
