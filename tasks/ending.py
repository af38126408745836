"""How a Dask worker ends when its machine is taken away: its clips are finished or given back within 25 seconds.

    SIGTERM → `scail worker` → the nanny → the process with the model

That process takes no more clips. One that is between two denoising steps stops there; one that has its last step
behind it is finished and published, since what is left takes seconds. Both are on record before the process ends,
so that another worker goes on at once and the clip is not blamed. Named to Dask as a preload of nannies too: without
that a nanny gives its process eight seconds, and a step of the largest model takes ten.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Nanny, Worker

logger = logging.getLogger(__name__)

# Each leaves room for the next: clips, their process, its nanny (tasks/worker.py), and 25 s for all.
CLIPS_SECONDS = 18.0
PROCESS_SECONDS = 22.0
READ_SECONDS = 2.0  # for the run to fetch what became of the last clips
POLL_SECONDS = 0.1

_tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to a task


def listen(worker: Worker) -> None:
    """From now on, SIGTERM lets this worker's clips end before the process does."""

    def begin() -> None:
        if not _tasks:
            _tasks.add(asyncio.create_task(_end(worker)))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, begin)


async def _end(worker: Worker) -> None:
    from distributed import Status

    from tasks import attempts

    attempts.worker_closing.set()
    if worker.status is Status.running:
        worker.status = Status.closing_gracefully  # the scheduler hears of it and sends no more clips
    logger.info("told to end: %d clips to finish or give back", worker.state.executing_count)
    deadline = time.monotonic() + CLIPS_SECONDS
    while worker.state.executing_count and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    deadline = min(deadline, time.monotonic() + READ_SECONDS)
    while worker.data and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    await worker.close(nanny=False, executor_wait=False, timeout=1, reason="told to end")


async def dask_teardown(nanny: Nanny) -> None:
    """A nanny that is to end lets its process end first. Dask awaits this before it does anything else."""
    child = nanny.process.process if nanny.process else None
    if child is None or child.pid is None or not child.is_alive():
        return
    pid = child.pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + PROCESS_SECONDS
    while child.is_alive() and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    if child.is_alive():
        logger.warning("process %d did not end in %.0f s and is killed", pid, PROCESS_SECONDS)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
