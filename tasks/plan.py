"""Which rows have to be rendered: every row gets a content key, and a key with a done record is skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from scail.config import PROFILES, SCAIL_14B, Quantization
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import read_model_config
from tasks import storage
from tasks.checkpoint import CheckpointInfo
from tasks.errors import RefusedError
from tasks.forecast import Forecast, forecast_clips, read_history, timings_of
from tasks.jobs import ClipJob, ClipMetrics, ClipRequest, ClipResult, ClipStatus, DoneRecord, content_key
from tasks.manifest import parse_manifest, read_manifest
from tasks.results import invalid_results
from tasks.settings import Settings
from tasks.storage import StorageError, StoragePolicy
from tasks.tables import ManifestError

logger = logging.getLogger(__name__)

Done = tuple[DoneRecord, ClipMetrics]
Hashes = dict[str, str | StorageError]  # by URI

_held: ContextVar[tuple[str, bytes] | None] = ContextVar("held_manifest", default=None)

LISTING_PAYS_FROM = 500  # keys; for fewer, asking for each is faster than listing a folder that may hold 100,000


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
        jobs: Clips to render, each key once, in the order in which to render them.
        twins: Rows that ask for the same pixels as an earlier row, by key.
        settled: Rows whose result is known before anything runs: skipped, disabled, or an input cannot be read.
    """

    jobs: tuple[ClipJob, ...]
    twins: dict[str, tuple[ClipRequest, ...]]
    settled: tuple[ClipResult, ...]


def read_rows(manifest_uri: str, *, skip_invalid: bool) -> Rows:
    """Read a manifest and decide whether it may be rendered.

    Args:
        manifest_uri: Of the CSV or JSONL file.
        skip_invalid: Go on with the good rows where others are malformed.

    Raises:
        RefusedError: With a line for every malformed row, unless they are to be skipped; and always if the file is
            unreadable, a column's name is doubtful, or no row is left.
    """
    try:
        held = _held.get()
        if held is not None and held[0] == manifest_uri:
            manifest = parse_manifest(held[1], manifest_uri)
        else:
            manifest = read_manifest(manifest_uri)
    except (ManifestError, StorageError) as error:
        raise RefusedError(str(error)) from error
    lines = [str(problem) for problem in manifest.problems]
    if manifest.header_problems or (lines and not skip_invalid):
        raise RefusedError(f"{storage.redact(manifest_uri)}: {len(lines)} problems, nothing was rendered", lines)
    if not manifest.requests:
        raise RefusedError(f"{storage.redact(manifest_uri)}: no row can be rendered", lines)
    return Rows(manifest.columns, manifest.requests, tuple(invalid_results(manifest.problems)))


@contextmanager
def holding(manifest_uri: str, data: bytes) -> Iterator[None]:
    """While open, this is the manifest's content for whoever reads its rows, whatever is written to it meanwhile."""
    token = _held.set((manifest_uri, data))
    try:
        yield
    finally:
        _held.reset(token)


def plan_clips(
    requests: Sequence[ClipRequest],
    *,
    output_uri: str,
    checkpoint_fingerprint: str,
    default_profile: str,
    policy: StoragePolicy,
    threads: int,
    stored_quantization: Quantization = "none",
) -> Plan:
    """Hash the inputs, look for done records, and sort the rows by what has to be done for them.

    A file that many rows name is hashed once, and a key that many rows have is looked up once.

    Raises:
        RefusedError: If the profile is not known, or the done records cannot be listed.
    """
    check_profile(default_profile)
    with ThreadPoolExecutor(threads) as pool:
        hashes = _hash_inputs(requests, policy, pool)
        keyed = [
            _key_row(request, hashes, checkpoint_fingerprint, default_profile, stored_quantization)
            for request in requests
        ]
        keys = list(dict.fromkeys(item.key for item in keyed if isinstance(item, ClipJob)))
        done = _find_all_done(output_uri, keys, policy, pool)
    jobs: dict[str, ClipJob] = {}
    twins: dict[str, tuple[ClipRequest, ...]] = {}
    settled: list[ClipResult] = []
    for item in keyed:
        if isinstance(item, ClipResult):
            settled.append(item)
        elif (found := done[item.key]) is not None:
            settled.append(_settled_by(found, item.request, output_uri))
        elif item.key in jobs:
            twins[item.key] = (*twins.get(item.key, ()), item.request)
        else:
            jobs[item.key] = item
    return Plan(_in_order(list(jobs.values()), hashes), twins, tuple(settled))


def _hash_inputs(requests: Sequence[ClipRequest], policy: StoragePolicy, pool: ThreadPoolExecutor) -> Hashes:
    """The hash of every file that an enabled row names, or why there is none."""

    def hash_file(uri: str) -> str | StorageError:
        try:
            return storage.content_md5(uri, policy=policy)
        except StorageError as error:
            return error

    uris = list(
        dict.fromkeys(uri for request in requests if request.enabled for uri in (request.reference, request.pose))
    )
    return dict(zip(uris, pool.map(hash_file, uris), strict=True))


def _key_row(
    request: ClipRequest,
    hashes: Hashes,
    checkpoint_fingerprint: str,
    default_profile: str,
    stored_quantization: Quantization,
) -> ClipJob | ClipResult:
    if not request.enabled:
        return result_of(request, ClipStatus.DISABLED)
    profile = request.profile or default_profile
    if stored_quantization != "none" and PROFILES[profile].quantization == "none":
        message = (
            f"line {request.row}: the checkpoint is quantised ({stored_quantization}), profile {profile} needs the "
            "weights it was made of; render with quality or fast"
        )
        return result_of(request, ClipStatus.FAILED).failed_by(InvalidInputError(message))
    reference_hash, pose_hash = hashes[request.reference], hashes[request.pose]
    for column, found in (("reference", reference_hash), ("pose", pose_hash)):
        if isinstance(found, StorageError):
            kind = type(found)
            error = kind(f"line {request.row}, column {column}: {found}", transient=found.transient)
            return result_of(request, ClipStatus.FAILED).failed_by(error)
    key, params = content_key(
        request,
        reference_hash=str(reference_hash),
        pose_hash=str(pose_hash),
        checkpoint_fingerprint=checkpoint_fingerprint,
        default_profile=default_profile,
    )
    return ClipJob(
        request=request,
        key=key,
        params=params,
        checkpoint_fingerprint=checkpoint_fingerprint,
        profile=profile,
    )


def _in_order(jobs: list[ClipJob], hashes: Hashes) -> tuple[ClipJob, ...]:
    """Higher priority first; then rows that share a pose, a reference or a prompt one after the other.

    A worker keeps one model, so that rows of another arithmetic come together; and the encodings of its last few
    inputs, of which the pose's cost the most. What is first in the manifest stays first, so that rows which share
    nothing keep their order.
    """
    places: tuple[dict[object, int], ...] = ({}, {}, {}, {})

    def place(job: ClipJob) -> tuple[int, ...]:
        request = job.request
        inputs = (hashes[request.pose], hashes[request.reference], (request.prompt, request.negative_prompt))
        profile = PROFILES[job.profile]
        shared = ((profile.quantization, profile.attention), *inputs)
        ranks = (seen.setdefault(value, len(seen)) for seen, value in zip(places, shared, strict=True))
        return (-request.priority, *ranks)

    return tuple(sorted(jobs, key=place))


def _find_all_done(
    output_uri: str, keys: Sequence[str], policy: StoragePolicy, pool: ThreadPoolExecutor
) -> dict[str, Done | StorageError | None]:
    listed = _list_done(output_uri, policy) if len(keys) >= LISTING_PAYS_FROM else None

    def find(key: str) -> Done | StorageError | None:
        try:
            return find_done(output_uri, key, policy=policy)
        except StorageError as error:
            return error

    asked = keys if listed is None else [key for key in keys if key in listed]
    return dict.fromkeys(keys) | dict(zip(asked, pool.map(find, asked), strict=True))


def _list_done(output_uri: str, policy: StoragePolicy) -> frozenset[str] | None:
    """Keys with a done record, or None where listing is not allowed and each has to be asked for."""
    folder = storage.join(output_uri, "done")
    try:
        return frozenset(storage.name(uri).removesuffix(".json") for uri in storage.list_files(folder, policy=policy))
    except storage.PermissionDeniedError as error:
        logger.warning("done records cannot be listed, each is asked for: %s", error)
        return None
    except StorageError as error:
        raise RefusedError(f"done records cannot be listed, nothing was rendered: {error}") from error


def _settled_by(found: Done | StorageError, request: ClipRequest, output_uri: str) -> ClipResult:
    if isinstance(found, StorageError):
        return result_of(request, ClipStatus.FAILED).failed_by(found)
    return result_of(request, ClipStatus.SKIPPED).of_done(*found, output_uri)


def find_done(output_uri: str, key: str, *, policy: StoragePolicy) -> Done | None:
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


def plan_with(
    settings: Settings, model: CheckpointInfo, requests: Sequence[ClipRequest], *, output_uri: str, default_profile: str
) -> Plan:
    """`plan_clips` by what the settings and the checkpoint say."""
    return plan_clips(
        requests,
        output_uri=output_uri,
        checkpoint_fingerprint=model.fingerprint,
        stored_quantization=model.quantization,
        default_profile=default_profile,
        policy=settings.storage_policy(),
        threads=settings.planning_threads,
    )


def forecast_plan(plan: Plan, *, output_uri: str, model: CheckpointInfo, settings: Settings) -> Forecast:
    """What a plan's clips will take, learned from the clips below OUTPUT."""
    earlier = timings_of(result.metrics for result in plan.settled if result.metrics)
    return forecast_clips(
        [(job.request, job.params) for job in plan.jobs],
        [*earlier, *read_history(output_uri, policy=settings.storage_policy())],
        checkpoint_fingerprint=model.fingerprint,
        model_name=model.name,
        device=_forecast_device(settings),
        price_per_gpu_hour=settings.price_per_gpu_hour,
    )


def forecast_rows(rows: Rows, *, checkpoint: str, default_profile: str, settings: Settings) -> Forecast:
    """What a manifest's rows take if none of them is done: a guess, since no earlier clips are looked at.

    A checkpoint that is not on this machine is taken for the 14B one.
    """
    check_profile(default_profile)
    try:
        model_name = read_model_config(Path(checkpoint)).name
    except CheckpointError:
        model_name = SCAIL_14B.name
    return forecast_clips(
        [(request, request.sampling(default_profile, seed=0)) for request in rows.requests if request.enabled],
        [],
        checkpoint_fingerprint=None,
        model_name=model_name,
        device=_forecast_device(settings),
        price_per_gpu_hour=settings.price_per_gpu_hour,
    )


def check_profile(name: str) -> None:
    """Refuse a profile that is not known; rows are checked one by one, this is the one of all others.

    Raises:
        RefusedError: If there is no such profile.
    """
    if name not in PROFILES:
        raise RefusedError(f"profile is {name!r}; expected one of {', '.join(PROFILES)}")


def _forecast_device(settings: Settings) -> str | None:
    return settings.forecast_device or ("CPU" if settings.device == "cpu" else None)


def plan_line(plan: Plan, rows: Rows) -> str:
    """How many rows a plan renders, and what becomes of the others: `3 to render, 0 repeated, 1 skipped, 0 invalid`."""
    by_status = [result.status for result in plan.settled]
    counts = {status: by_status.count(status) for status in dict.fromkeys(by_status)}
    parts = [f"{len(plan.jobs)} to render", f"{sum(map(len, plan.twins.values()))} repeated"]
    parts += [f"{count} {status}" for status, count in counts.items()]
    return ", ".join([*parts, f"{len(rows.invalid)} invalid"])


def result_of(request: ClipRequest, status: ClipStatus) -> ClipResult:
    """A result that has the row's own columns and nothing else yet."""
    return ClipResult(row=request.row, clip_id=request.clip_id, status=status, columns=request.columns)
