"""Which rows of a manifest a run takes: those that ended in some way when they were last rendered, the first few."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import storage
from tasks.errors import RefusedError
from tasks.form import RenderOptions
from tasks.jobs import ClipRequest, ClipResult
from tasks.plan import Rows, read_rows
from tasks.storage import StorageError, StoragePolicy

logger = logging.getLogger(__name__)

MAX_RUNS = 50  # of one manifest that are looked at; a row that was in none of them has no status

NOTHING: frozenset[str] = frozenset()

Row = ClipRequest | ClipResult


class _Earlier(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # results.jsonl has more


class EarlierQuality(_Earlier):
    verdict: str


class EarlierMetrics(_Earlier):
    quality: EarlierQuality | None = None


class EarlierRow(_Earlier):
    """What a row of an earlier run came to."""

    row: int
    clip_id: str
    status: str
    metrics: EarlierMetrics | None = None

    @property
    def ended_as(self) -> frozenset[str]:
        """Its status, and the verdict on its clip."""
        quality = self.metrics.quality if self.metrics else None
        return frozenset({self.status, quality.verdict} if quality else {self.status})


EarlierRun = tuple[EarlierRow, ...]


def choose_rows(manifest_uri: str, output_uri: str | None, options: RenderOptions, *, policy: StoragePolicy) -> Rows:
    """Read a manifest and take the rows that the options ask for.

    Args:
        manifest_uri: Of the CSV or JSONL file.
        output_uri: Where earlier runs are; None where nobody said.
        options: The form as it was filled in.
        policy: Of the storage.

    Raises:
        RefusedError: If the manifest may not be rendered, or if a status is asked for and there is no earlier run.
    """
    rows = read_rows(manifest_uri, skip_invalid=options.skip_invalid)
    if options.only_status:
        if output_uri is None:
            raise RefusedError("rows are chosen by the status of an earlier run: say where its output is, --output")
        rows = _with_status(rows, options.only_status, manifest_uri, output_uri, policy)
    return replace(rows, requests=rows.requests[: options.limit])


def _with_status(
    rows: Rows, wanted: Collection[str], manifest_uri: str, output_uri: str, policy: StoragePolicy
) -> Rows:
    runs = tuple(islice(read_runs(manifest_uri, output_uri, policy=policy), MAX_RUNS))
    if not runs:
        manifest, output = storage.redact(manifest_uri), storage.redact(output_uri)
        raise RefusedError(f"{manifest} was not rendered to {output} before: none of its rows has a status yet")
    statuses = last_statuses([*rows.requests, *rows.invalid], runs)
    return replace(
        rows,
        requests=tuple(row for row in rows.requests if not statuses.get(row.row, NOTHING).isdisjoint(wanted)),
        invalid=tuple(row for row in rows.invalid if not statuses.get(row.row, NOTHING).isdisjoint(wanted)),
    )


def last_statuses(rows: Sequence[Row], runs: Sequence[EarlierRun]) -> dict[int, frozenset[str]]:
    """How each row, by its line, ended in the first of `runs` that had it.

    A row is known again by its clip_id. One whose clip_id is new, as one derived from its content is once the row was
    mended, is taken for the row that stood on its line, if that one is gone.
    """
    present = {row.clip_id for row in rows}
    statuses: dict[int, frozenset[str]] = {}
    for run in runs:
        by_clip_id = {earlier.clip_id: earlier.ended_as for earlier in run}
        by_line = {earlier.row: earlier.ended_as for earlier in run if earlier.clip_id not in present}
        for row in rows:
            status = by_clip_id.get(row.clip_id) or by_line.get(row.row)
            if status and row.row not in statuses:
                statuses[row.row] = status
        if len(statuses) == len(rows):
            break
    return statuses


def read_runs(manifest_uri: str, output_uri: str, *, policy: StoragePolicy) -> Iterator[EarlierRun]:
    """The results of the runs of a manifest, the newest first.

    Raises:
        RefusedError: If they cannot be listed or read: what a run takes must not depend on luck.
    """
    try:
        found = storage.list_files(storage.join(output_uri, "runs"), policy=policy)
        for uri in sorted((uri for uri in found if storage.name(uri) == "summary.json"), reverse=True):
            summary = json.loads(storage.read_bytes(uri, policy=policy))
            if _same(summary["run"]["manifest_uri"], manifest_uri):
                lines = storage.read_bytes(storage.join(storage.parent(uri), "results.jsonl"), policy=policy)
                yield tuple(EarlierRow.model_validate_json(line) for line in lines.splitlines())
    except (StorageError, ValidationError, ValueError, KeyError) as error:
        raise RefusedError(f"the rows' earlier status cannot be read: {error}") from error


def _same(uri: str, other: str) -> bool:
    """Whether two manifests are one; local paths may be written in several ways."""
    path, other_path = storage.local_path(uri), storage.local_path(other)
    if path is None or other_path is None:
        return uri == other
    return path.absolute() == other_path.absolute()
