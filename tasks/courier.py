"""Something delivered from a thread of its own, so that whoever sends it neither waits nor fails."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class Courier(Generic[Item]):
    """Delivers items one by one from a thread of its own; the oldest make way when too many wait.

    The thread is a daemon: one that hangs in a library's call never keeps the process from ending.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[Item], None],
        *,
        max_waiting: int,
        pause_seconds: float = 0.0,
        repeat_seconds: float | None = None,
    ) -> None:
        self._name = name
        self._deliver = deliver
        self._pause_seconds = pause_seconds
        self._repeat_seconds = repeat_seconds
        self._waiting: deque[Item] = deque(maxlen=max_waiting)
        self._changed = threading.Condition()
        self._is_closing = False
        self._given_up = threading.Event()
        self._is_failing = False
        self.num_dropped = 0  # items that made way for newer ones
        self._thread: threading.Thread | None = None

    def send(self, item: Item) -> None:
        with self._changed:
            if self._is_closing:
                return
            self.num_dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(item)
            self._changed.notify()
            if self._thread is None:
                # Prefect keeps the address of a temporary server in a context variable.
                run = partial(copy_context().run, self._run)
                self._thread = threading.Thread(target=run, name=self._name, daemon=True)
                self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Take no more, deliver what waits for so long at most, then give up."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is None:
            return
        self._thread.join(timeout_seconds)
        self._given_up.set()
        if self._thread.is_alive():
            logger.warning(
                "%s: not everything was delivered in %.0f s, the rest is dropped", self._name, timeout_seconds
            )

    def is_given_up_after(self, seconds: float) -> bool:
        """Wait; true as soon as there is no more time for another try."""
        return self._given_up.wait(seconds)

    def _run(self) -> None:
        last: Item | None = None
        while not self._given_up.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing, self._repeat_seconds)
                if self._waiting:
                    last = self._waiting.popleft()
                elif self._is_closing:
                    return
            if last is not None:
                self._deliver_one(last)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, self._pause_seconds)

    def _deliver_one(self, item: Item) -> None:
        try:
            self._deliver(item)
        except Exception as error:  # noqa: BLE001  # whatever it is, a run must not suffer from it
            level = logging.DEBUG if self._is_failing else logging.WARNING  # said once, not at every clip
            logger.log(level, "%s: %s", self._name, error)
            self._is_failing = True
        else:
            self._is_failing = False
