"""Which failure is tried again, where and how often. The one place that decides it.

bad input, wrong checkpoint      never: the same bytes fail the same way
storage that may recover         three attempts in all, with backoff and jitter; what was rendered is kept
everything else                  never: after a fault of the device only a fresh process helps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.storage import StorageError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

MAX_ATTEMPTS = 3
RETRY_DELAYS_SECONDS = [2.0, 8.0]  # before the second and the third attempt; Prefect adds the jitter
RETRY_JITTER = 0.5


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, StorageError) and error.transient


def retry_if_transient(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's `retry_condition_fn`: asks `is_transient` about what the task raised."""
    return isinstance(state.data, BaseException) and is_transient(state.data)


class RefusedError(Exception):
    """The run was refused before anything was rendered; `lines` says all that is wrong, one line each."""

    def __init__(self, summary: str, lines: Sequence[str] = ()) -> None:
        super().__init__("\n".join((summary, *(f"  {line}" for line in lines))))
        self.lines = tuple(lines)
