"""A clip's folder on this machine, for one process at a time.

`SCRATCH/<key>.<n>` is locked by the process that works in it; the lock ends with the process, also with a killed
one. The next attempt then finds the same folder, and in it perhaps the rendered clip that only has to be published.
A process that was stopped, and is thought dead while it is not, keeps its lock: the next attempt gets n + 1.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from tasks.errors import ScratchFullError, keeps_rendered_clip

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEFTOVER_SECONDS = 24 * 3600.0


@contextmanager
def clip_scratch(scratch_dir: Path, key: str, *, min_free_bytes: int) -> Iterator[Path]:
    """A folder of this process alone; it is removed unless the next attempt can use what is in it.

    Raises:
        ScratchFullError: If there is less room than a clip may need, before or because something failed.
    """
    scratch_dir.mkdir(parents=True, exist_ok=True)
    _check_room(scratch_dir, min_free_bytes)
    folder, lock = _locked_folder(scratch_dir, key)
    try:
        yield folder
    except BaseException as error:
        full = isinstance(error, Exception) and _free_bytes(scratch_dir) < min_free_bytes
        if not keeps_rendered_clip(error):
            shutil.rmtree(folder, ignore_errors=True)
        if full:
            raise ScratchFullError(f"{scratch_dir} has no room left: {error}") from error
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def sweep_scratch(scratch_dir: Path, older_than_seconds: float = LEFTOVER_SECONDS) -> int:
    """Remove folders of processes that are gone; returns how many. Younger ones may be of use to another attempt."""
    oldest_kept, num_removed = time.time() - older_than_seconds, 0
    for folder in scratch_dir.glob("[0-9a-f]*.[0-9]*") if scratch_dir.is_dir() else ():
        with suppress(OSError):
            if folder.stat().st_mtime > oldest_kept or (lock := _try_lock(folder)) is None:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            num_removed += 1
    return num_removed


def _check_room(scratch_dir: Path, min_free_bytes: int) -> None:
    if _free_bytes(scratch_dir) < min_free_bytes:
        num_removed = sweep_scratch(scratch_dir, older_than_seconds=0.0)
        logger.warning("%s is nearly full; removed %d leftover folders", scratch_dir, num_removed)
    if (free := _free_bytes(scratch_dir)) < min_free_bytes:
        raise ScratchFullError(f"{scratch_dir} has {free} bytes left; a clip is begun with {min_free_bytes} or more")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _locked_folder(scratch_dir: Path, key: str) -> tuple[Path, int]:
    for number in count():
        folder = scratch_dir / f"{key}.{number}"
        folder.mkdir(exist_ok=True)
        if (lock := _try_lock(folder)) is not None:
            return folder, lock
    raise AssertionError("count() does not end")


def _try_lock(folder: Path) -> int | None:
    """A locked file in `folder`, or none if a process works there or has just removed it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None
