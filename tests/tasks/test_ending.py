"""A nanny's part in the end of its worker's process; the rest needs a cluster and is in tests/chaos."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tasks import ending

POLITE = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(1, flush=True)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"


class Child:
    """A real process, seen as a nanny sees its own."""

    def __init__(self, program: str) -> None:
        command = [sys.executable, "-c", f"{program}; time.sleep(60)"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.process.stdout.readline()
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None


def seconds_to_tear_down(child: Child | None) -> float:
    nanny = SimpleNamespace(process=SimpleNamespace(process=child) if child else None)
    start = time.monotonic()
    asyncio.run(ending.dask_teardown(nanny))
    return time.monotonic() - start


def test_a_process_that_ends_when_it_is_told_is_waited_for():
    child = Child(POLITE)

    seconds_to_tear_down(child)

    assert child.process.wait(10) == 0


def test_a_process_that_does_not_listen_is_killed_in_time(monkeypatch):
    monkeypatch.setattr(ending, "PROCESS_SECONDS", 0.5)
    child = Child(DEAF)

    seconds = seconds_to_tear_down(child)

    assert child.process.wait(10) == -9
    assert seconds == pytest.approx(0.5, abs=2.0)


def test_a_nanny_without_a_process_has_nothing_to_wait_for():
    gone = Child(POLITE)
    gone.process.kill()
    gone.process.wait()

    assert seconds_to_tear_down(gone) < 1
    assert seconds_to_tear_down(None) < 1


def test_clips_their_process_and_its_nanny_end_within_the_time_of_a_machine_that_is_taken_away():
    from tasks.worker import GRACE_SECONDS

    ends = ending.CLIPS_SECONDS + ending.READ_SECONDS, ending.PROCESS_SECONDS, GRACE_SECONDS, 25.0
    assert list(ends) == sorted(ends)
