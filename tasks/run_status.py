"""A run as an outside watcher sees it, and what happens in it: data. Who tells it: tasks/notify.py."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict

from tasks.jobs import ClipResult, ClipStatus

STATUS = "status.json"
MAX_MESSAGE_CHARS = 1000

_Frozen = ConfigDict(frozen=True, extra="forbid")


class RunState(StrEnum):
    RUNNING = "running"
    COMPLETED = "completed"  # every row has its clip
    FAILED = "failed"  # the results are written, and some rows have no clip
    STOPPED = "stopped"  # by an error or a signal, before the results were written


class ClipNote(BaseModel):
    """What became of one row, in brief."""

    model_config = _Frozen

    row: int
    clip_id: str
    status: ClipStatus
    video: str | None
    seconds: float | None
    error_class: str | None
    message: str | None


class RunStatus(BaseModel):
    """A run as an outside watcher sees it: status.json."""

    model_config = _Frozen

    run_id: str
    state: RunState
    manifest: str
    output: str
    started_at: AwareDatetime
    updated_at: AwareDatetime  # renewed while the run is alive, also when nothing changes
    num_rows: int
    num_settled: int  # rows whose result is known
    counts: dict[ClipStatus, int]  # every status, also those that did not occur
    eta_seconds: float | None  # None before the first clip
    last_clip: ClipNote | None
    report: str | None  # once it is written
    message: str | None = None  # why it was stopped


class EventType(StrEnum):
    RUN_STARTED = "run.started"
    CLIP_FINISHED = "clip.finished"
    RUN_FINISHED = "run.finished"


@dataclass(frozen=True)
class Event:
    """Something that happened, and the run's state just after it.

    Attributes:
        id: The same however often it is delivered.
        subject: A clip's id, or the run's.
        data: More than the status says: the clip, or the run's summary.
    """

    id: str
    type: EventType
    time: datetime
    subject: str
    status: RunStatus
    data: dict[str, Any]


def clip_note(result: ClipResult) -> ClipNote:
    rendered = result.metrics if result.status is ClipStatus.RENDERED else None
    return ClipNote(
        row=result.row,
        clip_id=result.clip_id,
        status=result.status,
        video=result.video,
        seconds=rendered and round(rendered.total_seconds, 3),
        error_class=result.error_class,
        message=result.message and result.message[:MAX_MESSAGE_CHARS],
    )
