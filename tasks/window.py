"""Clips on their way through the workers: never more than they can take, and each until it has a result.

A future is dropped as soon as it was read. Dask computes anew whatever a dead worker had finished and a live future
still refers to, so a run that kept its futures would render finished clips again.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.errors import ClusterLostError, Where, policy_for
from tasks.jobs import ClipJob, ClipResult

logger = logging.getLogger(__name__)

MAX_RESUBMISSIONS = 20  # of one clip whose worker was lost; the clip's own count of starts comes first
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
POLL_SECONDS = 0.05


class Future(Protocol):
    """What the window needs of a Prefect future; `wrapped_future` is Dask's, or a thread's."""

    @property
    def wrapped_future(self) -> Finished: ...
    def result(self) -> ClipResult | None: ...


class Finished(Protocol):
    def done(self) -> bool: ...


@dataclass
class _Entry:
    job: ClipJob
    resubmissions: int = 0
    not_before: float = 0.0


def run_window(
    jobs: Sequence[ClipJob], submit: Callable[[ClipJob], Future], num_slots: Callable[[], int]
) -> Iterator[tuple[ClipJob, ClipResult | Exception]]:
    """What became of each job, as they come.

    A task that answers None found that another run renders its clip: it is asked again later, and other jobs come
    first. One whose worker was lost is submitted again, with longer and longer pauses.

    Args:
        jobs: In the order in which they are to be started.
        submit: Gives one job to the workers.
        num_slots: How many clips they take together at this moment.
    """
    waiting, live = deque(_Entry(job) for job in jobs), dict[Future, _Entry]()
    while waiting or live:
        try:
            for entry in _due(waiting, num_slots() - len(live)):
                live[submit(entry.job)] = entry
        except ClusterLostError as error:
            yield from ((entry.job, error) for entry in (*live.values(), *waiting))
            return
        done = [future for future in live if future.wrapped_future.done()]
        for future in done:
            entry = live.pop(future)
            outcome = _outcome(future)
            if _comes_again(entry, outcome):
                waiting.append(entry)
            else:
                assert outcome is not None
                yield entry.job, outcome
        if not done:
            time.sleep(POLL_SECONDS)


def _due(waiting: deque[_Entry], num_free: int) -> Iterator[_Entry]:
    """Takes out the first entries that may be submitted now."""
    now = time.monotonic()
    for _ in range(len(waiting)):
        if num_free <= 0:
            return
        if waiting[0].not_before <= now:
            num_free -= 1
            yield waiting.popleft()
        else:
            waiting.rotate(-1)


def _outcome(future: Future) -> ClipResult | Exception | None:
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001  what it means is decided by its class, in tasks/errors.py
        return error


def _comes_again(entry: _Entry, outcome: ClipResult | Exception | None) -> bool:
    """Whether the entry is to be submitted again, and if so, when."""
    if isinstance(outcome, ClipResult):
        return False
    if isinstance(outcome, Exception):
        if policy_for(outcome).where is not Where.ANOTHER_WORKER or entry.resubmissions >= MAX_RESUBMISSIONS:
            return False
        logger.warning("%s goes to another worker: %s: %s", entry.job.clip_id, type(outcome).__name__, outcome)
    entry.resubmissions += 1
    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(entry.resubmissions - 1, 10))
    entry.not_before = time.monotonic() + random.uniform(0.5, 1.0) * pause
    return True
