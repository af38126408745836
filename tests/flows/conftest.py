"""A checkpoint, inputs and a Prefect API that the flow's tests share."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY
from scail.video import encode_video
from tasks.resident import load_pipeline

HEIGHT, WIDTH = 64, 96

WriteManifest = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def prefect_api(migrated_database: Path) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness  # brings the whole server: two seconds of a core

    folder = tempfile.mkdtemp()  # not one of pytest's: Prefect removes it when the process ends
    shutil.copy(migrated_database, Path(folder) / "prefect-test.db")  # as Prefect's harness names it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefect.testing.utilities.mkdtemp", lambda: folder)
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "SCAIL_TINY"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    return folder


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two references, and pose videos of 5, 9 and 11 frames at 24 fps."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name in ("ref1.png", "ref2.png"):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / name)
    for num_frames in (5, 9, 11):
        frames = np.zeros((num_frames, HEIGHT, WIDTH, 3), np.uint8)
        for frame in range(num_frames):
            frames[frame, 16:48, 4 * frame : 4 * frame + 8] = (255, 85, 0)
        encode_video(folder / f"pose{num_frames}.mp4", frames, fps=24.0, metadata={})
    return folder


@pytest.fixture
def write_manifest(tmp_path: Path, media: Path) -> WriteManifest:
    """Writes a manifest of rows; a row says only in what it differs from a good one."""

    def write(*rows: dict[str, object], name: str = "manifest.csv") -> Path:
        good = {
            "clip_id": "",
            "reference": media / "ref1.png",
            "pose": media / "pose5.mp4",
            "prompt": "a dancer",
            "width": WIDTH,
            "height": HEIGHT,
            "num_inference_steps": 2,
        }
        path = tmp_path / name
        with path.open("w", newline="") as file:
            columns = dict.fromkeys(column for row in (good, *rows) for column in row)
            writer = csv.DictWriter(file, fieldnames=list(columns))
            writer.writeheader()
            writer.writerows(good | row for row in rows)
        return path

    return write


@pytest.fixture(autouse=True)
def _no_resident_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts without a loaded model, and with a scratch folder of its own."""
    monkeypatch.setenv("SCAIL_SCRATCH_DIR", str(tmp_path / "scratch"))
    for name in ("_pipeline", "_spec"):  # forgotten without the search for cycles that `cache_clear` makes
        monkeypatch.setattr(load_pipeline, name, None)
