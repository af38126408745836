import csv
import io
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from scail.config import SamplingParams
from scail.quality import QualityLimits, QualityNumbers, Verdict, judge
from tasks import storage
from tasks.forecast import Timing
from tasks.jobs import Attempt, AttemptStage, ClipMetrics, ClipQuality, ClipResult, ClipStatus
from tasks.manifest import parse_manifest, read_manifest
from tasks.results import (
    RunInfo,
    Summary,
    closing_line,
    invalid_results,
    mark_success,
    quality_line,
    summarise,
    write_results,
)

COLUMNS = ("reference", "pose", "prompt")
STAGES = ("fetch", "encode_text", "denoise", "decode_latents", "publish")


def metrics_of(clip_id, *, denoise=40.0, key=None, **changes):
    values = {
        "clip_id": clip_id,
        "key": key or f"key-of-{clip_id}",
        "num_frames": 81,
        "num_dropped_frames": 0,
        "width": 896,
        "height": 512,
        "fps": 16.0,
        "prompt": "a dancer turns",
        "negative_prompt": "",
        "params": SamplingParams(seed=7),
        "reference_uri": "gs://studio/batch/refs/a.png",
        "pose_uri": "gs://studio/batch/poses/a.mp4",
        "reference_size": (1024, 768),
        "pose_size": (512, 896),
        "pose_num_frames": 81,
        "pose_kept_share": 1.0,
        "seconds": dict(zip(STAGES, (1.0, 0.5, denoise, 3.0, 0.5), strict=True)),
        "peak_memory_gib": 61.25,
        "attempts": 1,
        "device": "NVIDIA H200",
        "checkpoint_fingerprint": "0123456789abcdef",
        "versions": {"torch": "2.13.0"},
        "finished_at": "2026-01-02T03:04:05+00:00",
    }
    return ClipMetrics(**values | changes)


def rendered(row, clip_id, *, output_uri="gs://studio/out", columns=None, **changes):
    return ClipResult(
        row=row,
        clip_id=clip_id,
        status=ClipStatus.RENDERED,
        key=f"key-of-{clip_id}",
        video=f"{output_uri}/clips/{clip_id}/video.mp4",
        poster=f"{output_uri}/clips/{clip_id}/poster.jpg",
        metrics=metrics_of(clip_id, **changes),
        columns=columns or dict(zip(COLUMNS, ("refs/a.png", "poses/a.mp4", "a dancer turns"), strict=True)),
    )


def failed(row, clip_id, message="the pose has 3 frames", columns=None):
    return ClipResult(
        row=row,
        clip_id=clip_id,
        status=ClipStatus.FAILED,
        error_class="InvalidInputError",
        message=message,
        columns=columns or dict(zip(COLUMNS, ("refs/a.png", "poses/a.mp4", ""), strict=True)),
    )


def run_of(output_uri="gs://studio/out", **changes):
    start = datetime(2026, 1, 2, 3, 0, tzinfo=UTC)
    values = {
        "run_id": "2026-01-02-quick-otter",
        "manifest_uri": "gs://studio/batch/manifest.csv",
        "output_uri": output_uri,
        "started_at": start,
        "finished_at": start + timedelta(minutes=12),
        "checkpoint_name": "SCAIL_14B",
        "checkpoint_fingerprint": "0123456789abcdef",
        "device": "NVIDIA H200",
        "versions": {"scail": "0.1.0", "torch": "2.13.0"},
    }
    return RunInfo(**values | changes)


@pytest.fixture
def run_dir(tmp_path):
    return str(tmp_path / "out" / "runs" / "r1")


def table(run_dir, name):
    text = storage.read_bytes(storage.join(run_dir, name)).decode()
    return list(csv.reader(io.StringIO(text, newline="")))


def test_results_csv_keeps_every_input_cell_untouched_and_in_order(run_dir):
    manifest = parse_manifest(
        b'pose,notes,reference,prompt\np.mp4,=SUM(A1),r.png,"two\r\nlines, ""quoted"""\n',
        "gs://studio/batch/manifest.csv",
    )
    request = manifest.requests[0]
    result = rendered(2, request.clip_id, columns=request.columns)

    write_results([result], columns=manifest.columns, run_dir_uri=run_dir, run=run_of())

    header, row = table(run_dir, "results.csv")
    assert header[:4] == ["pose", "notes", "reference", "prompt"]
    assert row[:4] == ["p.mp4", "=SUM(A1)", "r.png", 'two\r\nlines, "quoted"']
    assert header[4:] == ["status", "video", "seconds", "cost", "quality", "quality_findings", "error_class", "message"]
    assert row[4:7] == ["rendered", f"gs://studio/out/clips/{request.clip_id}/video.mp4", "45.000"]


def test_results_are_in_the_order_of_the_rows_and_jsonl_reads_back_whole(run_dir):
    results = [rendered(4, "c"), failed(3, "b"), rendered(2, "a")]

    write_results(results, columns=COLUMNS, run_dir_uri=run_dir, run=run_of())

    lines = storage.read_bytes(storage.join(run_dir, "results.jsonl")).decode().splitlines()
    assert [ClipResult.model_validate_json(line) for line in lines] == sorted(results, key=lambda r: r.row)


def test_a_column_of_ours_gives_way_to_an_input_column_of_its_name(run_dir):
    columns = (*COLUMNS, "status", "result_status")
    result = rendered(2, "a", columns=dict.fromkeys(columns, "mine"))

    write_results([result], columns=columns, run_dir_uri=run_dir, run=run_of())

    header, row = table(run_dir, "results.csv")
    assert header[3:6] == ["status", "result_status", "result_result_status"]
    assert row[3:6] == ["mine", "mine", "rendered"]


@pytest.mark.parametrize("message", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_message_never_becomes_a_spreadsheet_formula(run_dir, message):
    write_results([failed(2, "a", message)], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())

    assert table(run_dir, "results.csv")[1][-1] == f"'{message}"


def test_cost_is_stated_only_with_a_price_and_only_for_what_this_run_rendered(run_dir):
    skipped = rendered(3, "b").model_copy(update={"status": ClipStatus.SKIPPED})

    free = write_results([rendered(2, "a")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())
    assert free.cost is None
    assert table(run_dir, "results.csv")[1][6] == ""

    priced = write_results(
        [rendered(2, "a"), skipped], columns=COLUMNS, run_dir_uri=run_dir, run=run_of(price_per_gpu_hour=4.0)
    )
    assert priced.cost == pytest.approx(43.5 / 3600 * 4.0)  # fetching and publishing hold no GPU
    assert [row[5:7] for row in table(run_dir, "results.csv")[1:]] == [["45.000", "0.0483"], ["", ""]]


def test_failures_csv_is_a_manifest_of_the_failed_rows_whose_references_still_resolve(tmp_path):
    manifest_path = tmp_path / "batch" / "manifest.csv"
    manifest_path.parent.mkdir()
    manifest_path.write_text(
        "reference,pose,prompt,notes\nrefs/a.png,poses/a.mp4,one,x\n../b.png,gs://studio/b.mp4,two,\nc.png,c.mp4,,\n"
    )
    manifest = read_manifest(str(manifest_path))
    results = [
        failed(request.row, request.clip_id, columns=request.columns)
        if request.prompt
        else rendered(request.row, request.clip_id, columns=request.columns)
        for request in manifest.requests
    ]
    run_dir = str(tmp_path / "out" / "runs" / "r1")

    write_results(results, columns=manifest.columns, run_dir_uri=run_dir, run=run_of(manifest_uri=manifest.uri))

    again = read_manifest(storage.join(run_dir, "failures.csv"))
    assert not again.problems
    assert [request.reference for request in again.requests] == [
        str(tmp_path / "batch" / "refs" / "a.png"),
        str(tmp_path / "b.png"),
    ]
    assert [request.pose for request in again.requests] == [
        str(tmp_path / "batch" / "poses" / "a.mp4"),
        "gs://studio/b.mp4",
    ]
    assert [request.clip_id for request in again.requests] == [r.clip_id for r in manifest.requests[:2]]
    assert [request.columns["notes"] for request in again.requests] == ["x", ""]


def test_failures_csv_says_why_and_a_row_that_fails_again_says_why_now(run_dir):
    write_results([failed(2, "a", "=1+1 is not finite")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())
    again = parse_manifest(storage.read_bytes(storage.join(run_dir, "failures.csv")), "gs://studio/failures.csv")
    second_dir = storage.join(run_dir, "again")
    row = failed(2, "a", "no such file", columns=again.requests[0].columns)

    write_results([row], columns=again.columns, run_dir_uri=second_dir, run=run_of(manifest_uri=again.uri))

    [before] = [request.columns["failed_before"] for request in again.requests]
    header, cells = table(second_dir, "failures.csv")
    assert before == "InvalidInputError: =1+1 is not finite"
    assert header.count("failed_before") == 1
    assert cells[header.index("failed_before")] == "InvalidInputError: no such file"
    assert table(second_dir, "results.csv")[1][again.columns.index("failed_before")] == before  # an input, untouched


def test_failures_csv_of_a_local_manifest_named_relatively_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    write_results([failed(2, "a")], columns=COLUMNS, run_dir_uri="out/runs/r1", run=run_of(manifest_uri="batch/m.csv"))

    header, row = table("out/runs/r1", "failures.csv")
    assert row[header.index("reference")] == str(tmp_path / "batch" / "refs" / "a.png")


def test_failures_csv_of_a_bucket_names_the_bucket(run_dir):
    write_results([failed(2, "a")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())

    data = storage.read_bytes(storage.join(run_dir, "failures.csv"))
    again = parse_manifest(data, "gs://studio/out/runs/r1/failures.csv")
    assert [(r.clip_id, r.reference) for r in again.requests] == [("a", "gs://studio/batch/refs/a.png")]


def test_invalid_rows_are_in_failures_csv_as_they_came(run_dir):
    manifest = parse_manifest(
        b"reference,pose,prompt\n/etc/passwd,p.mp4,x\nr.png,p.mp4,y\na,b,c,d\n", "gs://studio/batch/manifest.csv"
    )

    write_results(invalid_results(manifest.problems), columns=manifest.columns, run_dir_uri=run_dir, run=run_of())

    header, *rows = table(run_dir, "failures.csv")
    assert header == ["clip_id", "reference", "pose", "prompt", "failed_before"]
    assert rows[0][:4] == ["", "/etc/passwd", "gs://studio/batch/p.mp4", "x"]
    assert rows[0][4].startswith("RowProblem: line 2, column reference")
    assert rows[1][3] == "c"


def test_a_row_with_several_problems_is_one_result_that_names_them_all():
    manifest = parse_manifest(b"reference,pose,seed,fps\n,p.mp4,abc,0\n", "gs://studio/batch/manifest.csv")

    (result,) = invalid_results(manifest.problems)

    assert result.status is ClipStatus.INVALID
    assert result.row == 2
    assert all(f"column {name}" in result.message for name in ("reference", "seed", "fps"))


def test_without_failures_there_is_no_failures_csv(run_dir):
    write_results([rendered(2, "a")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())

    assert not storage.exists(storage.join(run_dir, "failures.csv"))


def test_invalid_rows_whose_cells_are_unknown_give_no_failures_csv_with_a_header_alone(run_dir):
    manifest = parse_manifest(b'{"reference": "r.png", "pose": "p.mp4"}\n{"reference": \n', "gs://studio/batch/m.jsonl")

    write_results(invalid_results(manifest.problems), columns=manifest.columns, run_dir_uri=run_dir, run=run_of())
    storage.publish_bytes(storage.join(run_dir, "report.html"), b"<!doctype html>")

    assert not storage.exists(storage.join(run_dir, "failures.csv"))
    mark_success(run_dir)


def test_attempts_are_counted_by_how_they_ended():
    def attempt(number, outcome):
        now = "2026-01-02T03:00:00.000+00:00"
        return Attempt(
            number=number,
            run_id="r",
            worker="gpu-1:2",
            started_at=now,
            seen_at=now,
            stage=AttemptStage.COMPUTING,
            outcome=outcome,
        )

    log = (attempt(1, None), attempt(2, "OutOfMemoryError"), attempt(3, "published"))
    results = [rendered(2, "a", attempt_log=log, attempts=3), rendered(3, "b"), failed(4, "c")]

    summary = summarise(results, run_of())

    assert summary.attempts == {"published": 2, "InvalidInputError": 1, "WorkerDied": 1, "OutOfMemoryError": 1}


def test_encodings_that_were_reused_are_counted_by_name():
    results = [rendered(2, "a"), rendered(3, "b", cache_hits=("text", "pose")), rendered(4, "c", cache_hits=("text",))]

    assert summarise(results, run_of()).cache_hits == {"text": 2, "pose": 1}


def test_a_run_leaves_what_the_next_forecast_learns_from(run_dir):
    skipped = rendered(4, "c").model_copy(update={"status": ClipStatus.SKIPPED})

    write_results([rendered(2, "a"), failed(3, "b"), skipped], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())

    lines = storage.read_bytes(storage.join(run_dir, "timings.jsonl")).decode().splitlines()
    [timing] = map(Timing.model_validate_json, lines)
    assert (timing.key, timing.denoise_seconds, timing.other_seconds) == ("key-of-a", 40.0, 3.5)


def test_a_summary_of_an_earlier_version_still_reads(run_dir):
    summary = write_results([rendered(2, "a")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())
    earlier = json.loads(summary.model_dump_json(exclude={"attempts", "cache_hits", "num_in_failures_csv"}))

    assert Summary.model_validate(earlier).counts == summary.counts


def test_percentiles_are_those_of_numpy():
    times = [3.0, 50.0, 7.5, 12.25, 9.0, 41.0]

    summary = summarise([rendered(row, f"c{row}", denoise=time) for row, time in enumerate(times)], run_of())

    assert summary.stage_seconds["denoise"].p50 == pytest.approx(np.percentile(times, 50))
    assert summary.stage_seconds["denoise"].p90 == pytest.approx(np.percentile(times, 90))
    assert summary.stage_seconds["denoise"].total == pytest.approx(sum(times))
    assert list(summary.stage_seconds) == list(STAGES)


def test_two_rows_that_share_a_render_count_its_time_once():
    twin = rendered(3, "b", key="key-of-a")

    summary = summarise([rendered(2, "a"), twin], run_of())

    assert summary.counts[ClipStatus.RENDERED] == 2
    assert summary.gpu_seconds == pytest.approx(43.5)
    assert summary.num_frames == 81


def test_a_run_that_rendered_nothing_has_a_summary():
    summary = summarise([], run_of(price_per_gpu_hour=4.0))

    assert (summary.gpu_seconds, summary.clip_seconds, summary.peak_memory_gib, summary.cost) == (0, None, None, 0)


def test_summary_json_reads_back_as_the_summary(run_dir):
    results = [rendered(2, "a"), failed(3, "b")]

    summary = write_results(results, columns=COLUMNS, run_dir_uri=run_dir, run=run_of(price_per_gpu_hour=2.5))

    data = storage.read_bytes(storage.join(run_dir, "summary.json"))
    assert Summary.model_validate_json(data) == summary
    assert json.loads(data)["counts"] == {"rendered": 1, "skipped": 0, "failed": 1, "invalid": 0, "disabled": 0}


def test_the_closing_line_names_invalid_and_disabled_rows_only_if_there_are_any():
    results = [rendered(row, f"c{row}") for row in range(12)] + [failed(20, "f")]

    assert closing_line(summarise(results, run_of()), "out/report.html") == (
        "12 rendered, 0 skipped, 1 failed → out/report.html"
    )
    disabled = ClipResult(row=30, clip_id="d", status=ClipStatus.DISABLED)
    invalid = [ClipResult(row=row, clip_id=f"i{row}", status=ClipStatus.INVALID) for row in (31, 32)]
    assert closing_line(summarise([*results, disabled, *invalid], run_of()), "r") == (
        "12 rendered, 0 skipped, 1 failed, 2 invalid, 1 disabled → r"
    )


@pytest.mark.parametrize("missing", ["results.jsonl", "results.csv", "failures.csv", "summary.json", "report.html"])
def test_success_is_not_marked_while_a_file_is_missing(run_dir, missing):
    write_results([failed(2, "a")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())
    storage.publish_bytes(storage.join(run_dir, "report.html"), b"<!doctype html>")
    storage.local_path(storage.join(run_dir, missing)).unlink()

    with pytest.raises(storage.NotFoundError, match=missing):
        mark_success(run_dir)

    assert not storage.exists(storage.join(run_dir, "_SUCCESS"))


def test_success_is_marked_when_everything_is_there(run_dir):
    write_results([rendered(2, "a")], columns=COLUMNS, run_dir_uri=run_dir, run=run_of())
    storage.publish_bytes(storage.join(run_dir, "report.html"), b"<!doctype html>")

    mark_success(run_dir)

    assert storage.exists(storage.join(run_dir, "_SUCCESS"))


def with_quality(result, **numbers):
    limits = QualityLimits()
    verdict, findings = judge(QualityNumbers(**numbers), limits)
    quality = ClipQuality(
        verdict=verdict, numbers=QualityNumbers(**numbers), findings=findings, limits=limits._asdict()
    )
    return result.model_copy(update={"metrics": result.metrics.model_copy(update={"quality": quality})})


def test_a_clip_beyond_a_limit_is_rendered_and_listed_for_review_with_its_seed(run_dir):
    results = [
        with_quality(rendered(2, "good"), flicker=0.5),
        with_quality(rendered(3, "jumpy"), flicker=4.0, grain=0.5),
        with_quality(rendered(4, "noise"), grain=20.0),
        rendered(5, "unknown"),
        failed(6, "lost"),
    ]

    summary = write_results(results, columns=COLUMNS, run_dir_uri=run_dir, run=run_of())

    assert summary.quality == {Verdict.OK: 1, Verdict.NEEDS_REVIEW: 1, Verdict.FAILED_QUALITY: 1}
    assert quality_line(summary) == "quality: 1 ok, 1 needs_review, 1 failed_quality"
    header, *rows = table(run_dir, "results.csv")
    assert [row[header.index("status")] for row in rows] == ["rendered"] * 4 + ["failed"]
    assert [row[header.index("quality")] for row in rows] == ["ok", "needs_review", "failed_quality", "", ""]
    assert rows[1][header.index("quality_findings")] == "flicker 4, above 2"
    review = read_manifest(storage.join(run_dir, "review.csv"))
    assert not review.problems
    assert [(request.clip_id, request.seed) for request in review.requests] == [("jumpy", 7), ("noise", 7)]
    assert review.requests[0].reference == "gs://studio/batch/refs/a.png"
    assert review.requests[0].columns["quality_findings"] == "flicker 4, above 2"


def test_without_anything_to_review_there_is_no_list_for_it(run_dir):
    summary = write_results(
        [with_quality(rendered(2, "good"), flicker=0.5)], columns=COLUMNS, run_dir_uri=run_dir, run=run_of()
    )

    assert quality_line(summary) is None
    assert not storage.exists(storage.join(run_dir, "review.csv"))
