"""The Dask scheduler of a cluster: on this machine alone, unless its connections are encrypted and authenticated."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tasks.cluster import DASK_SETTINGS
from tasks.errors import RefusedError
from tasks.tls import dask_environment

LOCAL_HOST = "127.0.0.1"
PORT = 8786


@dataclass(frozen=True)
class SchedulerSpec:
    """The process that is the scheduler."""

    command: tuple[str, ...]
    environment: dict[str, str]


def scheduler_spec(host: str, port: int, tls_dir: Path | None) -> SchedulerSpec:
    """How a scheduler is started.

    Args:
        host: Address on which it listens.
        port: Its port.
        tls_dir: The setting; without it only this machine can be served.

    Raises:
        RefusedError: If it would listen to other machines without asking who they are.
    """
    if tls_dir is None and not is_this_machine(host):
        raise RefusedError(
            f"a scheduler on {host} would run whatever anybody sends it; make certificates with"
            f" `scail certificates DIR` and name the folder in SCAIL_TLS_DIR, or listen on {LOCAL_HOST}"
        )
    protocol = "tls" if tls_dir else "tcp"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", f"{protocol}://{host}"]
    command += ["--port", str(port), "--no-dashboard"]
    command += ["--dashboard-address", f"{LOCAL_HOST}:0"]  # without a dashboard there is still a page of figures
    own = dask_environment(tls_dir) if tls_dir else {}
    preload = {"DASK_DISTRIBUTED__SCHEDULER__PRELOAD": '["tasks.thrift"]'}
    return SchedulerSpec(tuple(command), DASK_SETTINGS | preload | os.environ | own)


def become(spec: SchedulerSpec) -> NoReturn:
    """Turn this process into the scheduler, so that signals and exit codes are its own."""
    os.execve(spec.command[0], spec.command, spec.environment)


def is_this_machine(host: str) -> bool:
    """Whether what listens on `host` is reached by this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
