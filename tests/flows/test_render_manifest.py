"""One manifest through the whole program: what is rendered, what is written, what a failure does."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from flows.render_manifest import render_manifest
from scail import ScailPipeline
from scail.probe import probe_video
from tasks import errors, render, storage
from tasks.errors import RefusedError
from tasks.form import RenderOptions
from tasks.jobs import ClipStatus
from tasks.manifest import read_manifest
from tasks.results import Summary, summary_in


def run(manifest: Path, output: Path, checkpoint: Path, **options) -> tuple[bool, Summary]:
    chosen = RenderOptions(checkpoint=str(checkpoint), **options)
    state = render_manifest(str(manifest), str(output), chosen, return_state=True)
    result = state.result(raise_on_failure=False)
    if (summary := summary_in(result)) is None:
        raise result
    return state.is_completed(), summary


def rows_of(summary: Summary, name: str = "results.csv") -> list[dict[str, str]]:
    path = Path(summary.run.output_uri) / "runs" / summary.run.run_id / name
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_manifest_is_rendered_with_one_load_of_the_model(write_manifest, media, tmp_path, checkpoint, monkeypatch):
    loads = []
    from_pretrained = ScailPipeline.from_pretrained
    monkeypatch.setattr(
        ScailPipeline, "from_pretrained", lambda *args, **kwargs: loads.append(args) or from_pretrained(*args, **kwargs)
    )
    manifest = write_manifest(
        {"clip_id": "one"}, {"clip_id": "two", "reference": media / "ref2.png"}, {"clip_id": "three", "seed": 7}
    )

    ok, summary = run(manifest, tmp_path / "out", checkpoint)

    assert ok
    assert summary.counts[ClipStatus.RENDERED] == 3
    assert len(loads) == 1
    assert [row["status"] for row in rows_of(summary)] == ["rendered"] * 3
    run_dir = tmp_path / "out" / "runs" / summary.run.run_id
    for name in ("results.jsonl", "results.csv", "summary.json", "report.html", "_SUCCESS"):
        assert (run_dir / name).exists(), name
    assert not (run_dir / "failures.csv").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_metrics_say_what_was_rendered_and_where_the_time_went(write_manifest, media, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "eleven", "pose": media / "pose11.mp4", "seed": 3})

    run(manifest, tmp_path / "out", checkpoint)

    metrics = json.loads((tmp_path / "out" / "clips" / "eleven" / "metrics.json").read_text())
    assert (metrics["num_frames"], metrics["num_dropped_frames"]) == (9, 2)
    assert (metrics["height"], metrics["width"], metrics["fps"]) == (64, 96, 24.0)
    assert metrics["params"] == {
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "shift": 5.0,
        "seed": 3,
        "solver": "euler",
    }
    assert list(metrics["seconds"]) == [
        "fetch",
        "decode",
        "preprocess",
        "encode_text",
        "encode_image",
        "encode_pose",
        "denoise",
        "decode_latents",
        "quality",
        "encode_mp4",
        "publish",
    ]
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())
    assert metrics["peak_memory_gib"] > 0
    assert metrics["versions"]["torch"]
    assert metrics["attempts"] == 1


def test_the_video_has_the_frames_the_rate_and_its_provenance(write_manifest, tmp_path, checkpoint):
    run(write_manifest({"clip_id": "clip", "seed": 5}), tmp_path / "out", checkpoint)

    video = tmp_path / "out" / "clips" / "clip" / "video.mp4"
    info = probe_video(video)
    assert (info.num_frames, info.width, info.height, info.fps) == (5, 96, 64, 24.0)
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    data = video.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    assert b'"prompt": "a dancer"' in data
    assert b'"seed": 5' in data


def test_a_row_whose_file_is_missing_fails_alone(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest(
        {"clip_id": "good"}, {"clip_id": "gone", "pose": tmp_path / "gone.mp4"}, {"clip_id": "good-too", "seed": 2}
    )

    ok, summary = run(manifest, tmp_path / "out", checkpoint)

    assert not ok
    assert [row["status"] for row in rows_of(summary)] == ["rendered", "failed", "rendered"]
    message = rows_of(summary)[1]["message"]
    assert "line 3" in message
    assert "pose" in message
    assert "gone.mp4" in message
    [failure] = read_manifest(str(tmp_path / "out" / "runs" / summary.run.run_id / "failures.csv")).requests
    assert failure.clip_id == "gone"


@pytest.mark.parametrize(
    ("column", "content", "expected"),
    [
        ("reference", b"", "empty"),
        ("reference", b"<html>no such picture</html>", "HTML"),
        ("pose", b"just some text, not a video at all", "video"),
    ],
)
def test_a_file_with_wrong_content_fails_its_row(column, content, expected, write_manifest, tmp_path, checkpoint):
    path = tmp_path / f"bad-{column}.bin"
    path.write_bytes(content)

    ok, summary = run(write_manifest({"clip_id": "bad", column: path}), tmp_path / "out", checkpoint)

    message = rows_of(summary)[0]["message"]
    assert not ok
    assert f"line 2, column {column}" in message
    assert expected in message
    assert not (tmp_path / "out" / "clips").exists()


def test_a_pose_that_lies_across_the_reference_fails_its_row(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "across", "width": 64, "height": 160})

    ok, summary = run(manifest, tmp_path / "out", checkpoint)

    assert not ok
    assert "column reference" in rows_of(summary)[0]["message"]


def test_a_second_run_skips_what_is_done_and_a_changed_row_renders_alone(write_manifest, tmp_path, checkpoint):
    run(write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 2}), tmp_path / "out", checkpoint)

    _, again = run(write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 2}), tmp_path / "out", checkpoint)
    _, changed = run(write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 3}), tmp_path / "out", checkpoint)
    _, back = run(write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 2}), tmp_path / "out", checkpoint)

    assert again.counts[ClipStatus.SKIPPED] == 2
    assert [row["status"] for row in rows_of(changed)] == ["skipped", "rendered"]
    assert [row["status"] for row in rows_of(back)] == ["skipped", "rendered"]  # clips/b held the other seed's video


def test_rows_with_equal_content_are_rendered_once_and_both_reported(write_manifest, tmp_path, checkpoint):
    _, summary = run(write_manifest({"clip_id": "a"}, {"clip_id": "b"}), tmp_path / "out", checkpoint)

    first, second = rows_of(summary)
    assert (first["status"], second["status"]) == ("rendered", "skipped")
    assert first["video"] == second["video"] != ""
    assert second["message"] == "same content as a"


def test_the_seed_of_a_row_without_one_does_not_depend_on_its_place(write_manifest, media, tmp_path, checkpoint):
    other = {"clip_id": "other", "reference": media / "ref2.png"}
    run(write_manifest({"clip_id": "clip"}, other), tmp_path / "first", checkpoint)
    run(write_manifest(other, {"clip_id": "clip"}), tmp_path / "second", checkpoint)

    first, second = (
        json.loads((tmp_path / name / "clips" / "clip" / "metrics.json").read_text()) for name in ("first", "second")
    )
    assert first["params"]["seed"] == second["params"]["seed"]
    assert first["key"] == second["key"]


def test_a_transient_storage_error_is_tried_again_without_rendering_again(
    write_manifest, tmp_path, checkpoint, monkeypatch
):
    publish_file, failures, renders = storage.publish_file, [], []
    render_to_folder = render.render_to_folder

    def flaky(path: Path, uri: str, **kwargs) -> str:
        if len(failures) < 2:
            failures.append(uri)
            raise storage.StorageError(f"{uri}: 503", transient=True)
        return publish_file(path, uri, **kwargs)

    monkeypatch.setattr(storage, "publish_file", flaky)
    monkeypatch.setattr(
        render, "render_to_folder", lambda *args, **kwargs: renders.append(1) or render_to_folder(*args, **kwargs)
    )
    monkeypatch.setattr(render.render_clip, "retry_delay_seconds", [0, 0])

    ok, _ = run(write_manifest({"clip_id": "clip"}), tmp_path / "out", checkpoint)

    assert ok
    assert len(failures) == errors.MAX_ATTEMPTS - 1
    assert len(renders) == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_bad_input_is_tried_once(write_manifest, tmp_path, checkpoint, monkeypatch):
    tries = []
    monkeypatch.setattr(render, "decode_inputs", lambda *_args, **_kwargs: tries.append(1) or 1 / 0)

    ok, _ = run(write_manifest({"clip_id": "clip"}), tmp_path / "out", checkpoint)

    assert not ok
    assert len(tries) == 1


def test_malformed_rows_refuse_the_run_and_all_are_listed(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest(
        {"clip_id": "good"}, {"clip_id": "../up"}, {"clip_id": "c", "num_inference_steps": "many"}
    )

    with pytest.raises(RefusedError) as refused:
        run(manifest, tmp_path / "out", checkpoint)

    assert len(refused.value.lines) == 2
    assert "line 3, column clip_id" in refused.value.lines[0]
    assert "line 4, column num_inference_steps: came 'many'" in refused.value.lines[1]
    assert not (tmp_path / "out").exists()


def test_skip_invalid_renders_the_good_rows_and_reports_the_others(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "good"}, {"clip_id": "bad", "width": 100})

    ok, summary = run(manifest, tmp_path / "out", checkpoint, skip_invalid=True)

    assert not ok
    assert [row["status"] for row in rows_of(summary)] == ["rendered", "invalid"]
    assert "multiple of 32" in rows_of(summary)[1]["message"]


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(write_manifest, tmp_path, checkpoint):
    def dry(*rows: dict[str, object]):
        options = RenderOptions(checkpoint=str(checkpoint), dry_run=True)
        return render_manifest(str(write_manifest(*rows)), str(tmp_path / "out"), options, return_state=True)

    good = dry({"clip_id": "a"}, {"clip_id": "b"})
    bad = dry({"clip_id": "a"}, {"clip_id": "b", "pose": tmp_path / "gone.mp4"})

    assert good.is_completed()
    assert good.message.startswith("dry run: 1 to render, 1 repeated, 0 invalid; ")
    assert bad.is_failed()
    assert "b: line 3, column pose: " in bad.message
    assert not (tmp_path / "out").exists()


def test_limit_takes_the_first_rows(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 2}, {"clip_id": "c", "seed": 3})

    _, summary = run(manifest, tmp_path / "out", checkpoint, limit=1)

    assert [row["clip_id"] for row in rows_of(summary)] == ["a"]


def test_higher_priority_comes_first(write_manifest, tmp_path, checkpoint):
    high = [{"clip_id": f"high-{seed}", "priority": 5, "seed": seed} for seed in (1, 2)]  # a worker takes two at once
    manifest = write_manifest({"clip_id": "low", "priority": 0, "seed": 3}, *high)

    run(manifest, tmp_path / "out", checkpoint)

    published = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/clips/*/metrics.json")}
    assert max(published, key=lambda clip_id: published[clip_id]) == "low"


def test_the_checkpoint_must_be_the_one_that_was_planned_for(write_manifest, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("tasks.checkpoint.model_fingerprint", lambda _folder, _loras: "another")

    ok, summary = run(write_manifest({"clip_id": "clip"}), tmp_path / "out", checkpoint)

    assert not ok
    assert rows_of(summary)[0]["error_class"] == "CheckpointError"


def test_ffmpeg_plays_every_frame_of_the_video(write_manifest, tmp_path, checkpoint):
    from scail.ffmpeg_process import find_ffmpeg

    run(write_manifest({"clip_id": "clip"}), tmp_path / "out", checkpoint)

    video = tmp_path / "out" / "clips" / "clip" / "video.mp4"
    command = [str(find_ffmpeg()), "-v", "error", "-xerror", "-i", str(video), "-f", "framemd5", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == 5
