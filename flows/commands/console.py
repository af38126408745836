"""How a command speaks: its two consoles, its exit codes, and how it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from tasks.errors import RefusedError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ExitCode(IntEnum):
    OK = 0
    SOME_FAILED = 1
    REFUSED = 2


@contextmanager
def options_checked() -> Iterator[None]:
    """Raises RefusedError where an option's value is not one that the form takes."""
    try:
        yield
    except ValidationError as error:
        problems = [f"{found['loc'][0]}: {found['msg'].removeprefix('Value error, ')}" for found in error.errors()]
        raise RefusedError("; ".join(problems)) from error


def stopped(what: str) -> NoReturn:
    """Ends a command whose work was begun and is not whole."""
    err.print(f"{what}\nclips that are published stay; render the manifest again to go on", markup=False)
    raise typer.Exit(ExitCode.SOME_FAILED)


def refuse(error: RefusedError) -> NoReturn:
    """Ends a command before anything ran."""
    say_refused(error)
    raise typer.Exit(ExitCode.REFUSED)


def say_refused(error: RefusedError) -> None:
    err.print("[red]refused[/red] ", end="")
    err.print(str(error), markup=False)


def prepare_prefect(*, verbose: bool) -> None:
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
