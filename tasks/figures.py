"""How many numbers are told as a few, and how a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Of these, the next clip's and the last one's go on while a clip is on the GPU: they cost no GPU time of their own.
OFF_GPU_STAGES = frozenset({"fetch", "decode", "preprocess", "wait", "quality", "encode_mp4", "publish"})


def gpu_seconds(seconds_by_stage: Mapping[str, float]) -> float:
    """How long a clip held a GPU."""
    return sum(seconds for stage, seconds in seconds_by_stage.items() if stage not in OFF_GPU_STAGES)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks, as numpy's default.

    Args:
        values: At least one, in any order.
        share: 0.5 for the median.
    """
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def duration(seconds: float) -> str:
    """A time as people say it: `48.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 59.95:  # from here on, one decimal would read 60.0
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def cost_of(gpu_seconds: float, price_per_gpu_hour: float | None) -> float | None:
    """In the currency of the price; None without one."""
    return None if price_per_gpu_hour is None else gpu_seconds / 3600 * price_per_gpu_hour


def time_name(device: str) -> str:
    """What a device's time is called: nobody pays for a CPU by the GPU hour."""
    return "compute time" if device.endswith("CPU") else "GPU time"
