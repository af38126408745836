"""What a run shows of itself in Prefect's UI: how far it is, and at the end what came of it.

    …-progress   while it runs: percent, counts, when it will be ready, the newest failure
    …-results    a table with a line for each row, those without a clip or without a good one first
    …-summary    counts, what went wrong and how to mend it, posters
    …-report     a link to report.html, where a browser can follow one
    …-plan       of a dry run: a table of what would be rendered
    …-night      of a nightly run: a line for each manifest

Each is kept under the manifest's name, so that the UI lists the runs of one manifest below each other. A run never
fails or waits for its looks: what Prefect does not take is logged. What a manifest says is shown as text, never as
markup.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from heapq import nsmallest
from typing import Any
from uuid import UUID

from PIL import Image, UnidentifiedImageError
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks import storage
from tasks.courier import Courier
from tasks.figures import duration, gpu_seconds, time_name
from tasks.forecast import Forecast
from tasks.jobs import ClipQuality, ClipResult, ClipStatus
from tasks.plan import Plan, Rows, plan_line
from tasks.report import REPORT
from tasks.results import NOT_DONE, Summary, counts_line
from tasks.run_status import Event, RunState, RunStatus
from tasks.storage import StorageError

logger = logging.getLogger(__name__)

MIN_SECONDS_BETWEEN_UPDATES = 10.0  # each is also an event on the run's page
MAX_TABLE_ROWS = 500
MAX_TROUBLES = 20
MAX_FINDINGS = 3
MAX_POSTERS, POSTERS_PER_LINE, POSTER_WIDTH = 12, 4, 180
MAX_CELL_CHARS = 52  # the UI's tables do not wrap

_MARKUP = re.compile(r"[\\`*_{}\[\]()<>#+!|~&-]")


class ProgressArtifact:
    """A notifier that keeps the run's bar in Prefect's UI.

    Args:
        flow_run_id: Whose bar it is.
        forecast: Says how long it takes while no clip is ready yet.
    """

    def __init__(self, flow_run_id: str, forecast: Forecast, *, seconds: float = MIN_SECONDS_BETWEEN_UPDATES) -> None:
        self._flow_run_id = UUID(flow_run_id)
        self._forecast = forecast
        self._artifact_id: UUID | None = None
        # Of several changes between two updates, the last says it all.
        self._courier = Courier[RunStatus]("progress-artifact", self._write, max_waiting=1, pause_seconds=seconds)

    def notify(self, event: Event) -> None:
        self._courier.send(event.status)

    def close(self, timeout_seconds: float) -> None:
        self._courier.close(timeout_seconds)

    def _write(self, status: RunStatus) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

        content: dict[str, Any] = {
            "data": 100.0 * status.num_settled / max(1, status.num_rows),
            "description": progress_text(status, self._forecast),
        }
        with get_client(sync_client=True) as client:
            if self._artifact_id is None:
                key = artifact_key(status.manifest, "progress")
                artifact = ArtifactCreate(key=key, type="progress", flow_run_id=self._flow_run_id, **content)
                self._artifact_id = client.create_artifact(artifact).id
            else:
                client.update_artifact(self._artifact_id, ArtifactUpdate(**content))


def progress_text(status: RunStatus, forecast: Forecast) -> str:
    """The words beside the bar: one paragraph, since a run's page shows no more of it."""
    done = f"**{status.num_settled} of {status.num_rows} rows**"
    sentences = [", ".join(f"{count} {name}" for name, count in status.counts.items() if count)]
    if status.state is RunState.STOPPED:
        done = f"{done}, then stopped: {as_text(status.message or 'before its results were written')}"
    elif status.state is RunState.RUNNING and status.eta_seconds is None:
        done = f"{done}, no clip ready yet, {as_text(str(forecast))}"
    elif status.state is RunState.RUNNING and status.eta_seconds:
        ready_at = status.updated_at + timedelta(seconds=status.eta_seconds)
        done = f"{done}, ready in {duration(status.eta_seconds)} at {_clock(ready_at, status.updated_at)}"
    if status.last_clip and status.last_clip.status in NOT_DONE:
        sentences.append(f"{as_text(status.last_clip.clip_id)}: {as_text(status.last_clip.message or '')}")
    return ". ".join(filter(None, [done, *sentences]))


def publish_artifacts(results: Iterable[ClipResult], *, summary: Summary, report_uri: str) -> None:
    """The table, the summary and the link of a run that has ended; called by its flow."""
    manifest, output = summary.run.manifest_uri, summary.run.output_uri
    with _only_logged("results"):
        first = nsmallest(MAX_TABLE_ROWS, results, key=_by_need)
        is_cut = sum(summary.counts.values()) > len(first)
        more = f" The first {len(first)} are here, all are in results.csv." if is_cut else ""
        create_table_artifact(
            [_table_row(result, output) for result in first],
            key=artifact_key(manifest, "results"),
            description=f"{counts_line(summary.counts)}.{more}",
        )
    with _only_logged("summary"):
        markdown = summary_markdown(results, summary=summary, report_uri=report_uri)
        about = "What came of it, posters, what went wrong and how to mend it."
        create_markdown_artifact(markdown, key=artifact_key(manifest, "summary"), description=about)
    if (link := storage.browser_url(report_uri)) is not None:
        with _only_logged("link"):
            text = f"Report of {storage.name(manifest)}"
            about = "The page with every clip, beside its reference and its pose."
            create_link_artifact(link, link_text=text, key=artifact_key(manifest, "report"), description=about)


def publish_plan(plan: Plan, rows: Rows, forecast: Forecast, *, manifest_uri: str) -> None:
    """What a dry run found, as a table; called by its flow."""
    results = [*rows.invalid, *plan.settled]
    twins = [(twin, f"the same as {job.clip_id}") for job in plan.jobs for twin in plan.twins.get(job.key, ())]
    lines = [
        *(_plan_row(result.row, result.clip_id, result.status, result.message or "") for result in results),
        *(_plan_row(job.request.row, job.clip_id, "to render", _steps(job.params)) for job in plan.jobs),
        *(_plan_row(twin.row, twin.clip_id, "repeated", why) for twin, why in twins),
    ]
    with _only_logged("plan"):
        create_table_artifact(
            sorted(lines, key=lambda line: int(line["line"]))[:MAX_TABLE_ROWS],
            key=artifact_key(manifest_uri, "plan"),
            description=f"{plan_line(plan, rows)}. {_sentence(str(forecast)) if plan.jobs else ''}",
        )


@dataclass(frozen=True)
class ManifestEnd:
    """What became of one manifest of a folder.

    Attributes:
        manifest, output: URIs.
        run: The name of its run's last state, or that it was done before.
        why: What is to be known of it; else empty.
        has_report: Whether its run came so far.
    """

    manifest: str
    output: str
    run: str
    why: str
    has_report: bool


def publish_night(ends: Sequence[ManifestEnd], *, folder: str) -> None:
    """What became of every manifest of a folder, as a table; called by the flow that rendered them."""
    with _only_logged("night"):
        rows = []
        for end in ends:
            url = storage.browser_url(storage.join(end.output, REPORT))
            report = (f"[report]({url})" if url else end.output) if end.has_report else ""
            name = storage.name(end.manifest)
            rows.append({"manifest": name, "run": end.run, "report": report, "why": _short(end.why)})
        create_table_artifact(rows, key=artifact_key(folder, "night"), description=f"The manifests of {folder}")


def summary_markdown(results: Iterable[ClipResult], *, summary: Summary, report_uri: str) -> str:
    """A run as one page: counts, links, what went wrong, posters."""
    run = summary.run
    facts = [
        f"{time_name(run.device)} {duration(summary.gpu_seconds)}" if summary.gpu_seconds else "",
        f"cost {summary.cost:,.2f}" if summary.cost else "",
        as_text(run.device) if run.device != "none" else "",
        as_text(run.checkpoint_name),
    ]
    lines = [
        f"# {as_text(storage.name(run.manifest_uri))}: {counts_line(summary.counts)}",
        " · ".join(filter(None, facts)),
        f"**{as_text(run.notice)}**" if run.notice else "",
        _report_line(report_uri, run.output_uri),
        *_trouble_section(results, sum(summary.counts[status] for status in NOT_DONE)),
        *_poster_section(results, summary.counts[ClipStatus.RENDERED] + summary.counts[ClipStatus.SKIPPED]),
        *_review_section(results, summary.num_in_review_csv),
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def artifact_key(manifest_uri: str, kind: str) -> str:
    """Lower-case letters, digits and dashes, as Prefect wants it: `2026-11-spring-csv-results`."""
    name = re.sub(r"[^a-z0-9]+", "-", storage.name(manifest_uri).lower()).strip("-")
    return f"{name or 'manifest'}-{kind}"


def as_text(words: str) -> str:
    """Shown by the UI letter by letter: no markup, no line break."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(words.split())).replace("\\&", "&amp;").replace("\\<", "&lt;")


def _table_row(result: ClipResult, output_uri: str) -> dict[str, Any]:
    seconds = gpu_seconds(result.metrics.seconds) if result.metrics and result.status is ClipStatus.RENDERED else None
    return {
        "clip": result.clip_id,
        "line": result.row,
        "status": str(result.status),
        "time": "" if seconds is None else duration(seconds),
        "video": _video_link(result, output_uri, "video") or "",
        "quality": str(result.quality.verdict) if result.quality else "",
        "why": _short(_without_line(result.message or (result.quality.note if result.quality else ""), result.row)),
    }


def _by_need(result: ClipResult) -> tuple[bool, bool, int]:
    """Rows without a clip, then clips to look at, then the others, each in the manifest's order."""
    return result.status not in NOT_DONE, not result.is_to_review, result.row


def _plan_row(row: int, clip_id: str, what: str, why: str) -> dict[str, Any]:
    return {"clip": clip_id, "line": row, "what": what, "why": _short(_without_line(why, row))}


def _steps(params: Any) -> str:
    return f"{params.num_inference_steps} steps"


def _without_line(message: str, row: int) -> str:
    """The table has a column for it."""
    return message.removeprefix(f"line {row}, ").removeprefix(f"line {row}: ")


def _short(words: str) -> str:
    """Beginning and end of a message, as much as a cell shows, and nothing that the UI takes for a link."""
    line = " ".join(words.split()).replace("](", "] (")
    half = MAX_CELL_CHARS // 2 - 1
    return line if len(line) <= MAX_CELL_CHARS else f"{line[:half]} … {line[-half:]}"


def _video_link(result: ClipResult, output_uri: str, label: str) -> str | None:
    """A link in markdown; without one, where the video lies below OUTPUT."""
    if not result.video:
        return None
    url = storage.browser_url(result.video)
    return f"[{label}]({url})" if url else result.video.removeprefix(output_uri.rstrip("/") + "/")


def _report_line(report_uri: str, output_uri: str) -> str:
    if url := storage.browser_url(report_uri):
        return f"[The report, with every clip]({url}) · output `{output_uri}`"
    return f"The report, with every clip: `{report_uri}`"


def _trouble_section(results: Iterable[ClipResult], num_troubled: int) -> list[str]:
    if not num_troubled:
        return []
    first = nsmallest(MAX_TROUBLES, (r for r in results if r.status in NOT_DONE), key=lambda result: result.row)
    lines = [f"- **{as_text(result.clip_id)}** ({result.status}): {as_text(result.message or '')}" for result in first]
    if num_troubled > len(lines):
        lines.append(f"- … and {num_troubled - len(lines)} more, in failures.csv")
    advice = (
        "Mend these rows in the manifest and render it again: what is done is skipped. "
        "*Only rows whose status was* takes just these."
    )
    return ["## What went wrong", "\n".join(lines), advice]


def _review_section(results: Iterable[ClipResult], num_to_review: int) -> list[str]:
    first = nsmallest(MAX_TROUBLES, (r for r in results if r.is_to_review), key=lambda result: result.row)
    lines = [
        f"- **{as_text(result.clip_id)}** ({as_text(result.quality.verdict)}): {_findings(result.quality)}"
        for result in first
        if result.quality
    ]
    if num_to_review > len(lines):
        lines.append(f"- … and {num_to_review - len(lines)} more, in review.csv")
    return ["## Clips to look at", "\n".join(lines)] if lines else []


def _poster_section(results: Iterable[ClipResult], num_clips: int) -> list[str]:
    """Posters of the first clips, side by side; those that this run rendered come before those that were there."""
    first = nsmallest(
        MAX_POSTERS,
        (result for result in results if result.poster),
        key=lambda result: (result.status is not ClipStatus.RENDERED, result.row),
    )
    shown = [(result, image) for result in first if (image := _thumbnail(result.poster or ""))]
    if not shown:
        return []
    lines = ["## Clips"]
    for start in range(0, len(shown), POSTERS_PER_LINE):
        group = shown[start : start + POSTERS_PER_LINE]
        cells = [
            [f"![{result.clip_id}]({image})" for result, image in group],
            ["---"] * len(group),
            [_caption(result) for result, _ in group],
        ]
        lines.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    if num_clips > len(shown):
        lines.append(f"… and {num_clips - len(shown)} more, in the report.")
    return lines


def _findings(quality: ClipQuality) -> str:
    more = len(quality.findings) - MAX_FINDINGS
    return as_text("; ".join(map(str, quality.findings[:MAX_FINDINGS]))) + (f" and {more} more" if more > 0 else "")


def _caption(result: ClipResult) -> str:
    """The words of a link are shown as they are, and those of a clip_id need no escape."""
    url = storage.browser_url(result.video or "")
    return f"{f'[{result.clip_id}]({url})' if url else as_text(result.clip_id)} {result.status}"


def _thumbnail(poster_uri: str) -> str | None:
    """A poster as a data URI of a few kilobytes: a bucket's pictures are not to be had without its own log-in."""
    try:
        with Image.open(io.BytesIO(storage.read_bytes(poster_uri))) as image:
            image.thumbnail((POSTER_WIDTH, POSTER_WIDTH))
            data = io.BytesIO()
            image.convert("RGB").save(data, "JPEG", quality=75)
    except (StorageError, UnidentifiedImageError, OSError) as error:
        logger.info("%s is not shown: %s", poster_uri, error)
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _sentence(words: str) -> str:
    return as_text(words[:1].upper() + words[1:])


def _clock(when: datetime, now: datetime) -> str:
    return when.strftime("%H:%M UTC" if when.date() == now.date() else "%Y-%m-%d %H:%M UTC")


@contextmanager
def _only_logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever Prefect's server says, the clips are rendered
        logger.warning("the run's %s cannot be shown in Prefect's UI: %s", what, error)
