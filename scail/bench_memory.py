"""What each memory policy costs: the most that a clip holds of the device, and the time of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scail.bench import bench_clip, random_pipeline
from scail.bench_goals import Row, Workload, forward_seconds
from scail.bench_peers import release
from scail.config import POLICIES, PlacementPolicy, Quantization, RuntimeConfig
from scail.memory import with_index
from scail.timing import GIB

GB = 1000**3
LABELS: dict[Quantization, str] = {"none": "exact", "fp8": "float8", "int8": "int8"}
CAPS_GB: dict[PlacementPolicy, float] = {"balanced": 24.0, "low": 17.0}  # that a whole clip is rendered within
PEAK_GOALS_GB: dict[PlacementPolicy, float] = {"balanced": 22.0, "low": 16.0}
SLOWDOWN_GOALS_PERCENT: dict[PlacementPolicy, float] = {"balanced": 3.0, "low": 25.0}


def memory_rows(work: Workload, quantization: Quantization) -> list[Row]:
    """Peak and slowdown of each policy, a GPU's process capped to the card that the policy is for."""
    rows: list[Row] = []
    resident = 0.0
    for policy in POLICIES:
        peak, forward = _measured(work, policy, quantization)
        cap = f"process capped to {CAPS_GB[policy]:.0f} GB" if policy in CAPS_GB and work.device.type == "cuda" else ""
        name = f"{LABELS[quantization]}, {policy}"
        rows.append(Row(f"peak memory, {name}", "GB", peak, PEAK_GOALS_GB.get(policy), note=cap))
        if policy == "resident":
            resident = forward
            continue
        slowdown = 100 * (forward / resident - 1)
        note = "resident, s a forward"
        rows.append(Row(f"slowdown, {name}", "%", slowdown, SLOWDOWN_GOALS_PERCENT[policy], beside=resident, note=note))
    return rows


def _measured(work: Workload, policy: PlacementPolicy, quantization: Quantization) -> tuple[float, float]:
    """GB that a clip's render held at most, and seconds of a forward."""
    runtime = RuntimeConfig(compiled=work.compiled, quantization=quantization, memory=policy)
    pipeline = random_pipeline(work.config, device=work.device, dtype=work.dtype, runtime=runtime)
    with _capped(work.device, CAPS_GB.get(policy)):
        clip = bench_clip(
            work.config,
            device=work.device,
            dtype=work.dtype,
            num_frames=work.num_frames,
            height=work.height,
            width=work.width,
            num_steps=1,
            runtime=runtime,
            pipeline=pipeline,
        )
        return clip["peak_memory_gib"] * GIB / GB, forward_seconds(pipeline, work)


@contextmanager
def _capped(device: torch.device, cap_gb: float | None) -> Iterator[None]:
    """Inside, this process gets no more of a GPU than a smaller card has."""
    if device.type != "cuda":
        yield
        return
    release(device)
    device = with_index(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gb or total / GB) * GB / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
