"""What a run leaves behind besides its clips: results joined to rows, failures as a manifest, a summary.

OUTPUT/runs/<run id>/
    results.jsonl   every result whole, in the order of the rows
    results.csv     every input column untouched and in its order, then our own: status, video, seconds, cost,
                    quality, quality_findings, error_class, message; one of ours that an input column is named like is
                    called `result_…`
    review.csv      only if the quality of a clip is beyond a limit: those rows as a manifest, with the seeds that were
                    used and what was found; a clip of another seed is another clip
    failures.csv    only if a row failed or was invalid: those rows as a manifest with what is wrong in the column
                    `failed_before`, references made absolute; from a local manifest these are local paths, which a
                    manifest in a bucket may not name: render a copy
    timings.jsonl   a sample of what the rendered clips took, from which the next forecast learns
    summary.json    counts, times, attempts, cache hits, memory, cost, versions
    report.html     written by tasks/report.py
    status.json     written by tasks/notify.py while the run goes on
    _SUCCESS        written last, when everything else is there
"""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

from pydantic import AwareDatetime, BaseModel, ConfigDict

from scail.errors import InvalidInputError
from scail.quality import Verdict
from tasks import storage
from tasks.figures import cost_of, gpu_seconds, percentile
from tasks.forecast import TIMINGS, timings_of
from tasks.jobs import ClipMetrics, ClipResult, ClipStatus
from tasks.manifest import URI_COLUMNS
from tasks.packed import PackedResults
from tasks.references import resolve_reference
from tasks.tables import RowProblem

logger = logging.getLogger(__name__)

FAILED_BEFORE = "failed_before"  # of failures.csv; to the next run a column like any other
RESULT_COLUMNS = ("status", "video", "seconds", "cost", "quality", "quality_findings", "error_class", "message")
SUCCESS = "_SUCCESS"
MAX_TROUBLE_LINES = 3
WORKER_DIED = "WorkerDied"  # what an attempt is counted as that has no outcome

NOT_DONE = (ClipStatus.FAILED, ClipStatus.INVALID)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_Frozen = ConfigDict(frozen=True, extra="forbid")


class RunInfo(BaseModel):
    """Which run it was: what it read, where it wrote, with which weights and versions."""

    model_config = _Frozen

    run_id: str
    manifest_uri: str
    output_uri: str
    started_at: AwareDatetime
    finished_at: AwareDatetime
    checkpoint_name: str
    checkpoint_fingerprint: str
    device: str
    versions: dict[str, str]
    price_per_gpu_hour: float | None = None  # None: cost is not stated
    notice: str | None = None  # shown on top of the report, such as "random weights: the pictures are noise"


class Spread(BaseModel):
    """How a time varied between clips, in seconds."""

    model_config = _Frozen

    p50: float
    p90: float
    total: float


class Summary(BaseModel):
    """A run's summary.json. Times, frames and memory are of the clips that this run rendered itself."""

    model_config = _Frozen

    run: RunInfo
    counts: dict[ClipStatus, int]  # every status, also those that did not occur
    gpu_seconds: float  # how long clips held a GPU; what goes on beside the GPU's work is not in it
    clip_seconds: Spread | None  # all stages together
    stage_seconds: dict[str, Spread]  # in the order in which the stages run
    peak_memory_gib: float | None
    num_frames: int
    cost: float | None
    attempts: dict[str, int] = {}  # by how they ended: `published`, the class of an error, or the worker's death
    cache_hits: dict[str, int] = {}  # encodings that an earlier clip on the same worker had computed, by name
    num_in_failures_csv: int = 0  # rows that can be mended and rendered again
    quality: dict[Verdict, int] = {}  # of every clip that is there, also of those rendered before; all three verdicts
    num_in_review_csv: int = 0  # rows whose clip somebody should look at


class RowsFailedError(Exception):
    """Rows have no clip. It is never raised: a failed state of Prefect's holds nothing but an exception.

    Attributes:
        summary: Of the run, which was carried through all the same; None if it was dry.
    """

    def __init__(self, message: str, summary: Summary | None) -> None:
        super().__init__(message)
        self.summary = summary


def summary_in(result: object) -> Summary | None:
    """The summary that the result of a run's state holds; None if the run came to nothing."""
    found = result.summary if isinstance(result, RowsFailedError) else result
    return found if isinstance(found, Summary) else None


def write_results(
    results: Collection[ClipResult], *, columns: Sequence[str], run_dir_uri: str, run: RunInfo
) -> Summary:
    """Write results.jsonl, results.csv, failures.csv and summary.json of a run.

    Args:
        results: One per row of the manifest, in any order.
        columns: The manifest's columns in the order of the file.
        run_dir_uri: OUTPUT/runs/<run id>.
        run: What is known of the run itself.

    Raises:
        StorageError: If a file cannot be written.
    """
    ordered = results if isinstance(results, PackedResults) else PackedResults(results)
    summary = summarise(ordered, run)
    texts = {
        "results.jsonl": "".join(f"{result.model_dump_json()}\n" for result in ordered),
        "results.csv": _results_csv(ordered, columns, run.price_per_gpu_hour),
        "summary.json": summary.model_dump_json(indent=2) + "\n",
    }
    if summary.num_in_failures_csv:
        texts["failures.csv"] = _failures_csv(ordered, columns, run.manifest_uri)
    if summary.num_in_review_csv:
        texts["review.csv"] = _review_csv(ordered, columns, run.manifest_uri)
    if timings := timings_of(_rendered_metrics(ordered)):
        texts[TIMINGS] = "".join(f"{timing.model_dump_json()}\n" for timing in timings)
    for name, text in texts.items():
        storage.publish_bytes(storage.join(run_dir_uri, name), text.encode())
    logger.info("wrote the results of %d rows to %s", len(ordered), run_dir_uri)
    return summary


def invalid_results(problems: Iterable[RowProblem]) -> list[ClipResult]:
    """The rows that could not be read, one result each with all that is wrong with it."""
    results = []
    for row, group in groupby(sorted(problems, key=lambda problem: problem.row), key=lambda problem: problem.row):
        of_row = list(group)
        results.append(
            ClipResult(
                row=row,
                clip_id=of_row[0].clip_id or f"line-{row}",
                status=ClipStatus.INVALID,
                error_class="RowProblem",
                message="; ".join(str(problem) for problem in of_row),
                columns=of_row[0].columns,
            )
        )
    return results


def summarise(results: Iterable[ClipResult], run: RunInfo) -> Summary:
    """Counts of all rows, and measurements of those that this run rendered."""
    rendered = _rendered_metrics(results)
    totals = [metrics.total_seconds for metrics in rendered]
    on_gpu = sum(gpu_seconds(metrics.seconds) for metrics in rendered)
    stages = dict.fromkeys(stage for metrics in rendered for stage in metrics.seconds)
    counts = Counter(result.status for result in results)
    return Summary(
        run=run,
        counts={status: counts[status] for status in ClipStatus},
        gpu_seconds=on_gpu,
        clip_seconds=_spread(totals) if totals else None,
        stage_seconds={
            stage: _spread([metrics.seconds[stage] for metrics in rendered if stage in metrics.seconds])
            for stage in stages
        },
        peak_memory_gib=max((metrics.peak_memory_gib for metrics in rendered), default=None),
        num_frames=sum(metrics.num_frames for metrics in rendered),
        cost=cost_of(on_gpu, run.price_per_gpu_hour),
        attempts=_attempts(results, rendered),
        cache_hits=dict(Counter(hit for metrics in rendered for hit in metrics.cache_hits)),
        num_in_failures_csv=sum(map(_is_mendable, results)),
        quality=dict.fromkeys(Verdict, 0) | Counter(result.quality.verdict for result in results if result.quality),
        num_in_review_csv=sum(result.is_to_review for result in results),
    )


def closing_line(summary: Summary, report_uri: str) -> str:
    """The last line on stdout: `12 rendered, 3 skipped, 1 failed → OUTPUT/report.html`."""
    return f"{counts_line(summary.counts)} → {report_uri}"


def counts_line(counts: Mapping[ClipStatus, int]) -> str:
    """`12 rendered, 3 skipped, 1 failed`; other statuses only where they occurred."""
    always = (ClipStatus.RENDERED, ClipStatus.SKIPPED, ClipStatus.FAILED)
    return ", ".join(f"{counts[status]} {status}" for status in ClipStatus if status in always or counts[status])


def trouble_lines(results: Iterable[ClipResult]) -> list[str]:
    """The first few rows that have no clip, one line each with the reason; empty if every row has its own."""
    troubled = sorted((result for result in results if result.status in NOT_DONE), key=lambda result: result.row)
    lines = [f"{result.clip_id}: {result.message or result.status}" for result in troubled[:MAX_TROUBLE_LINES]]
    return [*lines, f"and {len(troubled) - len(lines)} more"] if len(troubled) > len(lines) else lines


def quality_line(summary: Summary) -> str | None:
    """`quality: 9 ok, 2 needs_review, 1 failed_quality`, or None if there is nothing to look at."""
    if not summary.num_in_review_csv:
        return None
    return "quality: " + ", ".join(f"{count} {verdict}" for verdict, count in summary.quality.items())


def mark_success(run_dir_uri: str) -> None:
    """Write `_SUCCESS`: whoever waits for it finds everything else.

    It says that the run is complete, not that every row was rendered: that is in the summary.

    Raises:
        NotFoundError: If a file of the run is not there; then nothing is written.
    """
    summary = Summary.model_validate_json(storage.read_bytes(storage.join(run_dir_uri, "summary.json")))
    names = ["results.jsonl", "results.csv", "report.html"]
    names += ["failures.csv"] if summary.num_in_failures_csv else []
    names += ["review.csv"] if summary.num_in_review_csv else []
    missing = [name for name in names if not storage.exists(storage.join(run_dir_uri, name))]
    if missing:
        raise storage.NotFoundError(f"{run_dir_uri} has no {', '.join(missing)}: the run is not complete")
    storage.publish_bytes(storage.join(run_dir_uri, SUCCESS), b"")


def _is_mendable(result: ClipResult) -> bool:
    """Whether the row has no clip and its cells could be told apart."""
    return result.status in NOT_DONE and bool(result.columns)


def _rendered_metrics(results: Iterable[ClipResult]) -> list[ClipMetrics]:
    """Of each clip that was rendered; two rows that ask for the same pixels share one render."""
    by_key: dict[str, ClipMetrics] = {}
    for result in results:
        if result.status is ClipStatus.RENDERED and result.metrics:
            by_key.setdefault(result.metrics.key, result.metrics)
    return list(by_key.values())


def _attempts(results: Iterable[ClipResult], rendered: Iterable[ClipMetrics]) -> dict[str, int]:
    """How the attempts at this run's clips ended, also those that other runs had made before."""
    outcomes = Counter(result.error_class for result in results if result.status is ClipStatus.FAILED)
    for metrics in rendered:
        outcomes.update(attempt.outcome or WORKER_DIED for attempt in metrics.attempt_log)
        if not metrics.attempt_log:
            outcomes.update(["published"])
    return {outcome or "unknown": count for outcome, count in outcomes.most_common()}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(p50=percentile(values, 0.5), p90=percentile(values, 0.9), total=sum(values))


def _results_csv(results: Iterable[ClipResult], columns: Sequence[str], price: float | None) -> str:
    header = [*columns]
    for name in RESULT_COLUMNS:
        own_name = name
        while own_name in header:
            own_name = f"result_{own_name}"
        header.append(own_name)
    rows = []
    for result in results:
        seconds, cost = None, None
        if result.status is ClipStatus.RENDERED and result.metrics:
            seconds = result.metrics.total_seconds
            cost = cost_of(gpu_seconds(result.metrics.seconds), price)
        own_cells = (
            str(result.status),
            result.video or "",
            "" if seconds is None else f"{seconds:.3f}",
            "" if cost is None else f"{cost:.4f}",
            str(result.quality.verdict) if result.quality else "",
            result.quality.note if result.quality else "",
            _no_formula(result.error_class or ""),
            _no_formula(result.message or ""),
        )
        rows.append([*(result.columns.get(name, "") for name in columns), *own_cells])
    return _csv(header, rows)


def _failures_csv(results: Iterable[ClipResult], columns: Sequence[str], manifest_uri: str) -> str:
    """The rows that have no clip yet, as a manifest: mend what is wrong and render this file.

    A failed row keeps its clip's id, also one that was derived from its content, so that what is rendered from
    this file lies where the first run would have put it. A record whose cells could not be told apart is left out.
    """
    rows = []
    for result in results:
        if _is_mendable(result):
            cells = _absolute_cells(result, manifest_uri)
            if result.status is not ClipStatus.FAILED and not result.columns.get("clip_id", "").strip():
                cells["clip_id"] = ""
            cells[FAILED_BEFORE] = _no_formula(f"{result.error_class}: {result.message}")
            rows.append(cells)
    return _manifest(rows, columns, before=("clip_id",), after=(FAILED_BEFORE,))


def _review_csv(results: Iterable[ClipResult], columns: Sequence[str], manifest_uri: str) -> str:
    """The rows whose clip is beyond a limit, as a manifest: change a seed, or whatever it may be, and render it."""
    rows = []
    for result in results:
        if result.is_to_review and result.metrics and result.quality:
            own = {"seed": str(result.metrics.params.seed), "quality_findings": result.quality.note}
            rows.append(_absolute_cells(result, manifest_uri) | own)
    return _manifest(rows, columns, before=("clip_id", "seed"), after=("quality_findings",))


def _absolute_cells(result: ClipResult, manifest_uri: str) -> dict[str, str]:
    """A row's cells for a manifest that lies elsewhere, with the clip's id."""
    cells = dict(result.columns)
    for name in URI_COLUMNS:
        cells[name] = _absolute(manifest_uri, cells.get(name, ""))
    cells["clip_id"] = cells.get("clip_id", "").strip() or result.clip_id
    return cells


def _manifest(
    rows: Iterable[dict[str, str]], columns: Sequence[str], *, before: Sequence[str], after: Sequence[str]
) -> str:
    """Rows under the manifest's own columns, and under those of ours that it does not have."""
    first, last = ([name for name in ours if name not in columns] for ours in (before, after))
    header = [*first, *columns, *last]
    return _csv(header, ([row.get(name, "") for name in header] for row in rows))


def _absolute(manifest_uri: str, cell: str) -> str:
    if not cell.strip():
        return cell
    try:
        resolved = resolve_reference(manifest_uri, cell.strip())
    except InvalidInputError:
        return cell  # what is wrong with it stays to be seen and mended
    path = storage.local_path(resolved)
    return resolved if path is None else str(path.absolute())


def _no_formula(text: str) -> str:
    """A cell of ours that no spreadsheet takes for a formula; a message may quote what somebody else wrote."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    # CRLF, since Python 3.11 quotes a cell for no other line break than the one it writes itself.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
