"""Whose turn it is in this process: one clip prepares, one is on the GPU, any number encode and publish.

A worker has two threads. While one clip computes, the next one is fetched and decoded and then waits; when the GPU
becomes free it goes on, and the clip before it is encoded and published. A clip gives up its place among those that
prepare only when it has the GPU, so clips compute in the order in which they came.
"""

from __future__ import annotations

import threading
from types import TracebackType

_preparing = threading.Lock()
_computing = threading.Lock()


class Turn:
    """One clip's way through the process; to be used in a `with`, which begins the preparation."""

    def __init__(self) -> None:
        self._held: threading.Lock | None = None

    def __enter__(self) -> Turn:
        _preparing.acquire()
        self._held = _preparing
        return self

    def compute(self) -> None:
        """Wait for the GPU and take it."""
        self._pass_on_to(_computing)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pass_on_to(None)

    def _pass_on_to(self, lock: threading.Lock | None) -> None:
        if lock is not None:
            lock.acquire()
        held, self._held = self._held, lock
        if held is not None:
            held.release()
