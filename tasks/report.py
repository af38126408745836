"""The run's page: every clip, what it was made of, where the time went, and why a row has no clip.

One HTML file that loads nothing but the clips beside it. Its links are relative to its own place, so that it works
from a disk, from a bucket, and after OUTPUT was moved.
"""

from __future__ import annotations

import base64
import hashlib
import os
import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from heapq import nsmallest
from pathlib import PurePath
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from scail.errors import InvalidInputError
from scail.quality import Limit
from tasks import storage
from tasks.figures import duration, time_name
from tasks.jobs import ClipMetrics, ClipResult, ClipStatus
from tasks.references import resolve_reference
from tasks.results import Summary

REPORT = "report.html"
NUM_COLOURS = 12  # of stages, in the template
MAX_CARDS = 1000  # a page of more is megabytes that no browser likes; rows without a clip come first
MAX_TROUBLES = 100  # listed on top of the page

_FILES = ("results.csv", "results.jsonl", "summary.json")

_TROUBLED = (ClipStatus.FAILED, ClipStatus.INVALID)
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
_VIDEO_SUFFIXES = {".mp4", ".webm", ".mov", ".mkv", ".m4v"}


@dataclass(frozen=True)
class Link:
    """Something that the page names.

    Attributes:
        text: What is shown.
        href: Where it leads; None where a browser could not follow it, as with a `gs://` of another bucket.
        kind: "image" or "video" if the page may show it in place, else "".
    """

    text: str
    href: str | None
    kind: str


@dataclass(frozen=True)
class StageBar:
    """One stage's part of a clip's time."""

    stage: str
    seconds: float
    percent: float
    colour: int


@dataclass(frozen=True)
class Card:
    """One row as the page shows it."""

    result: ClipResult
    prompt: str
    facts: tuple[str, ...]  # the few parameters that one looks for first
    details: dict[str, str]  # the rest, by name
    video: Link | None
    poster: Link | None
    reference: Link | None
    pose: Link | None
    bars: tuple[StageBar, ...]
    quality: dict[str, str]  # numbers as they are read, by name


def write_report(results: Collection[ClipResult], *, summary: Summary, run_dir_uri: str, output_uri: str) -> str:
    """Write the run's page, and the same page as OUTPUT/report.html for the newest run.

    Returns:
        The URI of OUTPUT/report.html.

    Raises:
        StorageError: If a page cannot be written.
    """
    for page_dir_uri in (run_dir_uri, output_uri):
        page = render_report(results, summary=summary, page_dir_uri=page_dir_uri, run_dir_uri=run_dir_uri)
        storage.publish_bytes(storage.join(page_dir_uri, REPORT), page.encode(), "text/html; charset=utf-8")
    return storage.join(output_uri, REPORT)


def render_report(
    results: Collection[ClipResult], *, summary: Summary, page_dir_uri: str, run_dir_uri: str | None = None
) -> str:
    """The page as HTML, with links for a page that lies in `page_dir_uri`.

    Args:
        results: One per row of the manifest, in any order.
        summary: Of these results.
        page_dir_uri: Where the page will lie.
        run_dir_uri: Where the run's other files lie; None: the page does not link to them.
    """
    shown = _shown(results)
    stages = list(dict.fromkeys([*summary.stage_seconds, *(stage for r in shown for stage in _seconds(r))]))
    cards = [_card(result, stages, summary.run.manifest_uri, page_dir_uri) for result in shown]
    troubled = [card for card in cards if card.result.status in _TROUBLED]
    to_review = [card for card in cards if card.result.is_to_review]
    optional = {"failures.csv": summary.num_in_failures_csv, "review.csv": summary.num_in_review_csv}
    names = [*_FILES, *(name for name, count in optional.items() if count)] if run_dir_uri else []
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            run=summary.run,
            cards=cards,
            num_rows=len(results),
            troubled=troubled[:MAX_TROUBLES],
            num_troubled=sum(summary.counts[status] for status in _TROUBLED),
            to_review=to_review[:MAX_TROUBLES],
            files={name: _link(storage.join(run_dir_uri or "", name), page_dir_uri) for name in names},
            time_name=time_name(summary.run.device),
            colours={stage: number % NUM_COLOURS for number, stage in enumerate(stages)},
            statuses=[status for status in ClipStatus if summary.counts[status]],
        )
    )


def _shown(results: Iterable[ClipResult]) -> list[ClipResult]:
    """Every row in its order; of too many, those without a clip, those to look at, and then the first."""
    needed = nsmallest(
        MAX_CARDS, results, key=lambda result: (result.status not in _TROUBLED, not result.is_to_review, result.row)
    )
    return sorted(needed, key=lambda result: result.row)


def relative_href(uri: str, page_dir_uri: str) -> str | None:
    """The link from a page in `page_dir_uri` to `uri`, or None if they have no root in common."""
    path, page_dir = storage.local_path(uri), storage.local_path(page_dir_uri)
    if path is not None and page_dir is not None:
        return quote(PurePath(os.path.relpath(path.absolute(), page_dir.absolute())).as_posix())
    if path is not None or page_dir is not None:
        return None
    (scheme, key), (page_scheme, page_key) = (place.split("://", 1) for place in (uri, page_dir_uri))
    if scheme != page_scheme or key.split("/")[0] != page_key.split("/")[0]:
        return None
    return quote(posixpath.relpath(key, page_key))


def _card(result: ClipResult, stages: Sequence[str], manifest_uri: str, page_dir_uri: str) -> Card:
    metrics = result.metrics
    seconds = _seconds(result)
    total = sum(seconds.values()) or 1.0
    bars = tuple(
        StageBar(stage, spent, 100 * spent / total, stages.index(stage) % NUM_COLOURS)
        for stage, spent in seconds.items()
        if spent
    )
    return Card(
        result=result,
        prompt=metrics.prompt if metrics else result.columns.get("prompt", ""),
        facts=_facts(metrics) if metrics else (),
        details=_details(result),
        video=_link(result.video, page_dir_uri),
        poster=_link(result.poster, page_dir_uri),
        reference=_link(_input_uri(result, "reference", manifest_uri), page_dir_uri),
        pose=_link(_input_uri(result, "pose", manifest_uri), page_dir_uri),
        bars=bars,
        quality=_quality(metrics) if metrics else {},
    )


def _seconds(result: ClipResult) -> dict[str, float]:
    return result.metrics.seconds if result.metrics else {}


def _input_uri(result: ClipResult, column: str, manifest_uri: str) -> str | None:
    if result.metrics:
        return result.metrics.reference_uri if column == "reference" else result.metrics.pose_uri
    cell = result.columns.get(column, "").strip()
    try:
        return resolve_reference(manifest_uri, cell) if cell else None
    except InvalidInputError:
        return None  # the message already shows it, and nothing may link to it


def _link(uri: str | None, page_dir_uri: str) -> Link | None:
    if uri is None:
        return None
    href = relative_href(uri, page_dir_uri)
    if href is None:
        return Link(storage.redact(uri), uri if uri.startswith("https://") else None, kind="")
    suffix = posixpath.splitext(storage.name(uri))[1].lower()
    kind = "image" if suffix in _IMAGE_SUFFIXES else "video" if suffix in _VIDEO_SUFFIXES else ""
    return Link(storage.name(uri), href, kind)


def _facts(metrics: ClipMetrics) -> tuple[str, ...]:
    params = metrics.params
    return (
        _size(metrics.height, metrics.width),
        f"{metrics.num_frames} frames",
        f"{metrics.fps:g} fps",
        f"{params.num_inference_steps} steps",
        f"guidance {params.guidance_scale:g}",
        f"shift {params.shift:g}",
        f"seed {params.seed}",
    )


def _size(height: int, width: int) -> str:
    return f"{width} × {height}"  # noqa: RUF001  # a reader of the page expects the sign, not the letter


def _details(result: ClipResult) -> dict[str, str]:
    """The row's cells as they came, then what was measured; empty cells are left out."""
    details = {name: cell for name, cell in result.columns.items() if cell.strip()}
    if metrics := result.metrics:
        details |= {
            "content key": metrics.key,
            "negative prompt": metrics.negative_prompt or "(none)",
            "reference as it came": _size(*metrics.reference_size),
            "pose as it came": f"{_size(*metrics.pose_size)}, {metrics.pose_num_frames} frames",
            "pose picture kept": f"{metrics.pose_kept_share:.0%}",
            "frames dropped at the end": str(metrics.num_dropped_frames),
            "peak memory": f"{metrics.peak_memory_gib:.1f} GiB",
            "attempts": str(metrics.attempts),
            "device": metrics.device,
            "checkpoint": metrics.checkpoint_fingerprint,
            "finished": metrics.finished_at,
        }
    return details


def _quality(metrics: ClipMetrics) -> dict[str, str]:
    """What was measured of the pictures, with its limits; what could not be measured is left out."""
    if metrics.quality is None:
        return {}
    limits = metrics.quality.limits
    return {
        name.replace("_", " "): f"{value:.3g}" + (_limit(limits[name]) if name in limits else "")
        for name, value in asdict(metrics.quality.numbers).items()
        if value is not None
    }


def _limit(limit: Limit) -> str:
    side = "below" if limit.falls else "above"
    return f" ({side} {limit.review:g}, {limit.fail:g})"


@cache  # it keeps the templates that it has compiled
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tasks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "moment": _moment, "script_hash": _script_hash}
    environment.filters |= {"redact": storage.redact, "file_name": lambda uri: storage.name(storage.redact(uri))}
    return environment


def _moment(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%S %Z")


def _script_hash(script: str) -> str:
    """What the page's security policy calls its one script by, so that no other runs whatever a row says."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
