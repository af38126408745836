"""What happens in a run, told to whoever watches from outside.

    StatusFile   always: OUTPUT/status.json and OUTPUT/runs/<run id>/status.json, replaced at each change
    Webhook      if SCAIL_WEBHOOK_URL is set: one CloudEvent for the run's start, for each clip and for its end; it has
                 a module of its own, and so have the data that both tell (run_status.py)

The flow adds the progress in Prefect's UI (tasks/artifacts.py).

All deliver from a thread of their own, and none can fail or hold up a clip: what cannot be delivered is logged
and dropped. `status.json` is the state, an event only the news of it: who missed one reads the file.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from tasks import storage
from tasks.courier import Courier
from tasks.jobs import ClipResult, ClipStatus
from tasks.plan import Plan
from tasks.report import REPORT
from tasks.results import Summary
from tasks.run_status import MAX_MESSAGE_CHARS, STATUS, Event, EventType, RunState, RunStatus, clip_note
from tasks.settings import Settings
from tasks.storage import DEFAULT_POLICY, StorageError, StoragePolicy
from tasks.webhook import Webhook

logger = logging.getLogger(__name__)

MIN_SECONDS_BETWEEN_WRITES = 1.0  # an object of Google's takes one write a second
HEARTBEAT_SECONDS = 30.0  # a `running` that is much older than this is of a run that was killed
FLUSH_SECONDS = 15.0


class Notifier(Protocol):
    """One way to tell the outside."""

    def notify(self, event: Event) -> None:
        """Take an event; delivering it is not waited for."""

    def close(self, timeout_seconds: float) -> None:
        """Deliver what is waiting, for so long at most."""


class Notifications:
    """What the flow calls. Nothing that goes wrong here is raised.

    with open_notifications(settings, run_id=…, manifest_uri=…, output_uri=…) as notifications:
        notifications.started(plan, rows.invalid)
        …                        notifications.clip(result) for each result
        notifications.finished(summary)

    A block that is left without `finished` tells that the run was stopped.
    """

    def __init__(
        self,
        notifiers: Sequence[Notifier],
        *,
        run_id: str,
        manifest_uri: str,
        output_uri: str,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self._notifiers = tuple(notifiers)
        self._flush_seconds = flush_seconds
        self._start = time.monotonic()
        self._num_awaited = self._num_come = 0
        self._has_started = self._has_finished = False
        now = datetime.now(UTC)
        self._status = RunStatus(
            run_id=run_id,
            state=RunState.RUNNING,
            manifest=storage.redact(manifest_uri),
            output=output_uri,
            started_at=now,
            updated_at=now,
            num_rows=0,
            num_settled=0,
            counts=dict.fromkeys(ClipStatus, 0),
            eta_seconds=None,
            last_clip=None,
            report=None,
        )

    @property
    def status(self) -> RunStatus:
        return self._status

    def started(self, plan: Plan, invalid: Sequence[ClipResult] = ()) -> None:
        """The plan is made: rows that are settled count, the others are awaited."""
        self._start, self._has_started = time.monotonic(), True
        self._num_awaited = len(plan.jobs) + sum(map(len, plan.twins.values()))
        known = [*plan.settled, *invalid]
        counts = {status: sum(result.status is status for result in known) for status in ClipStatus}
        self._tell(
            EventType.RUN_STARTED,
            num_rows=len(known) + self._num_awaited,
            num_settled=len(known),
            counts=counts,
            eta_seconds=None if self._num_awaited else 0.0,
        )

    def clip(self, result: ClipResult) -> None:
        """A row that was awaited has its result."""
        self._num_come += 1
        counts = self._status.counts | {result.status: self._status.counts[result.status] + 1}
        per_row = (time.monotonic() - self._start) / self._num_come
        note = clip_note(result)
        self._tell(
            EventType.CLIP_FINISHED,
            subject=result.clip_id,
            data={"clip": note.model_dump(mode="json")},
            num_settled=self._status.num_settled + 1,
            counts=counts,
            eta_seconds=round(per_row * max(0, self._num_awaited - self._num_come), 1),
            last_clip=note,
        )

    def finished(self, summary: Summary) -> None:
        """The run's results and its report are written."""
        self._has_finished = True
        failed = summary.counts[ClipStatus.FAILED] or summary.counts[ClipStatus.INVALID]
        num_rows = sum(summary.counts.values())
        self._tell(
            EventType.RUN_FINISHED,
            data={"summary": summary.model_dump(mode="json")},
            state=RunState.FAILED if failed else RunState.COMPLETED,
            num_rows=num_rows,
            num_settled=num_rows,
            counts=dict(summary.counts),
            eta_seconds=0.0,
            report=storage.join(self._status.output, "runs", self._status.run_id, REPORT),
        )

    def __enter__(self) -> Notifications:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._has_started and not self._has_finished:
            message = f"{kind.__name__}: {error}" if kind else "the run ended without its results"
            self._tell(
                EventType.RUN_FINISHED, state=RunState.STOPPED, message=message[:MAX_MESSAGE_CHARS], eta_seconds=None
            )
        deadline = time.monotonic() + self._flush_seconds
        for notifier in self._notifiers:
            _without_raising(partial(notifier.close, max(0.1, deadline - time.monotonic())))

    def _tell(
        self, kind: EventType, *, subject: str | None = None, data: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        now = datetime.now(UTC)
        self._status = self._status.model_copy(update={**changes, "updated_at": now})
        event = Event(str(uuid.uuid4()), kind, now, subject or self._status.run_id, self._status, data or {})
        for notifier in self._notifiers:
            _without_raising(partial(notifier.notify, event))


def open_notifications(
    settings: Settings, *, run_id: str, manifest_uri: str, output_uri: str, also: Sequence[Notifier] = ()
) -> Notifications:
    """Notifications of a run by every way that is set up, and by those that the caller adds."""
    notifiers: list[Notifier] = [StatusFile(output_uri, run_id, policy=settings.storage_policy()), *also]
    if settings.webhook_url:
        secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret else None
        notifiers.append(Webhook(settings.webhook_url, secret))
    return Notifications(notifiers, run_id=run_id, manifest_uri=manifest_uri, output_uri=output_uri)


class StatusFile:
    """Keeps status.json of a run, and of OUTPUT for its newest run, no older than a heartbeat."""

    def __init__(
        self,
        output_uri: str,
        run_id: str,
        *,
        policy: StoragePolicy = DEFAULT_POLICY,
        min_seconds_between_writes: float = MIN_SECONDS_BETWEEN_WRITES,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._uris = (storage.join(output_uri, "runs", run_id, STATUS), storage.join(output_uri, STATUS))
        self._policy = policy
        self._heartbeat_seconds = heartbeat_seconds
        self._courier = Courier[RunStatus](
            "status-file",
            self._write,
            max_waiting=1,  # of several changes between two writes, the last says it all
            pause_seconds=min_seconds_between_writes,
            repeat_seconds=heartbeat_seconds,
        )

    def notify(self, event: Event) -> None:
        self._courier.send(event.status)

    def close(self, timeout_seconds: float) -> None:
        self._courier.close(timeout_seconds)

    def _write(self, status: RunStatus) -> None:
        if status.state is RunState.RUNNING:
            status = status.model_copy(update={"updated_at": datetime.now(UTC)})
        text = status.model_dump_json(indent=2) + "\n"
        failures = []
        for uri in self._uris:
            try:
                storage.publish_bytes(uri, text.encode(), policy=self._policy)
            except StorageError as error:
                failures.append(str(error))
        if failures:
            raise StorageError("; ".join(failures))


def _without_raising(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001  # a notifier's failure is never a clip's or a run's
        logger.warning("a notifier failed: %r", error)
