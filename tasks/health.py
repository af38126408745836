"""Does a service of a cluster do its work? Asked every half minute by whatever supervises it."""

from __future__ import annotations

import socket
from enum import StrEnum
from pathlib import Path
from typing import Any

from tasks.checkpoint import inspect_checkpoint
from tasks.cluster import check_address, connection_arguments
from tasks.doctor import prefect_api
from tasks.errors import RefusedError
from tasks.settings import Settings

TIMEOUT_SECONDS = 5


class Service(StrEnum):
    SERVER = "server"  # Prefect's API answers; for the server and for whoever needs it
    SCHEDULER = "scheduler"  # the Dask scheduler answers
    WORKER = "worker"  # a worker of this machine is registered: its model is loaded
    CHECKPOINT = "checkpoint"  # the model's files are there and fit together


def check_health(service: Service, address: str) -> str:
    """What a healthy service says of itself.

    Args:
        service: Which one.
        address: The scheduler's; a server's is PREFECT_API_URL.

    Raises:
        RefusedError: If it is not healthy, or the question makes no sense.
    """
    if service is Service.SERVER:
        return _server()
    if service is Service.CHECKPOINT:
        model = inspect_checkpoint(Settings().checkpoint)
        return f"{model.path}: {model.name}, fingerprint {model.fingerprint}"
    check_address(address)
    workers = _workers(address, Settings().tls_dir)
    if service is Service.SCHEDULER:
        return f"{address} answers; {len(workers)} workers"
    ours = [name for name in workers if name.startswith(f"{socket.gethostname()}-")]
    if not ours:
        raise RefusedError(f"no worker of {socket.gethostname()} is registered at {address}; it may be loading")
    return f"registered at {address}: {', '.join(ours)}"


def _server() -> str:
    try:
        return prefect_api()
    except Exception as error:
        raise RefusedError(f"the Prefect API does not answer: {type(error).__name__}: {error}") from error


def _workers(address: str, tls_dir: Path | None) -> list[str]:
    """Names of the workers that a scheduler knows."""
    from distributed import Client

    arguments: dict[str, Any] = connection_arguments(address, tls_dir)
    try:
        with Client(address, set_as_default=False, **(arguments | {"timeout": TIMEOUT_SECONDS})) as client:
            return [str(worker["name"]) for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    except (OSError, TimeoutError) as error:
        raise RefusedError(f"no Dask scheduler answers at {address}: {error}") from error
