"""`scail watch`, `events`, `deploy`: renders that nobody starts by hand; `pause`, `resume`, `cancel` steer them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from flows.commands.console import ExitCode, err, options_checked, out, prepare_prefect, refuse, stopped
from flows.commands.options import (
    CheckpointOption,
    MaxGpusOption,
    OutputOption,
    PriorityOption,
    ProfileOption,
    VerboseOption,
    WorkersOption,
)
from tasks import cluster, control
from tasks.checkpoint import inspect_checkpoint
from tasks.errors import RefusedError
from tasks.form import RenderOptions
from tasks.settings import Settings
from tasks.storage import StorageError

InboxArgument = Annotated[str, typer.Argument(help="URI of the folder into which manifests are uploaded.")]
RunArgument = Annotated[str, typer.Argument(help="Id or name of a flow run, as Prefect's UI shows them.")]


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
        with options_checked():
            options = RenderOptions(
                profile=profile or Settings().profile, priority=priority, max_gpus=max_gpus, checkpoint=checkpoint
            )
        inspect_checkpoint(checkpoint or Settings().checkpoint)  # now, and not when the first manifest comes
        where = cluster.parse_workers(workers or Settings().workers)
    except RefusedError as error:
        refuse(error)
    prepare_prefect(verbose=verbose)
    from flows.watch_inbox import watch_until

    say, seconds = partial(out.print, markup=False), None if once else every
    try:
        with cluster.shared_prefect_api(where):
            all_ok = watch_until(inbox, output, options, workers=where, every_seconds=seconds, say=say)
    except RefusedError as error:
        refuse(error)
    except StorageError as error:
        stopped(f"stopped: {error}")
    except KeyboardInterrupt:
        stopped("stopped")
    raise typer.Exit(ExitCode.OK if all_ok else ExitCode.SOME_FAILED)


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
        refuse(error)


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
    prepare_prefect(verbose=verbose)
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
        refuse(error)
    out.print(f"they are run by a worker: prefect worker start --pool {WORK_POOL}", markup=False)


def pause(run: RunArgument) -> None:
    """Have a run begin no more clips; those under way are finished. Needs PREFECT_API_URL."""
    _ask(control.pause, run, "begins no more clips")


def resume(run: RunArgument) -> None:
    """Have a paused run go on."""
    _ask(control.resume, run, "goes on")


def cancel(run: RunArgument) -> None:
    """Have a run stop its clips at their next denoising step and end; what is published stays."""
    _ask(control.cancel, run, "stops")


def _ask(wish: Callable[[str], str], run: str, what_follows: str) -> None:
    try:
        name = wish(run)
    except RefusedError as error:
        refuse(error)
    out.print(f"{name} {what_follows}", markup=False)
