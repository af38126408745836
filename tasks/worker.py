"""Long-lived Dask workers of this machine, one process per GPU, each started again whenever it ends.

    scail worker → per GPU: dask worker (the nanny) → the process with the model

The nanny starts a process that died anew; we start a nanny that ended anew, also one that ended without an error:
that is what it does when its scheduler goes away.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tasks.checkpoint_cache import absolute
from tasks.cluster import DASK_SETTINGS, THREADS_PER_WORKER, check_address, check_encryption
from tasks.errors import RefusedError
from tasks.tls import dask_environment

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a worker that lived so long is started again at once
GRACE_SECONDS = 24.0  # for clips in flight to end (tasks/ending.py), before what is left is killed

FAULT_EXIT_CODE = 77
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost"})


@dataclass(frozen=True)
class WorkerSpec:
    """One worker: its name in the cluster and what its process finds in its environment."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


def worker_specs(
    scheduler: str,
    *,
    checkpoint: str,
    gpus: list[str],
    tls_dir: Path | None = None,
    port: int | None = None,
    contact_address: str | None = None,
) -> list[WorkerSpec]:
    """A worker for each GPU; one without a GPU where there is none.

    Args:
        scheduler: Its address.
        checkpoint: A folder on this machine.
        gpus: From `visible_gpus`.
        tls_dir: The setting.
        port: On which a worker listens; any free one if absent. For machines whose ports are mapped one by one.
        contact_address: At which the scheduler reaches that port.

    Raises:
        RefusedError: If the address and the certificates do not go together, or several GPUs would share a port.
    """
    check_encryption(scheduler, tls_dir)
    listening = _listening(scheduler, port, contact_address, len(gpus))
    preloads = {
        "DASK_DISTRIBUTED__WORKER__PRELOAD": '["tasks.preload", "tasks.announce"]',
        "DASK_DISTRIBUTED__NANNY__PRELOAD": '["tasks.ending"]',
    }
    environment = DASK_SETTINGS | preloads | os.environ | {"SCAIL_CHECKPOINT": absolute(checkpoint)}
    if tls_dir:
        environment |= dask_environment(tls_dir)
    specs = []
    for gpu in gpus or [""]:
        name = f"{socket.gethostname()}-{os.getpid()}" + (f"-gpu{gpu}" if gpu else "")
        own = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        specs.append(WorkerSpec(name, (*_dask_worker(scheduler, name), *listening), environment | own))
    return specs


def _listening(scheduler: str, port: int | None, contact_address: str | None, num_gpus: int) -> list[str]:
    if contact_address is not None:
        check_address(contact_address)
        if port is None:
            raise RefusedError(f"{contact_address} leads to some port of this machine; name it with --port")
    if port is not None and num_gpus > 1:
        raise RefusedError(f"{num_gpus} GPUs and one port: start a worker for each, with its own CUDA_VISIBLE_DEVICES")
    if contact_address is None:
        # A scheduler that only this machine reaches: so are its workers.
        options = ["--host", "127.0.0.1"] if _host(scheduler) in LOCAL_HOSTS else []
        return options + (["--worker-port", str(port)] if port else [])
    own_host = "127.0.0.1" if _host(contact_address) in LOCAL_HOSTS else "0.0.0.0"  # encrypted, where it is not local
    scheme = urlsplit(contact_address).scheme
    return ["--listen-address", f"{scheme}://{own_host}:{port}", "--contact-address", contact_address]


def _dask_worker(scheduler: str, name: str) -> list[str]:
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--name", name]
    command += ["--nworkers", "1", "--nthreads", str(THREADS_PER_WORKER), "--nanny", "--memory-limit", "0"]
    command += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]  # a page of figures is there all the same
    return command


def keep_workers(scheduler: str, specs: list[WorkerSpec], *, say: Callable[[str], None]) -> None:
    """Keep a process for each spec alive until this one is told to end; then end them."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    keepers = [threading.Thread(target=_keep, args=(scheduler, spec, stopping, say)) for spec in specs]
    for keeper in keepers:
        keeper.start()
    while any(keeper.is_alive() for keeper in keepers):
        time.sleep(0.2)


def _keep(scheduler: str, spec: WorkerSpec, stopping: threading.Event, say: Callable[[str], None]) -> None:
    pause = 1.0
    while _wait_for(scheduler, stopping, say):
        started_at = time.monotonic()
        process = subprocess.Popen(
            spec.command,
            env=dict(spec.environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for us: a nanny that hears a second signal dies of it
        )
        while process.poll() is None:
            if stopping.wait(0.2):
                _end(process)
                return
        pause = 1.0 if time.monotonic() - started_at > STEADY_SECONDS else min(pause * 2, LONGEST_PAUSE_SECONDS)
        say(f"{spec.name} ended with {process.returncode}; starting it again in {pause:.0f} s")
        stopping.wait(pause)


def _wait_for(scheduler: str, stopping: threading.Event, say: Callable[[str], None]) -> bool:
    """True once the scheduler answers: before that, no worker loads a model. False when we are to end."""
    said = False
    while not stopping.is_set():
        try:
            with socket.create_connection((_host(scheduler), _port(scheduler)), timeout=5):
                return True
        except OSError as error:
            if not said:
                say(f"waiting for the scheduler at {scheduler}: {error}")
            said = True
            stopping.wait(1.0)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _host(address: str) -> str:
    return urlsplit(address).hostname or ""


def _port(address: str) -> int:
    port = urlsplit(address).port
    assert port is not None, address
    return port


def in_dask_worker() -> bool:
    """Whether this process is a Dask worker's: then its nanny starts another when it ends."""
    if "distributed" not in sys.modules:
        return False
    from distributed import get_worker

    try:
        get_worker()
    except ValueError:
        return False
    return True


def replace_process() -> None:
    """End this process at once, so that its nanny starts a fresh one; whatever it had in hand goes elsewhere."""
    logger.error("this process cannot use its GPU any more and is replaced")
    logging.shutdown()
    os._exit(FAULT_EXIT_CODE)
