"""Which rows have to be rendered: every row gets a content key, and a key with a done record is skipped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import ValidationError

from tasks import storage
from tasks.errors import RefusedError
from tasks.jobs import ClipJob, ClipMetrics, ClipRequest, ClipResult, ClipStatus, DoneRecord, content_key
from tasks.manifest import ManifestError, read_manifest
from tasks.results import invalid_results
from tasks.storage import StorageError, StoragePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """A manifest's rows: those that can be planned, and one failed result for each that cannot."""

    columns: tuple[str, ...]
    requests: tuple[ClipRequest, ...]
    invalid: tuple[ClipResult, ...]


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        jobs: Clips to render, each key once; higher priority first, then in the order of their rows.
        twins: Rows that ask for the same pixels as an earlier row, by key.
        settled: Rows whose result is known before anything runs: skipped, disabled, or an input cannot be read.
    """

    jobs: tuple[ClipJob, ...]
    twins: dict[str, tuple[ClipRequest, ...]]
    settled: tuple[ClipResult, ...]


def read_rows(manifest_uri: str, *, skip_invalid: bool, limit: int | None) -> Rows:
    """Read a manifest and decide whether it may be rendered.

    Args:
        manifest_uri: Of the CSV or JSONL file.
        skip_invalid: Go on with the good rows where others are malformed.
        limit: Take only the first good rows.

    Raises:
        RefusedError: With a line for every malformed row, unless they are to be skipped; and always if the file is
            unreadable, a column's name is doubtful, or no row is left.
    """
    try:
        manifest = read_manifest(manifest_uri)
    except (ManifestError, StorageError) as error:
        raise RefusedError(str(error)) from error
    lines = [str(problem) for problem in manifest.problems]
    if manifest.header_problems or (lines and not skip_invalid):
        raise RefusedError(f"{storage.redact(manifest_uri)}: {len(lines)} problems, nothing was rendered", lines)
    if not manifest.requests:
        raise RefusedError(f"{storage.redact(manifest_uri)}: no row can be rendered", lines)
    return Rows(manifest.columns, manifest.requests[:limit], tuple(invalid_results(manifest.problems)))


def plan_clips(
    requests: Sequence[ClipRequest],
    *,
    output_uri: str,
    checkpoint_fingerprint: str,
    default_profile: str,
    policy: StoragePolicy,
    threads: int,
) -> Plan:
    """Hash the inputs, look for done records, and sort the rows by what has to be done for them."""

    def settle(request: ClipRequest) -> ClipJob | ClipResult:
        if not request.enabled:
            return result_of(request, ClipStatus.DISABLED)
        try:
            hashes = _input_hashes(request, policy)
            key, params = content_key(
                request,
                reference_hash=hashes["reference"],
                pose_hash=hashes["pose"],
                checkpoint_fingerprint=checkpoint_fingerprint,
                default_profile=default_profile,
            )
            done = find_done(output_uri, key, policy=policy)
        except StorageError as error:
            return result_of(request, ClipStatus.FAILED).failed_by(error)
        if done:
            return result_of(request, ClipStatus.SKIPPED).of_done(*done, output_uri)
        return ClipJob(request=request, key=key, params=params, checkpoint_fingerprint=checkpoint_fingerprint)

    with ThreadPoolExecutor(threads) as pool:
        settled = list(pool.map(settle, requests))
    jobs: dict[str, ClipJob] = {}
    twins: dict[str, tuple[ClipRequest, ...]] = {}
    for job in settled:
        if isinstance(job, ClipJob):
            if job.key in jobs:
                twins[job.key] = (*twins.get(job.key, ()), job.request)
            jobs.setdefault(job.key, job)
    by_priority = sorted(jobs.values(), key=lambda job: -job.request.priority)
    return Plan(tuple(by_priority), twins, tuple(item for item in settled if isinstance(item, ClipResult)))


def find_done(output_uri: str, key: str, *, policy: StoragePolicy) -> tuple[DoneRecord, ClipMetrics] | None:
    """The done record of a key and the clip's metrics, if what the record names is still there.

    Another clip may have been published under the same clip_id since; then the metrics beside the video carry
    another key, and the record is out of date.
    """
    try:
        record = DoneRecord.model_validate_json(
            storage.read_bytes(storage.join(output_uri, "done", f"{key}.json"), policy=policy)
        )
        metrics = ClipMetrics.model_validate_json(
            storage.read_bytes(storage.join(output_uri, record.metrics), policy=policy)
        )
        size = storage.size(storage.join(output_uri, record.video), policy=policy)
    except storage.NotFoundError:
        return None
    except ValidationError as error:
        logger.warning("done record %s is not ours or is damaged; rendering again: %s", key, error)
        return None
    return (record, metrics) if metrics.key == key and size == record.video_size else None


def result_of(request: ClipRequest, status: ClipStatus) -> ClipResult:
    """A result that has the row's own columns and nothing else yet."""
    return ClipResult(row=request.row, clip_id=request.clip_id, status=status, columns=request.columns)


def _input_hashes(request: ClipRequest, policy: StoragePolicy) -> dict[str, str]:
    hashes = {}
    for column in ("reference", "pose"):
        uri = getattr(request, column)
        try:
            hashes[column] = storage.content_md5(uri, policy=policy)
        except StorageError as error:
            kind = type(error)
            raise kind(f"line {request.row}, column {column}: {error}", transient=error.transient) from error
    return hashes
