"""Ends this process when a stage of a clip takes longer than it may.

A hang in native code cannot be interrupted from within, and while it holds the interpreter's lock no thread of ours
runs. So a second process is told when a stage begins and by when it must have ended, and kills the first one when
it has not. It ends by itself when the process that it watches does. The file is also that process's program, and
imports nothing that starts slowly.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_watchdog: subprocess.Popen[bytes] | None = None  # started by tasks/preload.py, in Dask workers alone


def start() -> None:
    """Have this process watched from now on. Where nobody would start it again, it is better left alone."""
    global _watchdog  # noqa: PLW0603  one process, one watchdog
    command = [sys.executable, "-P", str(Path(__file__)), str(os.getpid())]
    _watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """What runs inside ends within so many seconds, or this process is killed, if it is watched."""
    token = uuid.uuid4().hex
    _tell(f"{token} {seconds}\n")
    try:
        yield
    finally:
        _tell(f"{token}\n")


def _tell(line: str) -> None:
    if _watchdog and _watchdog.stdin:
        with suppress(BrokenPipeError):  # a watchdog that was killed protects no longer, but harms no clip
            os.write(_watchdog.stdin.fileno(), line.encode())


def watch(pid: int, descriptor: int) -> None:
    """Read what begins and ends from `descriptor`; kill `pid` when something has not ended in time."""
    deadlines: dict[str, float] = {}
    rest = b""
    while True:
        timeout = max(0.0, min(deadlines.values()) - time.monotonic()) if deadlines else None
        if select.select([descriptor], [], [], timeout)[0]:
            data = os.read(descriptor, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                token, _, seconds = line.decode().partition(" ")
                if seconds:
                    deadlines[token] = time.monotonic() + float(seconds)
                else:
                    deadlines.pop(token, None)
        elif os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)
            return
        else:
            return


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.stdin.fileno())
