"""The main job: manifest → plan (skip what is done) → one task per clip → results and report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from tasks import cluster, storage, thrift
from tasks.artifacts import ProgressArtifact, publish_artifacts, publish_plan
from tasks.attempts import cancelling_on_exit
from tasks.checkpoint import inspect_checkpoint
from tasks.control import controlled, start_id
from tasks.errors import RunCancelledError
from tasks.forecast import Forecast
from tasks.form import DEFAULT_OPTIONS, RenderOptions
from tasks.jobs import ClipJob, ClipRequest, ClipResult, ClipStatus
from tasks.notify import open_notifications
from tasks.packed import PackedResults
from tasks.plan import Plan, Rows, forecast_plan, plan_line, plan_with, result_of
from tasks.progress import progress_sink
from tasks.render import render_clip, software_versions
from tasks.report import write_report
from tasks.results import RowsFailedError, RunInfo, Summary, closing_line, mark_success, trouble_lines, write_results
from tasks.selection import choose_rows
from tasks.settings import Settings
from tasks.window import run_window

logger = logging.getLogger(__name__)


def run_name() -> str:
    """What the run is called in Prefect's UI: `spring.csv`."""
    return storage.name(flow_run.parameters["manifest"])


@flow(
    name="render-manifest",
    flow_run_name=run_name,
    task_runner=cluster.configured_task_runner(),
    validate_parameters=True,
)
def render_manifest(manifest: str, output: str, options: RenderOptions = DEFAULT_OPTIONS) -> State[Summary | None]:
    """Render every clip of a manifest that is not rendered yet.

    Args:
        manifest: The list of clips, a CSV or JSONL file: `gs://…`, `s3://…`, `https://…`, or a path that the
            coordinator sees.
        output: The folder for clips and results, such as `gs://studio/renders`. What is there already is skipped.
        options: Everything has a sensible default: leave it as it is to render what is not rendered yet.

    Returns:
        A failed state when a row failed, otherwise a completed one; both hold the run's summary, unless it was dry.
        A cancelled one if somebody cancelled the run.

    Raises:
        RefusedError: Before anything is rendered, if the manifest, the checkpoint or the workers cannot be used.
    """
    settings = Settings()
    started_at = datetime.now(UTC)
    run_id = f"{started_at:%Y%m%dT%H%M%SZ}-{flow_run.id.partition('-')[0]}"
    rows = choose_rows(manifest, output, options, policy=settings.storage_policy())
    model = inspect_checkpoint(options.checkpoint or settings.checkpoint)
    plan = plan_with(settings, model, rows.requests, output_uri=output, default_profile=options.profile)
    forecast = forecast_plan(plan, output_uri=output, model=model, settings=settings)
    logger.info("%d rows settled before; %s", len(plan.settled), forecast)
    if options.dry_run:
        return show_plan(plan, rows, forecast, manifest_uri=manifest)
    results = PackedResults((*rows.invalid, *plan.settled))
    progress = ProgressArtifact(flow_run.id, forecast)
    with open_notifications(
        settings, run_id=run_id, manifest_uri=manifest, output_uri=output, also=[progress]
    ) as notifications:
        notifications.started(plan, rows.invalid)
        try:
            for result in render_all(plan, options, output_uri=output, checkpoint=model.path, settings=settings):
                results.append(result)
                notifications.clip(result)
        except RunCancelledError:
            return Cancelled(message="cancelled; clips that are published stay")
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
    publish_artifacts(results, summary=summary, report_uri=report_uri(run))
    return closing_state(results, closing_line(summary, report_uri(run)), summary)


def render_all(
    plan: Plan, options: RenderOptions, *, output_uri: str, checkpoint: str, settings: Settings
) -> Iterator[ClipResult]:
    """The result of every row of the plan that has to be rendered, as they come."""
    if not plan.jobs:
        return
    thrift.settle()
    submit: Callable[[ClipJob], Any] = partial(
        render_clip.submit,
        output_uri=output_uri,
        run_id=start_id(),
        checkpoint=checkpoint if cluster.renders_here() else None,
    )
    submit = cluster.at_priority(submit, options.priority)
    with (
        cancelling_on_exit(output_uri, start_id(), policy=settings.storage_policy(), tell=cluster.stop_clips),
        controlled(flow_run.id) as control,
    ):
        for job, outcome in run_window(plan.jobs, submit, control.obeying(cluster.slots(options.max_gpus))):
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


def show_plan(plan: Plan, rows: Rows, forecast: Forecast, *, manifest_uri: str) -> State[Summary | None]:
    """What a dry run leaves behind: the plan in Prefect's UI, and nothing else."""
    publish_plan(plan, rows, forecast, manifest_uri=manifest_uri)
    expected = f"; {forecast}" if plan.jobs else ""
    return closing_state([*rows.invalid, *plan.settled], f"dry run: {plan_line(plan, rows)}{expected}", None)


def closing_state(results: Iterable[ClipResult], message: str, summary: Summary | None) -> State[Summary | None]:
    """The run's last state: failed if a row is, and then with the first reasons below the message."""
    if troubles := trouble_lines(results):
        return Failed(message="\n".join([message, *troubles]), data=RowsFailedError(message, summary))
    return Completed(message=message, data=summary)


def devices_of(results: Iterable[ClipResult]) -> str:
    """What the run's own clips were rendered on."""
    rendered = (result.metrics for result in results if result.metrics and result.status is ClipStatus.RENDERED)
    return ", ".join(sorted({metrics.device for metrics in rendered})) or "none"


def publish_run(results: Collection[ClipResult], columns: Sequence[str], run: RunInfo) -> Summary:
    """Results, failures, summary and report of a run; the mark that it is complete comes last."""
    run_dir_uri = storage.join(run.output_uri, "runs", run.run_id)
    summary = write_results(results, columns=columns, run_dir_uri=run_dir_uri, run=run)
    write_report(results, summary=summary, run_dir_uri=run_dir_uri, output_uri=run.output_uri)
    mark_success(run_dir_uri)
    return summary


def report_uri(run: RunInfo) -> str:
    """The newest run's page."""
    return storage.join(run.output_uri, "report.html")
