"""A run as Prefect's UI shows it: what it says, and that a manifest's words stay words."""

from __future__ import annotations

import base64
import io
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image

from tasks import storage
from tasks.artifacts import POSTER_WIDTH, artifact_key, as_text, progress_text, summary_markdown
from tasks.forecast import Forecast
from tasks.jobs import ClipResult, ClipStatus
from tasks.results import RunInfo, Summary, summarise
from tasks.run_status import ClipNote, RunState, RunStatus

NOW = datetime(2026, 11, 25, 13, 50, tzinfo=UTC)
FORECAST = Forecast(3, "NVIDIA H200", 7200.0, None, None, "learned from 9 earlier clips")


def status(**changes) -> RunStatus:
    """A run of 12 rows, of which one is rendered."""
    values = {
        "run_id": "r",
        "state": RunState.RUNNING,
        "manifest": "gs://studio/spring.csv",
        "output": "gs://studio/out",
        "started_at": NOW,
        "updated_at": NOW,
        "num_rows": 12,
        "num_settled": 1,
        "counts": dict.fromkeys(ClipStatus, 0) | {ClipStatus.RENDERED: 1},
        "eta_seconds": 900.0,
        "last_clip": None,
        "report": None,
    }
    return RunStatus(**(values | changes))


def summary_of(results: list[ClipResult], **changes) -> Summary:
    run = RunInfo(
        run_id="r",
        manifest_uri="gs://studio/spring.csv",
        output_uri="gs://studio/out",
        started_at=NOW,
        finished_at=NOW + timedelta(minutes=3),
        checkpoint_name="SCAIL_14B",
        checkpoint_fingerprint="f",
        device="NVIDIA H200",
        versions={},
    )
    return summarise(results, run.model_copy(update=changes))


def result(clip_id: str, status: ClipStatus, **changes) -> ClipResult:
    return ClipResult(row=2, clip_id=clip_id, status=status, **changes)


def test_progress_says_when_it_will_be_ready():
    assert progress_text(status(), FORECAST) == ("**1 of 12 rows**, ready in 15 min 00 s at 14:05 UTC. 1 rendered")


def test_before_the_first_clip_the_forecast_speaks():
    text = progress_text(status(num_settled=0, counts=dict.fromkeys(ClipStatus, 0), eta_seconds=None), FORECAST)

    assert "2 h 00 min of GPU time" in text


def test_the_newest_failure_is_shown_while_the_run_goes_on():
    note = ClipNote(
        row=3,
        clip_id="mira",
        status=ClipStatus.FAILED,
        video=None,
        seconds=None,
        error_class="X",
        message="no such file",
    )

    assert progress_text(status(last_clip=note), FORECAST).endswith(". mira: no such file")


def test_a_run_that_was_stopped_says_why():
    assert "then stopped: KeyboardInterrupt" in progress_text(
        status(state=RunState.STOPPED, message="KeyboardInterrupt", eta_seconds=None), FORECAST
    )


def test_the_summary_shows_posters_failures_and_the_report():
    picture = io.BytesIO()
    Image.new("RGB", (896, 512), (200, 30, 30)).save(picture, "JPEG")
    storage.publish_bytes("memory://studio/poster.jpg", picture.getvalue())
    video = "gs://studio/out/clips/mira walk/video.mp4"
    results = [
        result("nils", ClipStatus.FAILED, message="line 3, column pose: no such file"),
        result("mira", ClipStatus.RENDERED, poster="memory://studio/poster.jpg", video=video),
    ]

    page = summary_markdown(results, summary=summary_of(results), report_uri="gs://studio/out/report.html")

    assert page.startswith("# spring.csv: 1 rendered, 0 skipped, 1 failed\n")
    assert "(https://storage.cloud.google.com/studio/out/report.html)" in page
    assert "- **nils** (failed): line 3, column pose: no such file" in page
    assert "[mira](https://storage.cloud.google.com/studio/out/clips/mira%20walk/video.mp4) rendered" in page
    encoded = page.partition("data:image/jpeg;base64,")[2].partition(")")[0]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as shown:
        assert shown.size == (POSTER_WIDTH, round(POSTER_WIDTH * 512 / 896))


def test_a_local_output_has_no_link_that_a_browser_would_not_follow():
    page = summary_markdown([], summary=summary_of([], output_uri="/data/out"), report_uri="/data/out/report.html")

    assert "`/data/out/report.html`" in page
    assert "](" not in page


@pytest.mark.parametrize(
    "words",
    [
        "[click](https://evil.example)",
        "<img src=x onerror=alert(1)>",
        "**bold** `code`",
        "| a | b |",
        "# title",
        "&lt;",
    ],
)
def test_what_a_manifest_says_stays_text(words):
    results = [result("nils", ClipStatus.FAILED, message=words)]

    page = summary_markdown(results, summary=summary_of(results), report_uri="/out/report.html")

    assert f"failed): {as_text(words)}\n" in page
    assert as_text(words) != words
    assert "<" not in as_text(words)


def test_keys_are_what_prefect_takes():
    assert artifact_key("gs://studio/2026-11 Spring.CSV", "results") == "2026-11-spring-csv-results"
    assert artifact_key("gs://studio/…", "results") == "manifest-results"
