"""`scail render`, `check` and `demo`: a manifest, rendered or only planned."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from flows.commands.console import ExitCode, err, options_checked, out, prepare_prefect, refuse, stopped
from flows.commands.options import (
    CheckpointOption,
    LimitOption,
    ManifestArgument,
    MaxGpusOption,
    OnlyStatusOption,
    OutputOption,
    PriorityOption,
    ProfileOption,
    SkipInvalidOption,
    VerboseOption,
    WorkersOption,
)
from tasks import cluster
from tasks.checkpoint import inspect_checkpoint, miniature
from tasks.errors import RefusedError
from tasks.forecast import Forecast
from tasks.form import RenderOptions
from tasks.plan import Plan, Rows, forecast_plan, forecast_rows, plan_line, plan_with
from tasks.selection import choose_rows
from tasks.settings import Settings
from tasks.storage import StorageError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

MINIATURE_SHARPNESS = "0.1,0.05"  # its clips have 0.15 to 0.4 of their references' edges; the limits are for the 14B


def render(
    manifest: ManifestArgument,
    output: OutputOption,
    checkpoint: CheckpointOption = None,
    profile: ProfileOption = None,
    limit: LimitOption = None,
    only_status: OnlyStatusOption = [],  # noqa: B006  # Typer's way to an option that may be repeated
    skip_invalid: SkipInvalidOption = False,
    workers: WorkersOption = None,
    priority: PriorityOption = 0,
    max_gpus: MaxGpusOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and render nothing.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Render every clip of a manifest that is not rendered yet."""
    if dry_run:
        check(manifest, output, checkpoint, profile, limit, only_status, skip_invalid)
        return
    settings = Settings()
    try:
        with options_checked():
            options = RenderOptions(
                profile=profile or settings.profile,
                only_status=tuple(only_status),
                limit=limit,
                skip_invalid=skip_invalid,
                priority=priority,
                max_gpus=max_gpus,
                checkpoint=checkpoint,
            )
        # The flow asks again; here a refusal is instant.
        choose_rows(manifest, output, options, policy=settings.storage_policy())
        model = inspect_checkpoint(checkpoint or settings.checkpoint)
        where = cluster.parse_workers(workers or settings.workers)
    except RefusedError as error:
        refuse(error)
    if model.notice:
        err.print(f"[yellow]{model.name}: {model.notice}[/yellow]")
    err.print("starting Prefect …", style="dim")
    prepare_prefect(verbose=verbose)
    from flows.progress import progress_bars
    from flows.render_manifest import render_manifest

    on_workers = render_manifest.with_options(task_runner=cluster.task_runner(where, model.path))
    try:
        with progress_bars(err), cluster.shared_prefect_api(where):
            state = on_workers(manifest, output, options, return_state=True)
    except RefusedError as error:
        refuse(error)
    except KeyboardInterrupt:
        stopped("stopped")
    _end(state)


def check(
    manifest: ManifestArgument,
    output: Annotated[str | None, typer.Option(help="Folder in which to look for clips that are done.")] = None,
    checkpoint: CheckpointOption = None,
    profile: ProfileOption = None,
    limit: LimitOption = None,
    only_status: OnlyStatusOption = [],  # noqa: B006
    skip_invalid: SkipInvalidOption = False,
) -> None:
    """Say what a manifest would render, how long that takes and what it costs. Nothing is written, no GPU is needed.

    With `--output`, inputs are hashed, done clips are looked up, and the forecast learns from the clips there;
    without, only the rows are checked, and the forecast is a guess.
    """
    try:
        with options_checked():
            options = RenderOptions(
                profile=profile or Settings().profile,
                only_status=tuple(only_status),
                limit=limit,
                skip_invalid=skip_invalid,
                checkpoint=checkpoint,
            )
        rows = choose_rows(manifest, output, options, policy=Settings().storage_policy())
        plan, forecast = _plan(rows, output, options)
    except RefusedError as error:
        refuse(error)
    for result in rows.invalid:
        out.print(f"invalid  {result.message}", markup=False)
    if plan is None:
        out.print(str(forecast), markup=False)
        out.print(f"{len(rows.requests)} rows can be rendered, {len(rows.invalid)} are invalid", markup=False)
        raise typer.Exit(ExitCode.SOME_FAILED if rows.invalid else ExitCode.OK)
    for result in plan.settled:
        out.print(f"{result.status:<8} {result.clip_id}  {result.message or result.video or ''}", markup=False)
    for job in plan.jobs:
        num_twins = len(plan.twins.get(job.key, ()))
        shared = f"  (and {num_twins} more rows with the same content)" if num_twins else ""
        out.print(f"render   {job.clip_id}  {job.params.num_inference_steps} steps{shared}", markup=False)
    if plan.jobs:
        out.print(str(forecast), markup=False)
    out.print(plan_line(plan, rows), markup=False)
    failed = rows.invalid or any(result.status == "failed" for result in plan.settled)
    raise typer.Exit(ExitCode.SOME_FAILED if failed else ExitCode.OK)


def demo(
    manifest: ManifestArgument = "manifests/demo.csv",
    output: OutputOption = "out/demo",
    verbose: VerboseOption = False,
) -> None:
    """Render the demo manifest on this machine with the trained miniature that comes with the program."""
    if (checkpoint := miniature()) is None:
        refuse(RefusedError("the miniature's checkpoint is not in this installation; run `make demo` in a clone"))
    os.environ.setdefault("SCAIL_QUALITY_SHARPNESS", MINIATURE_SHARPNESS)
    render(manifest, output=output, checkpoint=str(checkpoint), verbose=verbose)


def _plan(rows: Rows, output: str | None, options: RenderOptions) -> tuple[Plan | None, Forecast]:
    settings = Settings()
    checkpoint, profile = options.checkpoint or settings.checkpoint, options.profile
    if output is None:
        return None, forecast_rows(rows, checkpoint=checkpoint, default_profile=profile, settings=settings)
    model = inspect_checkpoint(checkpoint)
    plan = plan_with(settings, model, rows.requests, output_uri=output, default_profile=profile)
    return plan, forecast_plan(plan, output_uri=output, model=model, settings=settings)


def _end(state: State[Any]) -> NoReturn:
    """The last lines of a render and its exit code, of the state that its flow run ended in."""
    from flows.render_manifest import report_uri
    from tasks.results import closing_line, quality_line, summary_in

    if state.is_cancelled():
        stopped("cancelled")
    result = state.result(raise_on_failure=False)
    if isinstance(result, RefusedError):
        refuse(result)
    if isinstance(result, StorageError):
        stopped(f"stopped: {result}")
    if (summary := summary_in(result)) is None:
        raise result if isinstance(result, BaseException) else RuntimeError(state.message)
    if line := quality_line(summary):
        out.print(line, markup=False)
    out.print(closing_line(summary, report_uri(summary.run)), markup=False)
    raise typer.Exit(ExitCode.OK if state.is_completed() else ExitCode.SOME_FAILED)
