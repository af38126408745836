"""A process that lives for days gives back what it no longer uses.

Left alone, the processes of a long run grow though nobody leaks:

- Python looks for cycles among old objects only when their number has grown by a quarter, and after our imports there
  are half a million: the remains of a dead worker, its connections and tasks, stay for hours. Frozen, what is there for
  good is not looked through again. What is left costs a millisecond, so it is looked through six times as often.
- malloc gives back the top of its heap above a threshold, which it raises to twice the largest block ever freed.
- malloc gives every thread a heap of its own, up to eight per core, and each keeps what it once needed.

Measured over 30 killed workers: a scheduler grew by 130 KiB with each, and so treated by 50, most of which the next
collection finds.
Also a Dask preload, for schedulers.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Scheduler

# mallopt's names for what it sets, in glibc's malloc.h
_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8
TRIM_THRESHOLD_BYTES = 2**16  # as Dask's nannies have it
MAX_ARENAS = 2
COLLECT_AFTER = (700, 5, 1)  # new objects; collections of the youngest; of these two
IMPORTING = 20_000  # new objects


def begin() -> None:
    """To be called before the imports: all they make stays, and to look through it took a seventh of a start."""
    gc.set_threshold(IMPORTING)


def settle() -> None:
    """To be called when the process has what it will keep: its imports, its model. Once is enough."""
    if _has_settled():
        return
    with suppress(AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        mallopt(_M_ARENA_MAX, MAX_ARENAS)
    collect_all()
    gc.freeze()
    gc.collect()  # from what this finds, nothing, the collector reckons when it has to look again
    gc.set_threshold(*COLLECT_AFTER)


def keep() -> None:
    """To be called when a process that has settled got something more that it will keep: a model, and its imports.

    Otherwise each `tidy` looks through it, which takes a fifth of a second.
    """
    if _has_settled():
        gc.collect()
        gc.freeze()


def tidy() -> None:
    """Between two clips: find what refers only to itself, and give back pages that are free, wherever they are.

    While Prefect's server is away, what is left of each try to reach it holds a megabyte of certificates that Python's
    collector does not see. Nothing in a process that has not settled, where it would take a second.
    """
    if _has_settled():
        gc.collect()
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def collect_all() -> None:
    """Free what only refers to itself, also among what was there when the process settled."""
    gc.unfreeze()
    gc.collect()
    if _has_settled():
        gc.freeze()


def _has_settled() -> bool:
    """By the thresholds: a few hundred frozen objects are there when Python 3.12 starts."""
    return gc.get_threshold() == COLLECT_AFTER


def dask_setup(_scheduler: Scheduler) -> None:
    import tasks.render  # noqa: F401  the first task brings it along, with all of Prefect, and would come too late

    settle()
