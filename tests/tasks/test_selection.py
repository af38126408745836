"""Which rows a run takes: by their status in an earlier run, and the first few of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.errors import RefusedError
from tasks.form import RenderOptions
from tasks.selection import choose_rows
from tasks.storage import DEFAULT_POLICY

GOOD_ROWS = [f"clip-{number},ref.png,pose.mp4,prompt {number}" for number in range(4)]


def write_manifest(folder: Path, rows: list[str], header: str = "clip_id,reference,pose,prompt") -> Path:
    path = folder / "m.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def leave_run(
    output: Path,
    run_id: str,
    manifest: Path,
    statuses: dict[tuple[int, str], str],
    verdicts: dict[str, str] | None = None,
) -> None:
    """The files of an earlier run that say which row came to what.

    Args:
        statuses: By line and clip_id.
        verdicts: On clips, by clip_id.
    """
    folder = output / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"run": {"manifest_uri": str(manifest)}}))
    lines = []
    for (row, clip_id), status in statuses.items():
        verdict = (verdicts or {}).get(clip_id)
        metrics = verdict and {"num_frames": 5, "quality": {"verdict": verdict, "numbers": {}}}
        lines.append(json.dumps({"row": row, "clip_id": clip_id, "status": status, "metrics": metrics}))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


def chosen(manifest: Path, output: Path, **options) -> list[str]:
    rows = choose_rows(str(manifest), str(output), RenderOptions(**options), policy=DEFAULT_POLICY)
    return [row.clip_id for row in (*rows.requests, *rows.invalid)]


def test_only_rows_with_one_of_the_statuses_are_taken(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    statuses = ("rendered", "failed", "invalid", "failed")
    run = {(2 + number, f"clip-{number}"): status for number, status in enumerate(statuses)}
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, run)

    def take(*wanted: str) -> list[str]:
        return chosen(manifest, tmp_path / "out", only_status=wanted)

    assert take("failed") == ["clip-1", "clip-3"]
    assert take("failed", "invalid") == ["clip-1", "clip-2", "clip-3"]
    assert take() == ["clip-0", "clip-1", "clip-2", "clip-3"]


def test_rows_are_also_chosen_by_the_verdict_on_their_clip(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    run = {(2, "clip-0"): "failed", (3, "clip-1"): "rendered", (4, "clip-2"): "skipped"}
    verdicts = {"clip-1": "needs_review", "clip-2": "ok"}
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, run, verdicts)

    assert chosen(manifest, tmp_path / "out", only_status=("needs_review",)) == ["clip-1"]
    assert chosen(manifest, tmp_path / "out", only_status=("failed", "needs_review")) == ["clip-0", "clip-1"]


def test_the_limit_counts_the_chosen_rows(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    run = {(2 + number, f"clip-{number}"): "failed" if number else "rendered" for number in range(4)}
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, run)

    assert chosen(manifest, tmp_path / "out", only_status=("failed",), limit=2) == ["clip-1", "clip-2"]


def test_the_newest_run_that_had_a_row_decides(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    everything = {(2 + number, f"clip-{number}"): "failed" for number in range(4)}
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, everything)
    leave_run(tmp_path / "out", "20261102T000000Z-a", manifest, {(2, "clip-0"): "rendered"})  # with a limit of 1
    leave_run(tmp_path / "out", "20261103T000000Z-a", tmp_path / "other.csv", {(3, "clip-1"): "rendered"})

    assert chosen(manifest, tmp_path / "out", only_status=("failed",)) == ["clip-1", "clip-2", "clip-3"]


def test_rows_that_moved_are_known_by_their_id(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, {(2, "clip-0"): "failed", (3, "clip-1"): "rendered"})

    write_manifest(tmp_path, GOOD_ROWS[::-1])

    assert chosen(manifest, tmp_path / "out", only_status=("failed",)) == ["clip-0"]


def test_a_mended_row_without_an_id_is_known_by_its_line(tmp_path):
    manifest = write_manifest(tmp_path, ["ref.png,gone.mp4", "ref.png,pose.mp4"], header="reference,pose")
    first, second = chosen(manifest, tmp_path / "out")
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, {(2, first): "failed", (3, second): "rendered"})

    write_manifest(tmp_path, ["ref.png,found.mp4", "ref.png,pose.mp4"], header="reference,pose")
    [mended] = chosen(manifest, tmp_path / "out", only_status=("failed",))

    assert mended not in {first, second}


def test_rows_that_are_still_malformed_are_chosen_as_well(tmp_path):
    manifest = write_manifest(tmp_path, [*GOOD_ROWS, "../up,ref.png,pose.mp4,"])
    run = {(2, "clip-0"): "failed", (3, "clip-1"): "rendered", (6, "line-6"): "invalid"}
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, run)

    def take(status: str) -> list[str]:
        return chosen(manifest, tmp_path / "out", only_status=(status,), skip_invalid=True)

    assert take("failed") == ["clip-0"]
    assert len(take("invalid")) == 1


def test_without_an_earlier_run_there_is_no_status_to_choose_by(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    leave_run(tmp_path / "out", "20261101T000000Z-a", tmp_path / "other.csv", {(2, "clip-0"): "failed"})

    with pytest.raises(RefusedError, match=r"was not rendered to .* before"):
        chosen(manifest, tmp_path / "out", only_status=("failed",))


def test_an_earlier_run_that_cannot_be_read_is_no_empty_one(tmp_path):
    manifest = write_manifest(tmp_path, GOOD_ROWS)
    leave_run(tmp_path / "out", "20261101T000000Z-a", manifest, {(2, "clip-0"): "failed"})
    (tmp_path / "out" / "runs" / "20261101T000000Z-a" / "results.jsonl").write_text('{"row": 2}\n')

    with pytest.raises(RefusedError, match="cannot be read"):
        chosen(manifest, tmp_path / "out", only_status=("failed",))
