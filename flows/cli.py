"""The `scail` command: every subcommand is a few lines over the layers below.

Exit codes: 0 all rows rendered or skipped, 1 some rows failed, 2 refused before anything ran.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from scail.config import LoraFile
from tasks import cluster, control, thrift
from tasks.checkpoint import inspect_checkpoint, miniature
from tasks.errors import RefusedError
from tasks.forecast import Forecast
from tasks.form import SELECTABLE, RenderOptions
from tasks.health import Service, check_health
from tasks.measure import DEFAULT_PARTS, PARTS_HELP, measure
from tasks.plan import Plan, Rows, forecast_plan, forecast_rows, plan_line, plan_with
from tasks.scheduler import LOCAL_HOST, PORT, become, scheduler_spec
from tasks.selection import choose_rows
from tasks.settings import Settings
from tasks.storage import StorageError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ManifestArgument = Annotated[str, typer.Argument(help="URI of a CSV or JSONL manifest.")]
OutputOption = Annotated[str, typer.Option(help="URI of the folder for clips and results.")]
CheckpointOption = Annotated[str | None, typer.Option(help="Checkpoint folder. [default: SCAIL_CHECKPOINT]")]
ProfileOption = Annotated[str | None, typer.Option(help="Sampling profile of rows that name none.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Take only the first rows.")]
OnlyStatusOption = Annotated[
    list[str],
    typer.Option(help=f"Take only rows that ended so in the last run: {', '.join(SELECTABLE)}. May be repeated."),
]
SkipInvalidOption = Annotated[bool, typer.Option("--skip-invalid", help="Render the good rows, report the others.")]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        help="`local`, a number of processes, or a Dask scheduler's tls://host:port. [default: SCAIL_WORKERS]"
    ),
]
PriorityOption = Annotated[int, typer.Option(help="On a cluster, runs with a higher number come first.")]
MaxGpusOption = Annotated[
    int | None, typer.Option(min=1, help="Of a cluster's GPUs, hold so many at most. [default: all]")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's and our own log.")]

MINIATURE_SHARPNESS = "0.1,0.05"  # its clips have 0.15 to 0.4 of their references' edges; the limits are for the 14B


class ExitCode(IntEnum):
    OK = 0
    SOME_FAILED = 1
    REFUSED = 2


@app.command()
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
        with _options_checked():
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
        _refuse(error)
    if model.notice:
        err.print(f"[yellow]{model.name}: {model.notice}[/yellow]")
    err.print("starting Prefect …", style="dim")
    _prepare_prefect(verbose=verbose)
    from flows.progress import progress_bars
    from flows.render_manifest import render_manifest, report_uri
    from tasks.results import closing_line, quality_line, summary_in

    on_workers = render_manifest.with_options(task_runner=cluster.task_runner(where, model.path))
    try:
        with progress_bars(err), cluster.shared_prefect_api(where):
            state = on_workers(manifest, output, options, return_state=True)
    except RefusedError as error:
        _refuse(error)
    except KeyboardInterrupt:
        _stopped("stopped")
    if state.is_cancelled():
        _stopped("cancelled")
    result = state.result(raise_on_failure=False)
    if isinstance(result, RefusedError):
        _refuse(result)
    if isinstance(result, StorageError):
        _stopped(f"stopped: {result}")
    if (summary := summary_in(result)) is None:
        raise result if isinstance(result, BaseException) else RuntimeError(state.message)
    if line := quality_line(summary):
        out.print(line, markup=False)
    out.print(closing_line(summary, report_uri(summary.run)), markup=False)
    raise typer.Exit(ExitCode.OK if state.is_completed() else ExitCode.SOME_FAILED)


@app.command()
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
        with _options_checked():
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
        _refuse(error)
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


@app.command()
def worker(
    scheduler: Annotated[
        str | None, typer.Argument(help="Address of the Dask scheduler, tls://host:port. [default: SCAIL_WORKERS]")
    ] = None,
    checkpoint: CheckpointOption = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Listen here. [default: any free port]")] = None,
    contact_address: Annotated[
        str | None, typer.Option(help="Where the scheduler reaches that port, if not at this machine's own address.")
    ] = None,
) -> None:
    """Render for a Dask cluster: one process per visible GPU, each with the model loaded, until told to end."""
    from tasks.worker import keep_workers, worker_specs

    settings = Settings()
    try:
        cluster.check_address(address := scheduler or settings.workers)
        model = inspect_checkpoint(checkpoint or settings.checkpoint)
        specs = worker_specs(
            address,
            checkpoint=model.path,
            gpus=cluster.visible_gpus(),
            tls_dir=settings.tls_dir,
            port=port,
            contact_address=contact_address,
        )
    except RefusedError as error:
        _refuse(error)
    keep_workers(address, specs, say=lambda line: err.print(line, markup=False))


InboxArgument = Annotated[str, typer.Argument(help="URI of the folder into which manifests are uploaded.")]


@app.command()
def watch(
    inbox: InboxArgument,
    output: OutputOption,
    checkpoint: CheckpointOption = None,
    profile: ProfileOption = None,
    workers: WorkersOption = None,
    priority: PriorityOption = 0,
    max_gpus: MaxGpusOption = None,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end when there is nothing to render.")] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 20.0,
    verbose: VerboseOption = False,
) -> None:
    """Render every manifest that is uploaded to a folder, once, whoever else watches it.

    It is moved to `done` beside the inbox, or to `refused` with a file that says what is wrong with it.
    """
    try:
        with _options_checked():
            options = RenderOptions(
                profile=profile or Settings().profile, priority=priority, max_gpus=max_gpus, checkpoint=checkpoint
            )
        inspect_checkpoint(checkpoint or Settings().checkpoint)  # now, and not when the first manifest comes
        where = cluster.parse_workers(workers or Settings().workers)
    except RefusedError as error:
        _refuse(error)
    _prepare_prefect(verbose=verbose)
    from flows.watch_inbox import watch_until

    say, seconds = partial(out.print, markup=False), None if once else every
    try:
        with cluster.shared_prefect_api(where):
            all_ok = watch_until(inbox, output, options, workers=where, every_seconds=seconds, say=say)
    except RefusedError as error:
        _refuse(error)
    except StorageError as error:
        _stopped(f"stopped: {error}")
    except KeyboardInterrupt:
        _stopped("stopped")
    raise typer.Exit(ExitCode.OK if all_ok else ExitCode.SOME_FAILED)


@app.command()
def events(
    inbox: InboxArgument,
    host: Annotated[str, typer.Option(help="Address to listen at; only this machine reaches the default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the events that come by HTTP POST.")] = 8085,
    subscription: Annotated[
        str | None, typer.Option(help="Pub/Sub subscription to pull from: projects/P/subscriptions/S.")
    ] = None,
) -> None:
    """Turn a bucket's notifications into events of Prefect, which start the inbox's deployment at once.

    CloudEvents, Pub/Sub messages and S3 records are taken by POST, with the bearer token SCAIL_EVENTS_TOKEN if that
    is set. Without this command the inbox is looked at every minute all the same.
    """
    from tasks.bucket_events import serve_events

    token = Settings().events_token
    try:
        serve_events(
            inbox,
            host=host,
            port=port,
            token=token.get_secret_value() if token else None,
            subscription=subscription,
            say=partial(err.print, markup=False),
        )
    except RefusedError as error:
        _refuse(error)


RunArgument = Annotated[str, typer.Argument(help="Id or name of a flow run, as Prefect's UI shows them.")]


@app.command()
def pause(run: RunArgument) -> None:
    """Have a run begin no more clips; those under way are finished. Needs PREFECT_API_URL."""
    _ask(control.pause, run, "begins no more clips")


@app.command()
def resume(run: RunArgument) -> None:
    """Have a paused run go on."""
    _ask(control.resume, run, "goes on")


@app.command()
def cancel(run: RunArgument) -> None:
    """Have a run stop its clips at their next denoising step and end; what is published stays."""
    _ask(control.cancel, run, "stops")


@app.command()
def scheduler(
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need SCAIL_TLS_DIR.")] = (
        LOCAL_HOST
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = PORT,
) -> None:
    """Connect renders and workers: the Dask scheduler of a cluster."""
    try:
        spec = scheduler_spec(host, port, Settings().tls_dir)
    except RefusedError as error:
        _refuse(error)
    become(spec)


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they are written; kept from others.")],
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of a machine of the cluster; once for each.")
    ] = None,
) -> None:
    """Make the certificates of a cluster's machines. Run again, it makes new ones of the same authority."""
    from tasks.tls import NODE, write_certificates

    try:
        ends = write_certificates(folder, host or [])
    except RefusedError as error:
        _refuse(error)
    out.print(
        f"valid until {ends:%Y-%m-%d}; set SCAIL_TLS_DIR to {folder / NODE}, copied to every machine", markup=False
    )


@app.command()
def health(
    service: Annotated[Service, typer.Argument(help="What to ask.")],
    address: Annotated[str | None, typer.Argument(help="The Dask scheduler's. [default: SCAIL_WORKERS]")] = None,
) -> None:
    """Say whether a service of a cluster does its work; for health checks."""
    try:
        out.print(check_health(service, address or Settings().workers), markup=False)
    except RefusedError as error:
        err.print(str(error), markup=False)
        raise typer.Exit(ExitCode.SOME_FAILED) from error


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="Official SCAIL-Preview folder, `wan` layout, Wan2GP, ComfyUI, or a folder of ours.")
    ],
    dest: Annotated[Path, typer.Argument(help="Checkpoint folder to write; it must not exist or be empty.")],
    quantize: Annotated[
        str, typer.Option(help="`fp8` (Hopper, Ada) or `int8` (Ampere): half the size, for profiles quality and fast.")
    ] = "none",
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE:STRENGTH, fused into the transformer; may be given again.")
    ] = None,
    transformer_heads: Annotated[
        int | None, typer.Option(hidden=True, help="Of a model that is not SCAIL-14B.")
    ] = None,
    image_heads: Annotated[int | None, typer.Option(hidden=True, help="Of a tower that is not ViT-H.")] = None,
) -> None:
    """Turn original weight files into a checkpoint folder, once; or a folder of ours into another one."""
    from flows.prepare_checkpoint import prepare_checkpoint

    try:
        model = prepare_checkpoint(
            source,
            dest,
            quantization=quantize,
            loras=[LoraFile.parse(text) for text in lora or ()],
            transformer_heads=transformer_heads,
            image_heads=image_heads,
            say=lambda line: err.print(line, markup=False),
        )
    except RefusedError as error:
        _refuse(error)
    out.print(f"{model.name}, fingerprint {model.fingerprint} → {dest}", markup=False)


@app.command()
def doctor(checkpoint: CheckpointOption = None) -> None:
    """Look at the checkpoint, ffmpeg, decord, the GPU and Prefect's API; one line each."""
    from tasks.doctor import examine

    findings = examine(checkpoint or Settings().checkpoint)
    for finding in findings:
        out.print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what:<14} {finding.message}", markup=False)
    raise typer.Exit(ExitCode.OK if all(finding.ok for finding in findings) else ExitCode.SOME_FAILED)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="`14b` or `tiny`; its weights are random.")] = "14b",
    frames: Annotated[int, typer.Option(min=1, max=81)] = 81,
    height: Annotated[int, typer.Option(min=32)] = 512,
    width: Annotated[int, typer.Option(min=32)] = 896,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the time of one does not depend on it.")] = 2,
    only: Annotated[str, typer.Option(help=PARTS_HELP)] = ",".join(DEFAULT_PARTS),
    clips: Annotated[int, typer.Option(min=2, help="Clips of the part `clips`.")] = 20,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
) -> None:
    """Measure random weights on this machine: each figure beside its goal, and a peer or a ceiling of this device."""
    try:
        lines, document = measure(
            model,
            num_frames=frames,
            height=height,
            width=width,
            num_steps=steps,
            only=[part.strip() for part in only.split(",")],
            num_clips=clips,
        )
    except RefusedError as error:
        _refuse(error)
    out.print(lines, markup=False)
    if json:
        json.write_text(document, encoding="utf-8")


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint folder. [default: the miniature that comes with the program]")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips to render; each once more with another pose.")] = 24,
    frames: Annotated[int, typer.Option(min=1, max=81)] = 17,
    steps: Annotated[int, typer.Option(min=1)] = 8,
    guidance: Annotated[float, typer.Option(min=0)] = 1.0,
    json: Annotated[Path | None, typer.Option(help="Write every score to this file.")] = None,
) -> None:
    """Score a checkpoint on characters and motions that it was not trained on; exit code 1 if a goal is missed."""
    from tasks.scores import score_checkpoint

    model = checkpoint or str(miniature() or Settings().checkpoint)
    try:
        inspect_checkpoint(model)
        lines, document, ok = score_checkpoint(
            model, num_clips=clips, num_frames=frames, num_steps=steps, guidance_scale=guidance
        )
    except RefusedError as error:
        _refuse(error)
    out.print(lines, markup=False)
    if json:
        json.write_text(document, encoding="utf-8")
    raise typer.Exit(ExitCode.OK if ok else ExitCode.SOME_FAILED)


@app.command()
def deploy(
    output: Annotated[str | None, typer.Option(help="Folder of all clips. [default: SCAIL_OUTPUT]")] = None,
    inbox: Annotated[
        str | None, typer.Option(help="Folder that is watched for manifests. [default: SCAIL_INBOX]")
    ] = None,
    manifests: Annotated[
        str | None, typer.Option(help="Folder of manifests to render nightly. [default: SCAIL_MANIFESTS]")
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Register the ways in with a Prefect server: the form, the nightly run, the inbox."""
    _prepare_prefect(verbose=verbose)
    from flows.deployments import WORK_POOL, deploy

    settings = Settings()
    folders = {
        "output": output or settings.output,
        "inbox": inbox or settings.inbox,
        "manifests": manifests or settings.manifests,
    }
    try:
        for registered in deploy(folders):
            out.print(str(registered), markup=False)
    except RefusedError as error:
        _refuse(error)
    out.print(f"they are run by a worker: prefect worker start --pool {WORK_POOL}", markup=False)


pose_app = typer.Typer(no_args_is_help=True, help="The pose side: joints in, the video that SCAIL follows out.")
app.add_typer(pose_app, name="pose")


@pose_app.command("render")
def render_pose_file(
    joints: Annotated[Path, typer.Argument(help="Pose file (.npz): SMPL joints in camera millimetres.")],
    video: Annotated[Path, typer.Argument(help="The mp4 to write.")],
    height: Annotated[int | None, typer.Option(min=2, help="Rows; with --width. [default: the pose file's]")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="Columns; with --height.")] = None,
    two_persons: Annotated[bool, typer.Option("--two-persons", help="Colours that tell persons apart.")] = False,
) -> None:
    """Draw a pose file as the official renderer does."""
    from tasks.pose import render_pose_video

    try:
        num_frames = render_pose_video(joints, video, height=height, width=width, two_persons=two_persons)
    except RefusedError as error:
        _refuse(error)
    out.print(f"{num_frames} frames → {video}", markup=False)


@app.command()
def demo(
    manifest: ManifestArgument = "manifests/demo.csv",
    output: OutputOption = "out/demo",
    verbose: VerboseOption = False,
) -> None:
    """Render the demo manifest on this machine with the trained miniature that comes with the program."""
    if (checkpoint := miniature()) is None:
        _refuse(RefusedError("the miniature's checkpoint is not in this installation; run `make demo` in a clone"))
    os.environ.setdefault("SCAIL_QUALITY_SHARPNESS", MINIATURE_SHARPNESS)
    render(manifest, output=output, checkpoint=str(checkpoint), verbose=verbose)


def main() -> None:
    """Entry point of the `scail` command."""
    thrift.begin()
    logging.captureWarnings(capture=True)
    # Threads of torch that wait in a loop take the cores from Prefect's server beside them: a decode on two cores
    # took 9 s instead of 1.5 s. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except RefusedError as error:  # a flow's module reads the settings when it is imported
        _say_refused(error)
        sys.exit(ExitCode.REFUSED)


@contextmanager
def _options_checked() -> Iterator[None]:
    """Raises RefusedError where an option's value is not one that the form takes."""
    try:
        yield
    except ValidationError as error:
        problems = [f"{found['loc'][0]}: {found['msg'].removeprefix('Value error, ')}" for found in error.errors()]
        raise RefusedError("; ".join(problems)) from error


def _plan(rows: Rows, output: str | None, options: RenderOptions) -> tuple[Plan | None, Forecast]:
    settings = Settings()
    checkpoint, profile = options.checkpoint or settings.checkpoint, options.profile
    if output is None:
        return None, forecast_rows(rows, checkpoint=checkpoint, default_profile=profile, settings=settings)
    model = inspect_checkpoint(checkpoint)
    plan = plan_with(settings, model, rows.requests, output_uri=output, default_profile=profile)
    return plan, forecast_plan(plan, output_uri=output, model=model, settings=settings)


def _prepare_prefect(*, verbose: bool) -> None:
    """Settings that Prefect reads when it is imported; what the user has set stays."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "scail,tasks,flows")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # its silence tells that this machine died
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # 20 is short on a busy machine
    # Else a fresh worker asks the server for its version first, and fails every clip while that is away.
    os.environ.setdefault("PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def _ask(wish: Callable[[str], str], run: str, what_follows: str) -> None:
    try:
        name = wish(run)
    except RefusedError as error:
        _refuse(error)
    out.print(f"{name} {what_follows}", markup=False)


def _stopped(what: str) -> NoReturn:
    err.print(f"{what}\nclips that are published stay; render the manifest again to go on", markup=False)
    raise typer.Exit(ExitCode.SOME_FAILED)


def _refuse(error: RefusedError) -> NoReturn:
    _say_refused(error)
    raise typer.Exit(ExitCode.REFUSED)


def _say_refused(error: RefusedError) -> None:
    err.print("[red]refused[/red] ", end="")
    err.print(str(error), markup=False)


if __name__ == "__main__":
    main()
