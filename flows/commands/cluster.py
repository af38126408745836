"""`scail worker`, `scheduler`, `certificates`, `health`: the machines of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.console import ExitCode, err, out, refuse
from flows.commands.options import CheckpointOption
from tasks import cluster
from tasks.checkpoint import inspect_checkpoint
from tasks.errors import RefusedError
from tasks.health import Service, check_health
from tasks.scheduler import LOCAL_HOST, PORT, become, scheduler_spec
from tasks.settings import Settings


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
        refuse(error)
    keep_workers(address, specs, say=lambda line: err.print(line, markup=False))


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
        refuse(error)
    become(spec)


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
        refuse(error)
    out.print(
        f"valid until {ends:%Y-%m-%d}; set SCAIL_TLS_DIR to {folder / NODE}, copied to every machine", markup=False
    )


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
