"""The figures that speed is judged by: each beside its goal, and beside the peer or the ceiling of this very device.

A goal was set for one H100 and the largest clip; on another device, or at another size, a row has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scail import preprocess
from scail.bench import bench_pose, forward_flop, linear_flop, random_conditioning, random_vae
from scail.bench_peers import (
    attention_flop_per_second,
    float8_flop_per_second,
    library_forward_seconds,
    matmul_flop_per_second,
    median_seconds,
    peak_gib,
)
from scail.config import DEFAULT_SIZE, MAX_FRAMES, PROFILES, ModelConfig
from scail.pipeline import ScailPipeline
from scail.types import LatentShape, num_tokens

_FLOOR_NOTE = "sum of the ceilings"

QUALITY_STEPS, FAST_STEPS = (PROFILES[name].sampling.num_inference_steps for name in ("quality", "fast"))


@dataclass(frozen=True)
class Workload:
    """What is measured, and on what."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    num_frames: int
    height: int
    width: int
    compiled: bool

    @property
    def shape(self) -> LatentShape:
        return LatentShape.of_clip(self.num_frames, self.height, self.width)

    @property
    def has_goals(self) -> bool:
        """Whether it is the clip for which the goals were set; a slower GPU than that of the goals misses them."""
        largest = (self.num_frames, *sorted((self.height, self.width))) == (MAX_FRAMES, *DEFAULT_SIZE)
        return self.config.name == "SCAIL_14B" and largest and self.device.type == "cuda"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        at_least: The goal is a lower limit; otherwise an upper one.
        beside: The peer's figure, or the ceiling's.
        note: Whose figure `beside` is, and how either was come by when it was not simply timed.
    """

    figure: str
    unit: str
    reached: float
    goal: float | None = None
    at_least: bool = False
    beside: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.reached >= self.goal if self.at_least else self.reached <= self.goal


@torch.inference_mode()
def vae_rows(work: Workload) -> list[Row]:
    """The VAE, from latents to frames on the host and from pixels to latents; diffusers' pass beside it."""
    device = work.device
    vae = random_vae(work.config, device, work.dtype)
    library = vae.model
    latents = torch.randn(1, 16, work.shape.num_frames, work.shape.height, work.shape.width, device=device)
    pose = torch.rand(1, 3, work.num_frames, work.height // 2, work.width // 2, device=device) * 2 - 1
    reference = torch.rand(1, 3, 1, work.height, work.width, device=device) * 2 - 1

    def decode() -> int:
        return sum(len(frames) for frames in preprocess.to_frames(vae.decode_pieces(latents)))

    def library_decode() -> Tensor:
        decoded: Tensor = library.decode(latents.to(work.dtype)).sample
        return decoded

    def encode() -> tuple[Tensor, Tensor]:
        return vae.encode(pose), vae.encode(reference)

    def library_encode() -> list[Tensor]:
        return [library.encode(pixels.to(work.dtype)).latent_dist.mode() for pixels in (pose, reference)]

    def seconds(call: Callable[[], object]) -> float:
        return median_seconds(call, device, repeats=3, warm_up=1)

    rows = [
        Row("VAE decode", "s", seconds(decode), 1.2, beside=seconds(library_decode), note="diffusers"),
        Row(
            "VAE encode, pose and reference",
            "s",
            seconds(encode),
            0.25,
            beside=seconds(library_encode),
            note="diffusers",
        ),
    ]
    peak = peak_gib(decode, device)
    if peak is not None:
        rows.insert(
            1,
            Row("VAE decode, peak memory", "GiB", peak, 4.0, beside=peak_gib(library_decode, device), note="diffusers"),
        )
    return rows


def pose_rows(work: Workload) -> list[Row]:
    """The pose renderer."""
    result = bench_pose(device=work.device, num_frames=work.num_frames, height=work.height, width=work.width)
    goal = 1.0 if work.device.type == "cuda" else 15.0
    return [Row("pose renderer, a frame", "ms", result["milliseconds_per_frame"], goal)]


def forward_rows(work: Workload, pipeline: ScailPipeline) -> list[Row]:
    """One forward of the exact path; the sum of the ceilings, and diffusers' network at the same token count."""
    transformer = work.config.transformer
    length = num_tokens(transformer, work.shape)
    reached = forward_seconds(pipeline, work)
    floor = _floor(work, matmul_flop_per_second(transformer, work.device, work.dtype), pipeline.attention)
    eager, compiled = (
        library_forward_seconds(transformer, length, work.device, work.dtype, compiled=compiled)
        for compiled in (False, True)
    )
    note = "diffusers, {}, same tokens, few layers scaled"
    return [
        Row("forward, exact", "s", reached, 4.7, beside=floor, note=_FLOOR_NOTE),
        Row("forward, exact, against eager", "x", eager / reached, beside=eager, note=note.format("eager, s")),
        Row(
            "forward, exact, against compiled", "x", compiled / reached, 1.16, at_least=True, beside=compiled,
            note=note.format("compiled, s"),
        ),
    ]  # fmt: skip


def quantized_rows(work: Workload, pipeline: ScailPipeline, *, name: str, goal: float | None = None) -> list[Row]:
    """One forward of a quantised path; float8 beside the sum of the ceilings, attention in its own precision."""
    reached, figure = forward_seconds(pipeline, work), f"forward, {name}"
    is_float8 = pipeline.quantization == "fp8"
    matmul = float8_flop_per_second(work.config.transformer, work.device) if is_float8 else None
    if matmul is None:
        return [Row(figure, "s", reached, note=pipeline.attention)]
    return [Row(figure, "s", reached, goal, beside=_floor(work, matmul, pipeline.attention), note=_FLOOR_NOTE)]


def _floor(work: Workload, matmul: float, attention: str) -> float:
    """Seconds of a forward whose matrix products and self-attentions run as fast as each does alone."""
    transformer = work.config.transformer
    flop, linear = forward_flop(transformer, work.shape), linear_flop(transformer, work.shape)
    length = num_tokens(transformer, work.shape)
    rate = attention_flop_per_second(transformer, length, attention, work.device, work.dtype)
    return linear / matmul + (flop - linear) / rate


def forward_seconds(pipeline: ScailPipeline, work: Workload) -> float:
    """One pass of one side of the guidance."""
    return median_seconds(forward_of(pipeline, work), work.device, repeats=3, warm_up=1)


@torch.inference_mode()
def forward_of(pipeline: ScailPipeline, work: Workload) -> Callable[[], Tensor]:
    """A call that computes it, on noise and encodings of nothing."""
    prepared = pipeline.transformer.prepare(random_conditioning(work.config, work.shape, work.device, work.dtype))
    grid = (1, 16, work.shape.num_frames, work.shape.height, work.shape.width)
    latents = torch.randn(grid, device=work.device, dtype=work.dtype)
    timestep = torch.tensor([500.0], device=work.device)

    @torch.inference_mode()
    def forward() -> Tensor:
        velocity: Tensor = pipeline.transformer(latents, timestep, prepared)
        return velocity

    return forward


def clip_rows(name: str, result: dict[str, Any], forward: float, *, minutes: float | None) -> list[Row]:
    """Whole clips by one clip's measured stages: few steps as they are, the official recipe by its arithmetic.

    Args:
        name: Of the path.
        result: Of `bench_clip`.
        forward: Seconds of one forward.
        minutes: Goal of the official recipe, where there is one.
    """
    stages = result["seconds"]
    around = sum(seconds for stage, seconds in stages.items() if stage != "denoise")
    computed = "computed: the other stages, and forwards times their seconds"
    return [
        Row(f"clip, {name}, {FAST_STEPS} steps, no guidance", "s", around + FAST_STEPS * forward, note=computed),
        Row(
            f"clip, {name}, {QUALITY_STEPS} steps, guidance", "min", (around + 2 * QUALITY_STEPS * forward) / 60,
            minutes, note=computed,
        ),
    ]  # fmt: skip


def compile_rows(work: Workload, name: str, result: dict[str, Any]) -> list[Row]:
    """What the first clip waited for; nothing where nothing is compiled."""
    if not work.compiled:
        return []
    from torch._dynamo.utils import counters

    num_graphs = float(counters["stats"]["unique_graphs"])
    note = "what the first clip of the process took more"
    return [
        Row(f"compiling, {name}", "s", result["first_clip_extra_seconds"], 60.0, note=note),
        Row(f"graphs so far, {name}", "", num_graphs, note="all of this process's"),
    ]


def top_kernels(call: Callable[[], object], device: torch.device, limit: int = 12) -> list[dict[str, Any]]:
    """The kernels in which a call spends a device's time: their names, milliseconds, calls and shares, most first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = "CUDA" if on_gpu else "CPU"
    times = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000, event.count)
        for event in profiler.key_averages()
        if event.device_type.name == kind
    ]
    total = sum(milliseconds for _, milliseconds, _ in times) or 1.0
    return [
        {"kernel": name[:100], "milliseconds": milliseconds, "calls": count, "share": milliseconds / total}
        for name, milliseconds, count in sorted(times, key=lambda entry: -entry[1])[:limit]
    ]


def without_goals(rows: Iterable[Row]) -> list[Row]:
    return [replace(row, goal=None) for row in rows]


def rows_table(rows: Iterable[Row]) -> str:
    """The rows as lines for a terminal."""
    lines = [f"{'figure':<44} {'reached':>9} {'goal':>10}       beside"]
    for row in rows:
        goal = "" if row.goal is None else f"{'≥' if row.at_least else '≤'} {row.goal:g} {row.unit}"
        verdict = {True: "met", False: "not met", None: ""}[row.is_met]
        beside = "" if row.beside is None else f"{row.beside:.2f} "
        lines.append(
            f"{row.figure:<44} {row.reached:>6.2f} {row.unit:<3} {goal:>9} {verdict:<8} {beside}{row.note}".rstrip()
        )
    return "\n".join(lines)
