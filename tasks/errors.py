"""Which failure is tried again, where and how often. The one place that decides it.

what happened                        where             attempts
bad input, wrong checkpoint          nowhere           1    the same bytes fail the same way
storage that may recover             the same worker   3    backoff and jitter; what was rendered is kept
no room in scratch                   the same worker   3    other clips end meanwhile and free theirs
out of GPU memory                    the same worker   4    all freed; then under cheaper memory policies
not finite, or black                 the same worker   2    the second time on the exact path
a fault of the GPU                   another worker    -    the process replaces itself: its CUDA context is lost
a worker lost, stopped, superseded   another worker    -
no Prefect server for a fresh one    another worker    -    or the same, later
everything else                      nowhere           1    a bug of ours does not go away

Where no number is given, the clip's own starts are counted (tasks/attempts.py): after `max_starts` workers that died
of it, its row fails with TooManyStartsError.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from scail.errors import GenerationError, Interrupted, InvalidInputError, OutOfMemoryError
from tasks.storage import StorageError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

MAX_ATTEMPTS = 3
MAX_MEMORY_ATTEMPTS = 4  # as it was, freed, and the two cheaper policies
RETRY_DELAYS_SECONDS = [2.0, 8.0, 8.0]  # before the second attempt, the third, …; Prefect adds the jitter
RETRY_JITTER = 0.5

_LOST_WORKER = frozenset(
    {"KilledWorker", "NoValidWorkerError", "FutureCancelledError", "CommClosedError", "CrashedRun"}
)


_NO_SERVER = "Failed to reach API at"  # a RuntimeError of Prefect's, before a task of a fresh process begins


class RefusedError(Exception):
    """The run was refused before anything was rendered; `lines` says all that is wrong, one line each."""

    def __init__(self, summary: str, lines: Sequence[str] = ()) -> None:
        super().__init__("\n".join((summary, *(f"  {line}" for line in lines))))
        self.lines = tuple(lines)


class RenderedElsewhereError(Exception):
    """Another run renders this clip at this moment; its done record is what to wait for."""


class TooManyStartsError(Exception):
    """So many workers died while they rendered this clip that it is not given to another one."""


class ScratchFullError(Exception):
    """This machine's scratch folder has no room for a clip."""


class DeviceFaultError(Exception):
    """The GPU failed; whatever this process asks of it from now on fails too."""


class WorkerClosingError(Interrupted):
    """The worker was told to end, and left the clip between two steps."""


class ClaimLostError(Interrupted):
    """This worker was taken for dead, and the clip was given to another one."""


class RunCancelledError(Interrupted):
    """The run was stopped while this clip was rendered."""


class ClusterLostError(Exception):
    """The Dask scheduler went away and did not come back."""


class Where(StrEnum):
    NOWHERE = "nowhere"
    SAME_WORKER = "the same worker"
    ANOTHER_WORKER = "another worker"


@dataclass(frozen=True)
class Policy:
    """Where a failed clip is tried again; `max_attempts`, the first one included, counts on the same worker."""

    where: Where
    max_attempts: int = 1


def policy_for(error: BaseException) -> Policy:
    """The table at the top, in code."""
    match error:
        case StorageError(transient=True) | ScratchFullError():
            return Policy(Where.SAME_WORKER, MAX_ATTEMPTS)
        case OutOfMemoryError():
            return Policy(Where.SAME_WORKER, MAX_MEMORY_ATTEMPTS)
        case GenerationError():
            return Policy(Where.SAME_WORKER, 2)
        case RunCancelledError():
            return Policy(Where.NOWHERE)
        case DeviceFaultError() | Interrupted() | asyncio.CancelledError() | concurrent.futures.CancelledError():
            return Policy(Where.ANOTHER_WORKER)
    lost = type(error).__name__ in _LOST_WORKER or str(error).startswith(_NO_SERVER)  # by name: Dask may be absent
    return Policy(Where.ANOTHER_WORKER if lost else Where.NOWHERE)


def retry_here(_task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's `retry_condition_fn`; its retries stay in the worker's process."""
    if not isinstance(state.data, BaseException):
        return False
    policy = policy_for(state.data)
    return policy.where is Where.SAME_WORKER and task_run.run_count < policy.max_attempts


def keeps_rendered_clip(error: BaseException) -> bool:
    """Whether what is in scratch will be of use to the next attempt on this machine."""
    return isinstance(error, StorageError) and error.transient


def raise_again(class_name: str, message: str) -> None:
    """What an earlier attempt in the same run ended with, if another one would end the same way."""
    for kind in (InvalidInputError, TooManyStartsError):
        if kind.__name__ == class_name:
            raise kind(message)


@contextmanager
def device_faults_named() -> Iterator[None]:
    """Errors of the CUDA runtime come out as DeviceFaultError; torch knows them by a class only since 2.8."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "out of memory" in text or "_STATUS_ALLOC_FAILED" in text:  # cuBLAS and cuDNN say it in their own words
            raise OutOfMemoryError(text) from error
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in text:
            raise DeviceFaultError(text) from error
        raise
