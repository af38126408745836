"""One request, one clip: what a serverless endpoint calls. The row's rules, the key, the done record and the render are
those of a manifest's row; here is only the way in and out.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from scail.errors import ScailError
from tasks.checkpoint import inspect_checkpoint
from tasks.errors import (
    RETRY_DELAYS_SECONDS,
    DeviceFaultError,
    RefusedError,
    ScratchFullError,
    TooManyStartsError,
    Where,
    policy_for,
)
from tasks.jobs import ClipJob, ClipRequest, ClipResult
from tasks.manifest import known_columns, parse_manifest
from tasks.plan import plan_with
from tasks.render import render_clip
from tasks.resident import load_pipeline, pipeline_spec
from tasks.settings import Settings
from tasks.storage import StorageError
from tasks.tables import ManifestError

logger = logging.getLogger(__name__)

COLUMNS = {"reference_url": "reference", "pose_url": "pose"}  # by the request's name; every other name is the same
URL_NAMES = {column: name for name, column in COLUMNS.items()}
SOURCE = "https://request/request.jsonl"  # so that a request may not name this machine's files: it is a stranger's


def load_model(settings: Settings) -> None:
    """Load the model before the first request, which would otherwise wait for it.

    Raises:
        RefusedError: If the settings do not say where clips go, or the checkpoint cannot be used.
    """
    if not settings.output:
        raise RefusedError("SCAIL_OUTPUT is not set; expected the folder of all clips, such as gs://studio/renders")
    model = inspect_checkpoint(settings.checkpoint)
    load_pipeline(pipeline_spec(model.path, model.fingerprint, profile=settings.profile, settings=settings))


def answer(given: object, *, run_id: str, settings: Settings) -> dict[str, Any]:
    """Render what a request asks for.

    Args:
        given: `reference_url`, `pose_url`, and whatever else a manifest's row may hold: `prompt`, `seed`, …
        run_id: Of the request.
        settings: Where clips go, and which checkpoint.

    Returns:
        `status`, `clip_id`, `key`, `video`, `poster`, `seconds` by stage; or `error`, in words for whoever sent the
        request, with `error_class`; and with `refresh_worker` if this process cannot go on.
    """
    try:
        return _described(_render(_request(given), run_id, settings))
    except DeviceFaultError as error:
        return _error(error) | {"refresh_worker": True}
    except (RefusedError, ScailError, StorageError, TooManyStartsError, ScratchFullError) as error:
        return _error(error)


def _request(given: object) -> ClipRequest:
    if not isinstance(given, Mapping):
        raise RefusedError("`input` is no object; expected reference_url, pose_url and what else a clip needs")
    names = {*COLUMNS, *known_columns()} - {*COLUMNS.values(), "enabled", "priority"}
    if unknown := sorted(str(name) for name in given if name not in names):
        raise RefusedError(f"`{'`, `'.join(unknown)}` is not known; expected some of {', '.join(sorted(names))}")
    if missing := [name for name in COLUMNS if not given.get(name)]:
        raise RefusedError(f"`{'`, `'.join(missing)}` is missing")
    row = {COLUMNS.get(name, name): value for name, value in given.items()}
    try:
        manifest = parse_manifest(json.dumps(row).encode(), SOURCE)
    except ManifestError as error:
        raise RefusedError(str(error).removeprefix(f"{SOURCE}: line 1: ")) from error
    if manifest.problems:
        raise RefusedError(
            "; ".join(
                f"`{URL_NAMES.get(each.column or '', each.column)}`: {each.message}" for each in manifest.problems
            )
        )
    return manifest.requests[0]


def _render(request: ClipRequest, run_id: str, settings: Settings) -> ClipResult:
    assert settings.output, "load_model has asked for it"
    model = inspect_checkpoint(settings.checkpoint)
    plan = plan_with(settings, model, [request], output_uri=settings.output, default_profile=settings.profile)
    if plan.settled:
        return plan.settled[0]
    return _with_retries(plan.jobs[0], run_id, settings.output)


def _with_retries(job: ClipJob, run_id: str, output_uri: str) -> ClipResult:
    """The task's own retries, which elsewhere Prefect makes, by the same table."""
    attempt = 1
    while True:
        try:
            result = render_clip.fn(job, output_uri=output_uri, run_id=run_id)
        except Exception as error:
            policy = policy_for(error)
            if policy.where is not Where.SAME_WORKER or attempt >= policy.max_attempts:
                raise
            logger.warning("%s: attempt %d failed: %s", job.clip_id, attempt, error)
            time.sleep(RETRY_DELAYS_SECONDS[attempt - 1])
            attempt += 1
        else:
            if result is None:
                raise RefusedError("another request renders this clip at this moment; ask again later")
            return result


def _described(result: ClipResult) -> dict[str, Any]:
    if result.error_class:
        return {"error": result.message, "error_class": result.error_class}
    return {
        "status": result.status.value,
        "clip_id": result.clip_id,
        "key": result.key,
        "video": result.video,
        "poster": result.poster,
        "seconds": dict(result.metrics.seconds) if result.metrics else {},
    }


def _error(error: Exception) -> dict[str, Any]:
    logger.warning("%s: %s", type(error).__name__, error)
    return {"error": str(error), "error_class": type(error).__name__}
