"""The `scail` command as a script sees it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from scail import __version__
from scail.checkpoint import write_random_checkpoint
from scail.config import PROFILES, SCAIL_TINY
from scail.probe import probe_video
from tests.flows.conftest import HEIGHT, WIDTH
from tests.scail import layouts


def scail(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_last_line_counts_the_clips_and_names_the_report(write_manifest, tmp_path, checkpoint):
    result = scail("render", write_manifest({"clip_id": "a"}), "--output", tmp_path / "out", "--checkpoint", checkpoint)

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"1 rendered, 0 skipped, 0 failed → {tmp_path}/out/report.html"
    assert "pictures are noise" in result.stderr


def test_a_failed_row_gives_exit_code_1(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "a", "pose": tmp_path / "none.mp4"})

    result = scail("render", manifest, "--output", tmp_path / "out", "--checkpoint", checkpoint)

    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("0 rendered, 0 skipped, 1 failed")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file"),
        (b"", "empty"),
        (b"clip_id,reference,pose\n", "no row"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG"),
        (b"reference,pose,promt\na.png,b.mp4,hello\n", "did you mean `prompt`?"),
        (b"clip_id,reference,pose\nx,a.png,b.mp4\nx,c.png,d.mp4\n", "x"),
        (b"reference,pose\n,b.mp4\n", "column reference"),
        (b"reference,pose,mode\na.png,b.mp4,replace\n", "column mode"),
    ],
)
def test_a_manifest_that_cannot_be_used_gives_exit_code_2(content, expected, tmp_path, checkpoint):
    manifest = tmp_path / "manifest.csv"
    if content is not None:
        manifest.write_bytes(content)

    result = scail("render", manifest, "--output", tmp_path / "out", "--checkpoint", checkpoint)

    assert result.exit_code == 2
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_used_gives_exit_code_2(write_manifest, tmp_path):
    without_weights, of_another_size = tmp_path / "without_weights", tmp_path / "of_another_size"
    for folder in (without_weights, of_another_size):
        write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    (without_weights / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    config = of_another_size / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    manifest = write_manifest({"clip_id": "a"})

    for folder, expected in (
        (tmp_path / "nowhere", "is not a folder"),
        (without_weights, "diffusion_pytorch_model.safetensors is missing"),
        (of_another_size, "blocks.2"),
    ):
        result = scail("render", manifest, "--output", tmp_path / "out", "--checkpoint", folder)

        assert result.exit_code == 2, folder
        assert expected in result.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(write_manifest, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "a"}, {"clip_id": "b", "pose": tmp_path / "none.mp4"})

    result = scail("render", manifest, "--output", tmp_path / "out", "--checkpoint", checkpoint, "--dry-run")

    assert result.exit_code == 1
    assert "render   a  2 steps" in result.stdout
    assert result.stdout.splitlines()[-1] == "1 to render, 0 repeated, 1 failed, 0 invalid"
    assert not (tmp_path / "out").exists()


def test_check_forecasts_time_and_cost_from_the_clips_that_are_done(write_manifest, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("SCAIL_PRICE_PER_GPU_HOUR", "3.5")
    folders = "--output", tmp_path / "out", "--checkpoint", checkpoint
    before = scail("check", write_manifest({"clip_id": "a"}), *folders)
    scail("render", write_manifest({"clip_id": "a"}), *folders)

    after = scail("check", write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 2}), *folders)

    assert "no forecast: no earlier clip of this checkpoint" in before.stdout
    *_, forecast, last = after.stdout.splitlines()
    assert re.search(r"forecast: [\d.]+ s of compute time, cost 0\.\d\d; learned from 1 earlier clip ", forecast)
    assert last == "1 to render, 0 repeated, 1 skipped, 0 invalid"


def test_check_without_an_output_guesses_the_time_of_the_14b_model(write_manifest, tmp_path):
    manifest = write_manifest({"clip_id": "a"}, {"clip_id": "b", "seed": 2})

    result = scail("check", manifest, "--checkpoint", tmp_path / "elsewhere")

    *_, forecast, last = result.stdout.splitlines()
    assert "a guess from 5.93 s per forward" in forecast
    assert last == "2 rows can be rendered, 0 are invalid"


def test_check_lists_every_malformed_row(write_manifest):
    manifest = write_manifest({"clip_id": "a", "seed": "x"}, {"clip_id": "b", "width": 33})

    result = scail("check", manifest)

    assert result.exit_code == 2
    assert "line 2, column seed" in result.stderr
    assert "line 3, column width" in result.stderr


def test_rows_that_failed_are_chosen_by_their_status_in_the_last_run(write_manifest, media, tmp_path, checkpoint):
    rows = {"clip_id": "good"}, {"clip_id": "bad", "seed": 2, "pose": tmp_path / "late.mp4"}
    folders = "--output", tmp_path / "out", "--checkpoint", checkpoint
    before = scail("check", write_manifest(*rows), *folders, "--only-status", "failed")
    scail("render", write_manifest(*rows), *folders)
    (tmp_path / "late.mp4").write_bytes((media / "pose5.mp4").read_bytes())

    planned = scail("check", write_manifest(*rows), *folders, "--only-status", "failed")
    mended = scail("render", write_manifest(*rows), *folders, "--only-status", "failed")

    assert (before.exit_code, "was not rendered to" in before.stderr) == (2, True)
    assert planned.stdout.splitlines()[-1] == "1 to render, 0 repeated, 0 invalid"
    assert mended.stdout.splitlines()[-1].startswith("1 rendered, 0 skipped, 0 failed")


def test_an_unknown_profile_is_refused(write_manifest, tmp_path, checkpoint):
    result = scail("check", write_manifest({"clip_id": "a"}), "--profile", "fastest")

    assert result.exit_code == 2
    assert f"profile: came 'fastest', expected one of {', '.join(PROFILES)}" in result.stderr


def test_doctor_says_what_is_wrong_in_one_line_each(tmp_path, checkpoint):
    good, bad = scail("doctor", "--checkpoint", checkpoint), scail("doctor", "--checkpoint", tmp_path / "nowhere")

    assert good.exit_code == 0
    assert {line.split()[1] for line in good.stdout.splitlines()} >= {"checkpoint", "ffmpeg", "decord", "torch"}
    assert bad.exit_code == 1
    assert [line for line in bad.stdout.splitlines() if line.startswith("BAD")] == [
        f"BAD  checkpoint     {tmp_path}/nowhere is not a folder; expected a checkpoint that `scail convert` wrote."
    ]


def test_bench_writes_its_figures_as_json(tmp_path):
    size = ("--frames", 5, "--height", HEIGHT, "--width", WIDTH, "--steps", 1)

    result = scail(
        "bench",
        "--model",
        "tiny",
        *size,
        "--only",
        "clip, clips, int8, load, vae",
        "--clips",
        2,
        "--json",
        tmp_path / "bench.json",
    )

    assert result.exit_code == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["clip"]["share_of_matmul_ceiling"] > 0
    rows = {row["figure"]: row for row in document["rows"]}
    assert rows["VAE decode"]["beside"] > 0
    assert rows["VAE decode"]["goal"] is None  # the goals are for the largest clip
    assert 0 < rows["warm worker, GPU busy"]["reached"] <= 100
    assert rows["forward, int8"]["reached"] > 0
    assert rows["load, cached files, to the first step"]["reached"] > rows["forward, int8"]["reached"]
    assert scail("bench", "--model", "13b").exit_code == 2
    assert scail("bench", "--only", "everything").exit_code == 2


def test_checking_a_manifest_imports_no_torch(write_manifest, tmp_path, checkpoint):
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['prefect'] = None\n"
        "sys.argv[0] = 'scail'\nfrom flows.cli import main\nmain()"
    )
    arguments = ["check", write_manifest({"clip_id": "a"}), "--output", tmp_path / "out", "--checkpoint", checkpoint]

    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 to render, 0 repeated, 0 invalid"


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert version("scail-batch-renders") == __version__


def test_a_pose_file_becomes_a_video(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "p01_walk_128x224.npz"

    done = scail("pose", "render", golden, tmp_path / "walk.mp4")
    resized = scail("pose", "render", golden, tmp_path / "small.mp4", "--height", 64, "--width", 96)

    assert (done.exit_code, done.stdout) == (0, f"8 frames → {tmp_path}/walk.mp4\n")
    assert (probe_video(tmp_path / "walk.mp4").width, probe_video(tmp_path / "walk.mp4").height) == (224, 128)
    assert probe_video(tmp_path / "small.mp4").width == 96
    assert resized.exit_code == 0


def test_a_pose_file_is_aligned_to_a_reference(tmp_path):
    golden = Path(__file__).parents[1] / "golden"
    motion, reference = golden / "p02_wave_256x448_2d.npz", golden / "p01_walk_128x224.npz"

    itself = scail("pose", "render", motion, tmp_path / "wave.mp4", "--align-to", motion)
    both = scail("pose", "render", motion, tmp_path / "both.mp4", "--align-to", motion, "--two-persons")
    pointless = scail("pose", "render", motion, tmp_path / "none.mp4", "--align-to", reference)

    assert itself.exit_code == 0
    assert probe_video(tmp_path / "wave.mp4").num_frames == 6
    assert (both.exit_code, pointless.exit_code) == (2, 2)
    assert "one camera aligns one person" in both.stderr
    assert "the reference has no 2D points of a person" in pointless.stderr


def test_a_pose_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "joints.npz").write_bytes(b"no zip at all")

    result = scail("pose", "render", tmp_path / "joints.npz", tmp_path / "walk.mp4")

    assert result.exit_code == 2
    assert "cannot be read as a pose file" in result.stderr


def test_an_output_that_cannot_be_written_is_said(write_manifest, tmp_path, checkpoint):
    (tmp_path / "file").write_bytes(b"")  # where a folder would have to be

    result = scail(
        "render", write_manifest({"clip_id": "a"}), "--output", tmp_path / "file", "--checkpoint", checkpoint
    )

    assert result.exit_code == 1
    assert "stopped: " in result.stderr


def test_a_converted_folder_renders(write_manifest, tmp_path):
    layouts.write_official(tmp_path / "source")
    heads = ("--transformer-heads", layouts.HEADS.transformer, "--image-heads", layouts.HEADS.image_encoder)

    converted = scail("convert", tmp_path / "source", tmp_path / "checkpoint", *heads)
    manifest = write_manifest({"clip_id": "a"})
    rendered = scail("render", manifest, "--output", tmp_path / "out", "--checkpoint", tmp_path / "checkpoint")

    assert converted.exit_code == 0, converted.stderr
    assert "transformer ← " in converted.stderr
    assert rendered.exit_code == 0, rendered.stdout


def test_a_source_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "source").mkdir()

    result = scail("convert", tmp_path / "source", tmp_path / "checkpoint")

    assert result.exit_code == 2
    assert "transformer" in result.stderr
    assert not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_that_was_not_trained_misses_its_goals(checkpoint, tmp_path):
    report = tmp_path / "report.json"

    result = scail("eval", "--checkpoint", checkpoint, "--clips", 2, "--frames", 1, "--steps", 1, "--json", report)

    assert result.exit_code == 1
    assert "MISSED" in result.stdout
    assert json.loads(report.read_text())["clips"] == 2


def test_a_folder_that_is_no_checkpoint_is_not_scored(tmp_path):
    assert scail("eval", "--checkpoint", tmp_path).exit_code == 2


def test_a_checkpoint_of_ours_becomes_a_quantised_one_that_a_run_must_ask_for(write_manifest, tmp_path, checkpoint):
    converted = scail("convert", checkpoint, tmp_path / "fp8", "--quantize", "fp8")
    manifest = write_manifest({"clip_id": "a"})
    plan = {
        profile: scail(
            "check", manifest, "--output", tmp_path / "out", "--checkpoint", tmp_path / "fp8", "--profile", profile
        )
        for profile in ("exact", "quality")
    }

    assert converted.exit_code == 0, converted.output
    assert plan["quality"].exit_code == 0
    assert plan["exact"].exit_code == 1
    assert "the checkpoint is quantised (fp8), profile exact needs the weights it was made of" in plan["exact"].output
    for arguments, message in (("--quantize", "fp4"), "expected one of none, fp8, int8"), ((), "is converted already"):
        refused = scail("convert", checkpoint, tmp_path / "again", *arguments)
        assert (refused.exit_code, message in refused.output) == (2, True)
