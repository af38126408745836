"""Where clips are rendered: in this process, in one process per GPU of this machine, or on a Dask cluster."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tasks import attempts
from tasks.checkpoint_cache import absolute
from tasks.errors import ClusterLostError, RefusedError
from tasks.settings import Settings

if TYPE_CHECKING:
    from distributed import Client, SpecCluster
    from prefect.task_runners import TaskRunner

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Submitted = TypeVar("Submitted")

THREADS_PER_WORKER = 2  # one clip on the GPU; the other is prepared, or encoded and published
CLIENT_TIMEOUT_SECONDS = 60
WORKERS_TIMEOUT_SECONDS = 600.0  # until the first one is there; it may be loading the model
SLOTS_VALID_SECONDS = 2.0
TELL_SECONDS = 5.0

# Found by killing schedulers, workers and nannies, and by watching what grows. A setting that is in the environment
# already stays as it is.
DASK_SETTINGS = {
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "50",  # a clip's own count of starts decides, not Dask's blame
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "60s",  # longer than any stretch that holds the interpreter's lock
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0",
    "DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT": "600s",
    "DASK_DISTRIBUTED__SCHEDULER__EVENTS_CLEANUP_DELAY": "60s",  # of a worker that is gone; else an hour
    "DASK_DISTRIBUTED__WORKER__PRELOAD": '["tasks.preload"]',
    # What Dask keeps for its developers: the last 1000 messages with the tasks in them, 40 KiB a clip in the
    # coordinator and 90 in the scheduler; an hour of samples; and a profile of the workers, a sample every 10 ms.
    "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "20",
    "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "100",  # of what is in the log too
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__LOG_LENGTH": "20",
    "DASK_DISTRIBUTED__DIAGNOSTICS__COMPUTATIONS__MAX_HISTORY": "1",
    "DASK_DISTRIBUTED__DIAGNOSTICS__ERRED_TASKS__MAX_HISTORY": "1",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
}

_ADDRESS = re.compile(r"(tcp|tls)://[^/\s]+:\d+")


@dataclass(frozen=True)
class Workers:
    """A `--workers` value, read: `local`, a number of processes, or a scheduler's address."""

    num_processes: int | None = None
    address: str | None = None

    @property
    def are_local(self) -> bool:
        return self.num_processes is None and self.address is None


def parse_workers(text: str) -> Workers:
    """Read a `--workers` value.

    Raises:
        RefusedError: If it is none of the three kinds.
    """
    if text == "local":
        return Workers()
    if text.isdecimal() and int(text) > 0:
        return Workers(num_processes=int(text))
    if _ADDRESS.fullmatch(text):
        return Workers(address=text)
    raise RefusedError(f"workers is {text!r}; expected `local`, a number of processes, or tls://host:port")


def check_address(scheduler: str) -> None:
    """Raises RefusedError if this is no scheduler's address."""
    if not _ADDRESS.fullmatch(scheduler):
        raise RefusedError(f"the scheduler is {scheduler!r}; expected tls://host:port, or tcp:// on this machine")


def check_encryption(address: str, tls_dir: Path | None) -> None:
    """Raises RefusedError if a scheduler's address and this machine's certificates do not go together."""
    if address.startswith("tls://") and tls_dir is None:
        raise RefusedError(f"{address} asks for certificates: name their folder in SCAIL_TLS_DIR")
    if address.startswith("tcp://") and tls_dir is not None:
        raise RefusedError(f"SCAIL_TLS_DIR is set, and {address} is not encrypted; expected tls://host:port")


def connection_arguments(address: str, tls_dir: Path | None) -> dict[str, Any]:
    """What a client needs to know beside a scheduler's address.

    Raises:
        RefusedError: If the address and the certificates do not go together, or these are not all there.
    """
    check_encryption(address, tls_dir)
    if tls_dir is None:
        return {"timeout": CLIENT_TIMEOUT_SECONDS}
    from tasks.tls import client_security

    return {"timeout": CLIENT_TIMEOUT_SECONDS, "security": client_security(tls_dir)}


def task_runner(workers: Workers, checkpoint: str) -> TaskRunner[Any]:
    """Prefect's way to the workers.

    Args:
        workers: From `parse_workers`.
        checkpoint: What processes started here load; workers of a cluster have been told their own.
    """
    if workers.are_local:
        from prefect.task_runners import ThreadPoolTaskRunner

        return cast(Any, ThreadPoolTaskRunner(max_workers=THREADS_PER_WORKER))
    _set_up_dask()
    from prefect_dask import DaskTaskRunner

    if workers.address:
        client_kwargs = connection_arguments(workers.address, Settings().tls_dir)
        return cast(Any, DaskTaskRunner(address=workers.address, client_kwargs=client_kwargs))
    client_kwargs = {"timeout": CLIENT_TIMEOUT_SECONDS}
    settings = {"num_processes": workers.num_processes, "checkpoint": checkpoint}
    runner = DaskTaskRunner(cluster_class=local_cluster, cluster_kwargs=settings, client_kwargs=client_kwargs)
    return cast(Any, runner)


def configured_task_runner() -> TaskRunner[Any]:
    """The way to the workers that the settings name; for a deployment, which has no command line."""
    settings = Settings()
    return task_runner(parse_workers(settings.workers), settings.checkpoint)


def _set_up_dask() -> None:
    """Our settings for this process's client, and for the processes that it may start."""
    import dask.config

    quiet = {"DASK_LOGGING__DISTRIBUTED": "error"}  # this is a command's terminal, not a service's log
    os.environ.update({name: value for name, value in (DASK_SETTINGS | quiet).items() if name not in os.environ})
    dask.config.refresh()
    logging.getLogger("distributed").setLevel(dask.config.get("logging.distributed").upper())


@contextmanager
def local_cluster(num_processes: int, checkpoint: str) -> Iterator[SpecCluster]:
    """A scheduler in this process and worker processes below it, each with a GPU of its own if there are any.

    Raises:
        RefusedError: If there are GPUs, but not so many, or if the workers could not load the model.
    """
    gpus = visible_gpus()
    if gpus and num_processes > len(gpus):
        raise RefusedError(f"{num_processes} workers were asked for; this machine has {len(gpus)} GPUs")
    from distributed import Nanny, Scheduler, SpecCluster

    environment = {"SCAIL_CHECKPOINT": absolute(checkpoint)}
    options = {"nthreads": THREADS_PER_WORKER, "memory_limit": 0, "host": "127.0.0.1", "dashboard": False}
    options["dashboard_address"] = "127.0.0.1:0"  # without a dashboard there is still a page of figures
    specs = {
        index: {
            "cls": Nanny,
            "options": options | {"env": environment | ({"CUDA_VISIBLE_DEVICES": gpus[index]} if gpus else {})},
        }
        for index in range(num_processes)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }
    try:
        with deaf_to_ctrl_c():
            cluster = SpecCluster(workers=specs, scheduler=scheduler, silence_logs=logging.ERROR)
    except RuntimeError as error:
        raise RefusedError(f"the workers could not be started: {error.__cause__ or error}") from error
    with cluster:
        yield cluster


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one entry per GPU; torch is not asked, since that takes seconds."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]


def slots(max_gpus: int | None = None) -> Callable[[], int]:
    """A function that says how many clips the running flow's workers take together at the moment.

    Args:
        max_gpus: Of a cluster's GPUs, those that this flow may hold at a time. So many clips are then under way, each
            on any GPU, which costs the overlap of a clip's rendering with its neighbours' files.

    Raises:
        RefusedError: If there is no scheduler at the address, or no worker comes.
    """
    if renders_here():
        return lambda: THREADS_PER_WORKER
    count = _Slots(_connected_client(_runner())).count
    return count if max_gpus is None else lambda: min(max_gpus, count())


def at_priority(submit: Callable[[Task], Submitted], priority: int) -> Callable[[Task], Submitted]:
    """`submit`, whose tasks a cluster starts before waiting ones of lower priority, other runs' included."""
    if renders_here():
        return submit
    import dask

    def submit_ahead(task: Task) -> Submitted:
        with dask.annotate(priority=priority):
            submitted = submit(task)
        _forget_assets()
        return submitted

    return submit_ahead


def _forget_assets() -> None:
    """Prefect notes until the flow ends which assets each of its tasks makes; ours make none."""
    from prefect.context import FlowRunContext

    if context := FlowRunContext.get():
        context.task_run_assets.clear()


def stop_clips(run_id: str) -> None:
    """Have the running flow's workers stop a run's clips at their next step.

    A worker that this does not reach finds the mark in the store a few seconds later.
    """
    if renders_here():
        attempts.stop_run(run_id)
        return
    client: Client = _runner().client
    tell = partial(client.run, attempts.stop_run, run_id, on_error="ignore")
    messenger = threading.Thread(target=_without_raising, args=(tell,), daemon=True)  # a dead scheduler answers never
    messenger.start()
    messenger.join(TELL_SECONDS)


def _without_raising(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001  there is a second way, and the run is over anyway
        logger.info("the workers could not be told: %s", error)


def renders_here() -> bool:
    """Whether the running flow's clips are rendered in its own process."""
    from prefect.task_runners import ThreadPoolTaskRunner

    return isinstance(_runner(), ThreadPoolTaskRunner)


def _runner() -> Any:
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    assert context is not None, "only a flow has workers"
    return context.task_runner


class _Slots:
    """Threads of all workers of a cluster, asked for every few seconds: workers come and go."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked_at, self._num_slots = float("-inf"), 0

    def count(self) -> int:
        if self._client.status == "closed":
            raise ClusterLostError(f"the Dask scheduler went away and did not come back in {CLIENT_TIMEOUT_SECONDS} s")
        if time.monotonic() - self._asked_at > SLOTS_VALID_SECONDS:
            try:
                threads = self._client.nthreads()
            except (OSError, TimeoutError, ValueError, AttributeError) as error:  # while it connects anew
                logger.info("the scheduler does not answer: %s", error)
                threads = {}
            self._asked_at, self._num_slots = time.monotonic(), max(1, sum(threads.values()))
        return self._num_slots


def _connected_client(runner: Any) -> Client:
    try:
        client: Client = runner.client
        client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_SECONDS)
    except TimeoutError as error:
        raise RefusedError(f"no worker came to {runner.address} in {WORKERS_TIMEOUT_SECONDS:.0f} s") from error
    except OSError as error:
        raise RefusedError(f"no Dask scheduler answers at {runner.address}: {error}") from error
    return client


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside do not get the terminal's Ctrl-C: we end them, once we have said our last word.

    A Prefect server that went with the signal left the flow asking it for two minutes how to record its own end.
    """
    resource_tracker.ensure_running()  # else the first process started inside starts it, which lets the signal in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def shared_prefect_api(workers: Workers) -> Iterator[None]:
    """While open, there is a Prefect server that this process and its worker processes report to.

    Without a configured one, a temporary one is started; processes on this machine are told where it is.

    Raises:
        RefusedError: If machines elsewhere would have no server to report to.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    if workers.address:
        raise RefusedError(f"workers at {workers.address} need a Prefect server: set PREFECT_API_URL here and there")
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    with deaf_to_ctrl_c():
        server.start(timeout=120)
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield
