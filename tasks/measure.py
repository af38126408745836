"""What `scail bench` runs: the benchmark of `scail.bench` on this machine's device."""

from __future__ import annotations

from tasks.errors import RefusedError
from tasks.resident import choose_device
from tasks.settings import Settings


def measure(model: str, *, num_frames: int, height: int, width: int, num_steps: int) -> tuple[str, str]:
    """Lines for the terminal, and the same as a JSON document.

    Raises:
        RefusedError: If there is no such model.
    """
    from scail.bench import bench_clip, bench_pose, table, to_json
    from scail.config import SCAIL_14B, SCAIL_TINY, RuntimeConfig

    models = {"14b": SCAIL_14B, "tiny": SCAIL_TINY}
    if model not in models:
        raise RefusedError(f"model is {model!r}; expected one of {', '.join(models)}")
    settings = Settings()
    device, dtype = choose_device(settings.device, settings.dtype)
    result = bench_clip(
        models[model],
        device=device,
        dtype=dtype,
        num_frames=num_frames,
        height=height,
        width=width,
        num_steps=num_steps,
        runtime=RuntimeConfig(compiled=settings.compiled),
    )
    result["pose"] = bench_pose(device=device, num_frames=num_frames, height=height, width=width)
    return table(result), to_json(result)
