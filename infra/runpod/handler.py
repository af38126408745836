"""RunPod's serverless entry: the model is loaded once, then every job is a clip. All the rest is tasks/serverless.py.

python infra/runpod/handler.py --test_input '{"input": {"reference_url": "https://…", "pose_url": "https://…"}}'
python infra/runpod/handler.py --rp_serve_api      # the same as an HTTP server on localhost:8000
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import runpod

from tasks.errors import RefusedError
from tasks.serverless import answer, load_model
from tasks.settings import Settings


def handler(job: dict[str, Any]) -> dict[str, Any]:
    """A job of RunPod's in, its output or its error out."""
    return answer(job.get("input"), run_id=str(job["id"]), settings=Settings())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        load_model(Settings())
    except RefusedError as error:
        sys.exit(f"refused: {error}")
    runpod.serverless.start({"handler": handler})
