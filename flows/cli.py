"""The `scail` command: every subcommand is a few lines over the layers below.

Exit codes: 0 all rows rendered or skipped, 1 some rows failed, 2 refused before anything ran.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from flows.commands.cluster import certificates, health, scheduler, worker
from flows.commands.console import ExitCode, say_refused
from flows.commands.render import check, demo, render
from flows.commands.tools import bench, convert, doctor, evaluate, render_pose_file
from flows.commands.unattended import cancel, deploy, events, pause, resume, watch
from tasks import thrift
from tasks.errors import RefusedError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
pose_app = typer.Typer(no_args_is_help=True, help="The pose side: joints in, the video that SCAIL follows out.")

# In the order of `scail --help`.
app.command()(render)
app.command()(check)
app.command()(worker)
app.command()(watch)
app.command()(events)
app.command()(pause)
app.command()(resume)
app.command()(cancel)
app.command()(scheduler)
app.command()(certificates)
app.command()(health)
app.command()(convert)
app.command()(doctor)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(deploy)
app.command()(demo)
app.add_typer(pose_app, name="pose")
pose_app.command("render")(render_pose_file)


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
        say_refused(error)
        sys.exit(ExitCode.REFUSED)


if __name__ == "__main__":
    main()
