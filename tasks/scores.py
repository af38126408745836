"""What `scail eval` runs: a checkpoint scored on held-out clips, on this machine's device."""

from __future__ import annotations

import json

from scail.config import SamplingParams
from scail.errors import ScailError
from tasks.errors import RefusedError
from tasks.resident import choose_device
from tasks.settings import Settings


def score_checkpoint(
    checkpoint: str, *, num_clips: int, num_frames: int, num_steps: int, guidance_scale: float
) -> tuple[str, str, bool]:
    """Lines for the terminal, the report as a JSON document, and whether every goal is met.

    Raises:
        RefusedError: If the checkpoint cannot be loaded.
    """
    from scail import ScailPipeline
    from scail.mini.evaluate import evaluate
    from scail.mini.goals import goals_of, table

    settings = Settings()
    device, dtype = choose_device(settings.device, settings.dtype)
    try:
        pipeline = ScailPipeline.from_pretrained(checkpoint, device=device, dtype=dtype)
    except ScailError as error:
        raise RefusedError(str(error)) from error
    params = SamplingParams(num_inference_steps=num_steps, guidance_scale=guidance_scale)
    report = evaluate(pipeline, num_clips=num_clips, params=params, num_frames=num_frames)
    report["device"] = str(device)
    return table(report), json.dumps(report, indent=2) + "\n", all(goal.met for goal in goals_of(report))
