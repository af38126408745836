"""Who renders a clip, who has tried before, and when it is given up.

OUTPUT/attempts/<key>/<number>.json is one start of a clip. It is created by exactly one worker, which thereby owns
the clip; rewritten every few seconds while that worker lives; and ended with an outcome. From these records alone
follows what everybody has to know:

- The last one has no outcome and is fresh: its worker is at it. Another run waits for the done record. The same run
  asks only because its scheduler took that worker for dead, and goes ahead.
- A higher number exists: whoever holds a lower one has lost the clip, and stops at the next step.
- `max_starts` starts in a row took their worker with them at the same step: the clip is poison, and its row fails.
  A death at an earlier step than another start has reached is not held against the clip, which has been past that
  step alive: a clip that kills does so at one place, what kills workers from outside strikes at any. After twice as
  many deaths it is given up wherever they were. Nor is one held against it that came when it had left the GPU: that
  was the next clip's, which may be what killed.

Ages are judged by the clocks of two machines; with clocks more than `claim_seconds` apart a clip may be rendered
twice, and is then published twice, but never lost.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import takewhile

from pydantic import ValidationError

from tasks import storage
from tasks.errors import (
    ClaimLostError,
    DeviceFaultError,
    RenderedElsewhereError,
    RunCancelledError,
    TooManyStartsError,
    WorkerClosingError,
    raise_again,
)
from tasks.jobs import Attempt, AttemptStage
from tasks.settings import Settings
from tasks.storage import StorageError, StoragePolicy

logger = logging.getLogger(__name__)

PUBLISHED = "published"
_STAGES = tuple(AttemptStage)
_BEYOND_THE_GPU = frozenset({AttemptStage.ENCODING, AttemptStage.PUBLISHING})
_LEAVES = frozenset({"Abort"})  # Prefect's, by name: processes that only plan do not import it
MAX_LOST = 10  # starts whose worker died, at whatever stage; most of them will have died of something else
CLOSING_LOOK_SECONDS = 1.0  # a worker that was told to end, and may be killed any moment, puts that on record soon
LOOKS_PER_CLAIM = 6  # so often a worker says that it is alive before others may think that it is not
NEWS_PER_LOOK = 4  # at most so often it says in between how far it has come; stores take one write a second

worker_closing = threading.Event()  # set when this process was told to end; clips stop at their next step
stopped_runs: set[str] = set()  # whose clips stop at their next step; told to this process, others find the mark


class OpenAttempt:
    """A start that is going on in this process."""

    def __init__(
        self, record: Attempt, earlier: Sequence[Attempt], output_uri: str, key: str, settings: Settings
    ) -> None:
        self.earlier = tuple(earlier)
        self._record = record
        self._output_uri, self._key = output_uri, key
        self._policy: StoragePolicy = settings.storage_policy()
        self._interval_seconds = settings.claim_seconds / LOOKS_PER_CLAIM
        self._writing = threading.Lock()
        self._steps = 0
        self._ended = threading.Event()
        self._news = threading.Event()
        self._stopped_by: Exception | None = None

    def follows(self, kind: type[Exception]) -> bool:
        """Whether the last start of this clip ended with such an error."""
        return bool(self.earlier) and self.earlier[-1].outcome == kind.__name__

    @property
    def log(self) -> tuple[Attempt, ...]:
        """Every start of the clip, this one last, as it stands when the clip is published."""
        return (*self.earlier, self._record.model_copy(update={"outcome": PUBLISHED} | self._state()))

    def enter(self, stage: AttemptStage) -> None:
        """Put the stage on record before it begins: if the worker dies in it, that will have been the place."""
        self.check(finishing=stage in _BEYOND_THE_GPU)
        self._write(stage=stage)

    def reached(self, steps: int) -> None:
        """So many denoising steps are behind the clip; goes on record in a moment. Costs nothing."""
        self._steps = steps
        self._news.set()

    def confirm(self) -> None:
        """Ask the store whether the clip is still ours; stop if it is not."""
        self.look()
        self.check(finishing=True)

    def check(self, *, finishing: bool = False) -> None:
        """Stop if this worker is to end, or has lost the clip, or the run was cancelled. Costs nothing.

        Args:
            finishing: What is left of the clip takes seconds, so that a worker which is to end may do it.

        Raises:
            Interrupted: One of its kinds in `tasks/errors.py`.
        """
        if self._record.run_id in stopped_runs:
            raise RunCancelledError("the run was stopped")
        if worker_closing.is_set() and not finishing:
            raise WorkerClosingError("the worker was told to end")
        if self._stopped_by:
            raise self._stopped_by

    def look(self) -> None:
        """Ask the store whether this attempt is still wanted."""
        if storage.exists(_record_uri(self._output_uri, self._key, self._record.number + 1), policy=self._policy):
            self._stopped_by = ClaimLostError(f"{self._record.worker} was taken for dead; another worker has the clip")
        elif storage.exists(cancel_uri(self._output_uri, self._record.run_id), policy=self._policy):
            self._stopped_by = RunCancelledError("the run was stopped")

    @contextmanager
    def alive(self) -> Iterator[None]:
        """While open, the record says so every few seconds."""
        pulse = threading.Thread(target=self._pulse, name=f"attempt-{self._key}", daemon=True)
        pulse.start()
        try:
            yield
        finally:
            self._stop_pulse()

    def end(self, outcome: str, message: str | None = None) -> None:
        """Put the outcome on record. If that fails, the clip is not the worse for it: what counts is done/."""
        self._stop_pulse()
        try:
            self._write(outcome=outcome, message=message)
        except StorageError as error:
            logger.warning("attempt %d of %s ended unrecorded: %s", self._record.number, self._key, error)

    def _stop_pulse(self) -> None:
        self._ended.set()
        self._news.set()

    def _pulse(self) -> None:
        while not self._ended.wait(self._interval_seconds / NEWS_PER_LOOK):
            self._wait_for_news()
            if self._ended.is_set():
                return
            try:
                self.look()
                self._write()
            except StorageError as error:
                logger.warning("attempt %d of %s goes on unrecorded: %s", self._record.number, self._key, error)

    def _wait_for_news(self) -> None:
        """Returns when a step was made, this worker was told to end, or it is time to say that it is alive."""
        deadline = time.monotonic() + self._interval_seconds
        while not self._news.wait(min(self._interval_seconds, CLOSING_LOOK_SECONDS)) and time.monotonic() < deadline:
            if worker_closing.is_set() and not self._record.told_to_end:
                break
        self._news.clear()

    def _state(self) -> dict[str, object]:
        return {"seen_at": _now(), "steps": self._steps, "told_to_end": worker_closing.is_set()}

    def _write(self, **changes: object) -> None:
        with self._writing:
            if self._ended.is_set() and "outcome" not in changes:
                return
            self._record = self._record.model_copy(update=self._state() | changes)
            uri = _record_uri(self._output_uri, self._key, self._record.number)
            storage.publish_bytes(uri, self._record.model_dump_json().encode(), policy=self._policy)


@contextmanager
def open_attempt(output_uri: str, key: str, *, run_id: str, settings: Settings) -> Iterator[OpenAttempt]:
    """Own a clip for as long as the context is open.

    Raises:
        RenderedElsewhereError: If another run's worker is at it.
        TooManyStartsError: If it has taken too many workers with it.
        InvalidInputError: If it was tried in this run and its input was bad.
    """
    earlier = read_attempts(output_uri, key, policy=settings.storage_policy())
    last = earlier[-1] if earlier else None
    if last and last.run_id != run_id and _is_alive(last, settings.claim_seconds):
        raise RenderedElsewhereError(f"run {last.run_id} renders this clip on {last.worker}")
    if last and last.run_id == run_id and last.outcome:
        raise_again(last.outcome, last.message or "")
    now = _now()
    record = Attempt(
        number=last.number + 1 if last else 1, run_id=run_id, worker=worker_name(), started_at=now, seen_at=now
    )
    uri = _record_uri(output_uri, key, record.number)
    if not storage.create(uri, record.model_dump_json().encode(), policy=settings.storage_policy()):
        raise RenderedElsewhereError("another worker was a moment faster")
    attempt = OpenAttempt(record, earlier, output_uri, key, settings)
    try:
        _refuse_poison(earlier, settings.max_starts)
        with attempt.alive():
            yield attempt
    except BaseException as error:
        attempt.end(type(error).__name__, str(error))
        raise
    attempt.end(PUBLISHED)


def read_attempts(output_uri: str, key: str, *, policy: StoragePolicy) -> list[Attempt]:
    """Every start of a clip, in order."""
    attempts = []
    for uri in storage.list_files(storage.join(output_uri, "attempts", key), policy=policy):
        try:
            attempts.append(Attempt.model_validate_json(storage.read_bytes(uri, policy=policy)))
        except ValidationError as error:
            logger.warning("%s is not ours or is damaged: %s", uri, error)
    return sorted(attempts, key=lambda attempt: attempt.number)


@contextmanager
def cancelling_on_exit(
    output_uri: str, run_id: str, *, policy: StoragePolicy, tell: Callable[[str], None]
) -> Iterator[None]:
    """If the run is stopped inside, by a signal or a cancellation, its clips stop at their next step.

    If another process goes on with it, they are that one's to wait for.

    Args:
        output_uri: The folder of all clips.
        run_id: Whose clips they are.
        policy: For the mark that workers find which cannot be told.
        tell: Tells workers directly: `cluster.stop_clips`.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, RunCancelledError) or not (
            isinstance(error, Exception) or type(error).__name__ in _LEAVES
        ):
            tell(run_id)
            with suppress(StorageError):
                storage.publish_bytes(cancel_uri(output_uri, run_id), b"", policy=policy)
        raise


def cancel_uri(output_uri: str, run_id: str) -> str:
    """Whoever writes this file stops a run's clips."""
    return storage.join(output_uri, "cancelled", run_id)


def stop_run(run_id: str) -> None:
    """Have a run's clips in this process stop at their next step. A function, since a set would travel as a copy."""
    stopped_runs.add(run_id)


def worker_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _refuse_poison(earlier: Sequence[Attempt], max_starts: int) -> None:
    deadly = list(takewhile(_was_deadly, reversed(earlier)))
    computing = [attempt for attempt in deadly if attempt.stage is AttemptStage.COMPUTING]
    furthest = max(map(_place, deadly), default=None)
    blamed = [attempt for attempt in computing if _place(attempt) == furthest]
    if len(blamed) < max_starts and len(computing) < 2 * max_starts and len(deadly) < MAX_LOST:
        return
    where = ", ".join(f"{attempt.worker} ({attempt.stage}, step {attempt.steps})" for attempt in reversed(deadly))
    raise TooManyStartsError(
        f"{len(deadly)} workers in a row ended while they had this clip, so it is given to no other: {where}. "
        "If something else ended them, render the row again as it is: another run counts anew."
    )


def _place(attempt: Attempt) -> tuple[int, int]:
    """How far a start had come; greater is further."""
    return _STAGES.index(attempt.stage), attempt.steps


def _was_deadly(attempt: Attempt) -> bool:
    return attempt.outcome in {None, DeviceFaultError.__name__} and not attempt.told_to_end


def _is_alive(attempt: Attempt, claim_seconds: float) -> bool:
    silent = datetime.now(UTC) - datetime.fromisoformat(attempt.seen_at)
    return attempt.outcome is None and silent.total_seconds() < claim_seconds


def _record_uri(output_uri: str, key: str, number: int) -> str:
    return storage.join(output_uri, "attempts", key, f"{number}.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
