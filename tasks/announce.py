"""A Dask preload that says on stdout when the worker is ready; whoever started `scail worker` can wait for the line."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Worker

_announcements: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to a task


async def dask_setup(worker: Worker) -> None:
    _announcements.add(asyncio.create_task(_announce(worker)))


async def _announce(worker: Worker) -> None:
    from distributed import Status

    while worker.status is not Status.running:  # preloads run before the worker registers
        await asyncio.sleep(0.05)
    sys.stdout.write(f"ready {worker.name} {worker.address}\n")
    sys.stdout.flush()
