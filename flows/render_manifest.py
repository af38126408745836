"""The main job: manifest → plan (skip what is done) → one task per clip → results and report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import PositiveInt

from tasks import cluster, storage
from tasks.attempts import cancelling_on_exit
from tasks.checkpoint import inspect_checkpoint
from tasks.jobs import ClipJob, ClipRequest, ClipResult, ClipStatus
from tasks.notify import open_notifications
from tasks.plan import Plan, forecast_plan, plan_clips, read_rows, result_of
from tasks.progress import progress_sink
from tasks.render import render_clip, software_versions
from tasks.report import write_report
from tasks.results import RunInfo, Summary, closing_line, mark_success, write_results
from tasks.settings import Settings
from tasks.window import run_window

logger = logging.getLogger(__name__)


@flow(
    name="render-manifest",
    flow_run_name="{manifest}",
    task_runner=cluster.configured_task_runner(),
    validate_parameters=True,
)
def render_manifest(
    manifest: str,
    output: str,
    checkpoint: str | None = None,
    profile: str | None = None,
    limit: int | None = None,
    skip_invalid: bool = False,
    priority: int = 0,
    max_gpus: PositiveInt | None = None,
) -> State[Summary]:
    """Render every clip of a manifest that is not rendered yet.

    Args:
        manifest: URI of a CSV or JSONL manifest; its columns are in manifests/README.md.
        output: URI of the folder for clips, done records and runs.
        checkpoint: Checkpoint folder; the setting SCAIL_CHECKPOINT if absent.
        profile: Sampling profile of rows that name none; the setting SCAIL_PROFILE if absent.
        limit: Take only the first rows.
        skip_invalid: Render the good rows of a manifest that has malformed ones.
        priority: On a cluster, clips of a run with a higher number are started first.
        max_gpus: Of a cluster's GPUs, hold no more than so many at a time; all if absent.

    Returns:
        A failed state when a row failed, otherwise a completed one; both hold the run's summary.

    Raises:
        RefusedError: Before anything is rendered, if the manifest, the checkpoint or the workers cannot be used.
    """
    settings = Settings()
    started_at = datetime.now(UTC)
    run_id = f"{started_at:%Y%m%dT%H%M%SZ}-{flow_run.id.partition('-')[0]}"
    rows = read_rows(manifest, skip_invalid=skip_invalid, limit=limit)
    model = inspect_checkpoint(checkpoint or settings.checkpoint)
    plan = plan_clips(
        rows.requests,
        output_uri=output,
        checkpoint_fingerprint=model.fingerprint,
        default_profile=profile or settings.profile,
        policy=settings.storage_policy(),
        threads=settings.planning_threads,
    )
    forecast = forecast_plan(plan, output_uri=output, model=model, settings=settings)
    logger.info("%d rows settled before; %s", len(plan.settled), forecast)
    results = [*rows.invalid, *plan.settled]
    with open_notifications(settings, run_id=run_id, manifest_uri=manifest, output_uri=output) as notifications:
        notifications.started(plan, rows.invalid)
        for result in render_all(
            plan, output_uri=output, checkpoint=model.path, priority=priority, max_gpus=max_gpus, settings=settings
        ):
            results.append(result)
            notifications.clip(result)
        run = RunInfo(
            run_id=run_id,
            manifest_uri=manifest,
            output_uri=output,
            started_at=started_at,
            finished_at=datetime.now(UTC),
            checkpoint_name=model.name,
            checkpoint_fingerprint=model.fingerprint,
            device=devices_of(results),
            versions=software_versions(),
            price_per_gpu_hour=settings.price_per_gpu_hour,
            notice=model.notice or None,
        )
        summary = publish_run(results, rows.columns, run)
        notifications.finished(summary)
    ok = not (summary.counts[ClipStatus.FAILED] or summary.counts[ClipStatus.INVALID])
    return (Completed if ok else Failed)(message=closing_line(summary, report_uri(run)), data=summary)


def render_all(
    plan: Plan, *, output_uri: str, checkpoint: str, priority: int, max_gpus: int | None, settings: Settings
) -> Iterator[ClipResult]:
    """The result of every row of the plan that has to be rendered, as they come."""
    if not plan.jobs:
        return
    submit: Callable[[ClipJob], Any] = partial(
        render_clip.submit,
        output_uri=output_uri,
        run_id=flow_run.id,
        checkpoint=checkpoint if cluster.renders_here() else None,
    )
    submit = cluster.at_priority(submit, priority)
    with cancelling_on_exit(output_uri, flow_run.id, policy=settings.storage_policy()):
        for job, outcome in run_window(plan.jobs, submit, cluster.slots(max_gpus)):
            result = outcome if isinstance(outcome, ClipResult) else failed_result(job, outcome)
            progress_sink.get()(job.clip_id, result.status, 0, 0)
            yield result
            yield from (twin_result(result, job, twin) for twin in plan.twins.get(job.key, ()))


def failed_result(job: ClipJob, error: Exception) -> ClipResult:
    """The row of a clip that could not be rendered: one failing row never stops the others."""
    logger.warning("%s (line %d) failed: %s", job.clip_id, job.request.row, error)
    return result_of(job.request, ClipStatus.FAILED).failed_by(error)


def twin_result(result: ClipResult, job: ClipJob, twin: ClipRequest) -> ClipResult:
    """The result of a row that asked for the same pixels as `job`: the same files, or the same failure."""
    status = ClipStatus.SKIPPED if result.status is ClipStatus.RENDERED else result.status
    own = {"row": twin.row, "clip_id": twin.clip_id, "columns": twin.columns, "status": status}
    note = {"message": f"same content as {job.clip_id}"} if status is ClipStatus.SKIPPED else {}
    return result.model_copy(update=own | note)


def devices_of(results: Sequence[ClipResult]) -> str:
    """What the run's own clips were rendered on."""
    rendered = (result.metrics for result in results if result.metrics and result.status is ClipStatus.RENDERED)
    return ", ".join(sorted({metrics.device for metrics in rendered})) or "none"


def publish_run(results: Sequence[ClipResult], columns: Sequence[str], run: RunInfo) -> Summary:
    """Results, failures, summary and report of a run; the mark that it is complete comes last."""
    run_dir_uri = storage.join(run.output_uri, "runs", run.run_id)
    summary = write_results(results, columns=columns, run_dir_uri=run_dir_uri, run=run)
    write_report(results, summary=summary, run_dir_uri=run_dir_uri, output_uri=run.output_uri)
    mark_success(run_dir_uri)
    return summary


def report_uri(run: RunInfo) -> str:
    """The newest run's page."""
    return storage.join(run.output_uri, "report.html")
