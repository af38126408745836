"""A folder of manifests: what is not done is rendered, each manifest to a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.render_nightly import render_nightly
from tasks.errors import RefusedError
from tasks.form import RenderOptions


@pytest.fixture
def night(write_manifest, tmp_path, checkpoint):
    """Renders the folder, and returns the run's state."""
    (tmp_path / "manifests" / "spring").mkdir(parents=True)

    def put(name: str, *rows: dict[str, object]) -> Path:
        return Path(shutil.move(write_manifest(*rows), tmp_path / "manifests" / name))

    def run():
        options = RenderOptions(checkpoint=str(checkpoint))
        return render_nightly(str(tmp_path / "manifests"), str(tmp_path / "out"), options, return_state=True)

    return put, run


def test_only_manifests_that_are_not_done_are_rendered(night, tmp_path):
    put, run = night
    put("a.csv", {"clip_id": "take-1", "seed": 1})
    put("spring/b.csv", {"clip_id": "take-1", "seed": 2})  # the same clip_id, another clip
    (tmp_path / "manifests" / "notes.txt").write_text("no manifest")

    first, again = run(), run()
    put("a.csv", {"clip_id": "take-1", "seed": 1}, {"clip_id": "take-2", "seed": 3})
    changed = run()

    assert first.message == "2 manifests: 2 rendered, 0 failed, 0 done before"
    assert again.message == "2 manifests: 0 rendered, 0 failed, 2 done before"
    assert changed.message == "2 manifests: 1 rendered, 0 failed, 1 done before"
    videos = [path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/video.mp4")]
    assert sorted(videos) == [
        "a/clips/take-1/video.mp4",
        "a/clips/take-2/video.mp4",
        "spring/b/clips/take-1/video.mp4",
    ]


def test_a_manifest_that_cannot_be_used_stops_no_other_one(night, tmp_path):
    put, run = night
    put("a.csv", {"clip_id": "../up"})
    put("b.csv", {"clip_id": "good"})

    state = run()

    assert state.is_failed()
    first, second = state.message.splitlines()
    assert first == "2 manifests: 1 rendered, 1 failed, 0 done before"
    assert second.startswith("a.csv: line 2, column clip_id: ")
    assert (tmp_path / "out" / "b" / "clips" / "good" / "video.mp4").exists()
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        [table] = [found for found in client.read_artifacts(artifact_filter=of_run) if found.type == "table"]
    assert '"a.csv", "run": "Failed"' in table.data


def test_results_are_not_taken_for_manifests(tmp_path):
    state = render_nightly(str(tmp_path), str(tmp_path / "out"), return_state=True)

    with pytest.raises(RefusedError, match="keep them apart"):
        state.result()
