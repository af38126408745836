"""URIs, local files and memory; what holds for the stores behind a network is in the tests beside this one."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks import local_files, object_store, storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["path", "file", "memory"])
def base(request, tmp_path):
    """A folder that does not exist yet, in each kind of storage that needs no server."""
    kinds = {"path": str(tmp_path / "out put"), "file": (tmp_path / "out put").as_uri()}
    return kinds.get(request.param, f"memory://{tmp_path.name}-{request.node.name}")


def _python(script, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(("base_uri", "parts", "expected"), [
    ("gs://bucket/out", ("clips", "a", "video.mp4"), "gs://bucket/out/clips/a/video.mp4"),
    ("gs://bucket/out/", ("/clips/", "a b#?.mp4"), "gs://bucket/out/clips/a b#?.mp4"),
    ("gs://bucket", ("clips",), "gs://bucket/clips"),
    ("/data/out", ("clips", "a b.mp4"), "/data/out/clips/a b.mp4"),
    ("/", ("clips",), "/clips"),
    ("out", ("clips",), "out/clips"),
    ("file:///data/out", ("a b%.mp4",), "file:///data/out/a%20b%25.mp4"),
    ("file:///", ("clips",), "file:///clips"),
    ("https://host/in?sig=1", ("a b.png",), "https://host/in/a%20b.png"),
    ("s3://bucket/out", (), "s3://bucket/out"),
])  # fmt: skip
def test_names_are_joined_below_a_folder(base_uri, parts, expected):
    assert storage.join(base_uri, *parts) == expected


@pytest.mark.parametrize(("base_uri", "cell", "expected"), [
    ("gs://bucket/in", "a b.png", "gs://bucket/in/a b.png"),
    ("gs://bucket/in/", "./x//a.png", "gs://bucket/in/x/a.png"),
    ("gs://bucket/in", "../poses/a.mp4", "gs://bucket/poses/a.mp4"),
    ("gs://bucket", "a.png", "gs://bucket/a.png"),
    ("gs://bucket/in", "s3://other/a.png", "s3://other/a.png"),
    ("gs://bucket/in", "/data/a.png", "/data/a.png"),
    ("gs://bucket/in", "https://host/a.png?sig=1", "https://host/a.png?sig=1"),
    ("/data/in", "../a b.png", "/data/a b.png"),
    (".", "a.png", "a.png"),
    ("in", "a.png", "in/a.png"),
    ("file:///data/in%20put", "../a b%20.png", "file:///data/a%20b%2520.png"),
    ("https://host/in?sig=1", "x/a b.png", "https://host/in/x/a%20b.png"),
    ("https://host/in", "../a.png?sig=2", "https://host/a.png?sig=2"),
    ("memory://m", "a.png", "memory://m/a.png"),
])  # fmt: skip
def test_a_cell_is_read_from_the_manifests_folder(base_uri, cell, expected):
    assert storage.resolve(base_uri, cell) == expected


@pytest.mark.parametrize("cell", ["../a.png", "../../bucket2/a.png", "x/../../../a.png", ".."])
def test_a_cell_cannot_climb_out_of_its_bucket(cell):
    with pytest.raises(storage.RefusedUriError, match="leads out of gs://bucket"):
        storage.resolve("gs://bucket/in" if cell.count("..") > 1 else "gs://bucket", cell)


@pytest.mark.parametrize(("uri", "folder", "last"), [
    ("gs://bucket/in/m.csv", "gs://bucket/in", "m.csv"),
    ("gs://bucket/a b#?.csv", "gs://bucket", "a b#?.csv"),
    ("gs://bucket", "gs://bucket", "bucket"),
    ("/data/m.csv", "/data", "m.csv"),
    ("m.csv", ".", "m.csv"),
    ("file:///data/a%20b.csv", "file:///data", "a b.csv"),
    ("file:///m.csv", "file:///", "m.csv"),
    ("https://host/in/a%20b.png?sig=1#x", "https://host/in", "a b.png"),
    ("memory://m/m.csv", "memory://m", "m.csv"),
])  # fmt: skip
def test_a_uri_has_a_folder_and_a_name(uri, folder, last):
    assert (storage.parent(uri), storage.name(uri)) == (folder, last)


@pytest.mark.parametrize(("uri", "path"), [
    ("/data/a b%20.png", Path("/data/a b%20.png")),
    ("a.png", Path("a.png")),
    ("file:///data/a%20b.png", Path("/data/a b.png")),
    ("file://localhost/data/a.png", Path("/data/a.png")),
    ("gs://bucket/a.png", None),
    ("https://host/a.png", None),
    ("memory://a.png", None),
])  # fmt: skip
def test_a_local_file_needs_no_copy(uri, path):
    assert storage.local_path(uri) == path


def test_a_file_of_another_host_is_refused():
    with pytest.raises(storage.RefusedUriError, match="three slashes"):
        storage.read_bytes("file://data/a.png")


def test_what_may_be_shown_of_a_uri_has_no_signature():
    assert storage.redact("https://user:pass@host:8/a/b.png?X-Sig=1#f") == "https://host:8/a/b.png"
    assert storage.redact("gs://bucket/what?#.mp4") == "gs://bucket/what?#.mp4"
    assert storage.redact("/data/what?.mp4") == "/data/what?.mp4"


def test_a_scheme_that_is_not_allowed_is_refused(tmp_path):
    only_buckets = storage.StoragePolicy(allowed_schemes=frozenset({"gs"}))

    for uri in ("ftp://host/a", "data://x", "http://host/a"):
        with pytest.raises(storage.RefusedUriError, match="allowed are file, gs, https, memory, s3"):
            storage.read_bytes(uri)
    with pytest.raises(storage.RefusedUriError, match="'file'; allowed are gs"):
        storage.read_bytes(str(tmp_path), policy=only_buckets)
    with pytest.raises(storage.RefusedUriError, match="we know only"):
        storage.read_bytes("ftp://host/a", policy=storage.StoragePolicy(allowed_schemes=frozenset({"ftp"})))


def test_errors_survive_the_way_between_processes():
    for kind in (storage.StorageError, storage.NotFoundError, storage.RefusedUriError, storage.DamagedError):
        error = pickle.loads(pickle.dumps(kind("gs://bucket/clip", transient=True)))
        assert (type(error), str(error), error.transient) == (kind, "gs://bucket/clip", True)


def test_planning_imports_no_storage_library():
    script = (
        "import sys, tasks.storage; print(sorted({'torch', 'fsspec', 'gcsfs', 's3fs', 'aiohttp'} & set(sys.modules)))"
    )

    assert _python(script).communicate()[0].strip() == "[]"


@pytest.mark.parametrize(("set_by_the_user", "expected"), [(None, "false"), ("true", "true")])
def test_gcsfs_is_told_not_to_probe_buckets_before_anything_imports_it(set_by_the_user, expected):
    environment = {name: value for name, value in os.environ.items() if name != "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"}
    if set_by_the_user:
        environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = set_by_the_user
    script = "import os, tasks.storage; print(os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'])"

    assert _python(script, env=environment).communicate()[0].strip() == expected


def test_what_is_published_comes_back(base, tmp_path):
    uri = storage.join(base, "clips", "a b", "video.mp4")
    (tmp_path / "scratch.mp4").write_bytes(b"video")

    storage.publish_bytes(storage.join(base, "done.json"), b"{}")
    md5 = storage.publish_file(tmp_path / "scratch.mp4", uri)
    storage.download(uri, tmp_path / "new folder" / "copy.mp4")

    assert storage.read_bytes(uri) == b"video"
    assert (storage.exists(uri), storage.size(uri)) == (True, 5)
    assert storage.content_md5(uri) == md5 == hashlib.md5(b"video").hexdigest()
    assert storage.list_files(base) == [uri, storage.join(base, "done.json")]
    assert (tmp_path / "new folder" / "copy.mp4").read_bytes() == b"video"


def test_publishing_again_replaces(base):
    uri = storage.join(base, "status.json")

    storage.publish_bytes(uri, b"the first and longer one")
    storage.publish_bytes(uri, b"second")

    assert storage.read_bytes(uri) == b"second"
    assert storage.content_md5(uri) == hashlib.md5(b"second").hexdigest()


def test_what_is_absent_is_not_found(base, tmp_path):
    uri = storage.join(base, "absent")

    assert not storage.exists(uri)
    assert storage.list_files(base) == []
    storage.delete(uri)
    for action in (storage.read_bytes, storage.size, storage.content_md5):
        with pytest.raises(storage.NotFoundError, match="absent"):
            action(uri)
    with pytest.raises(storage.NotFoundError):
        storage.download(uri, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_a_file(base):
    storage.publish_bytes(storage.join(base, "clips", "a"), b"1")

    assert storage.exists(storage.join(base, "clips"))
    for action in (storage.read_bytes, storage.size, storage.content_md5):
        with pytest.raises(storage.NotFoundError):
            action(storage.join(base, "clips"))


def test_a_folder_lists_only_what_is_below_it(base):
    for name in ("done/a", "done/deep/b", "done-not/c"):
        storage.publish_bytes(storage.join(base, name), b"1")

    assert storage.list_files(storage.join(base, "done")) == [
        storage.join(base, "done/a"),
        storage.join(base, "done/deep/b"),
    ]


def test_more_than_allowed_is_refused(base, tmp_path):
    uri = storage.join(base, "big")
    storage.publish_bytes(uri, b"x" * 1000)

    with pytest.raises(storage.RefusedUriError, match="1000 bytes; at most 999"):
        storage.download(uri, tmp_path / "big", max_bytes=999)

    assert not (tmp_path / "big").exists()


def test_deleting_twice_is_as_good_as_once(base):
    uri = storage.join(base, "clip")
    storage.publish_bytes(uri, b"1")

    storage.delete(uri)
    storage.delete(uri)

    assert not storage.exists(uri)


def test_of_sixteen_racing_claims_one_wins(base):
    for number in range(5):
        uri, ready = storage.join(base, f"claim-{number}"), threading.Barrier(16)

        def claim(claimant, uri=uri, ready=ready):
            ready.wait()
            return storage.create(uri, b"%d" % claimant)

        with ThreadPoolExecutor(16) as executor:
            won = list(executor.map(claim, range(16)))

        assert sum(won) == 1
        assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert len(storage.list_files(base)) == 5


def test_of_six_racing_processes_one_wins(tmp_path):
    script = """
import sys, time
from pathlib import Path
from tasks import storage
print("ready", flush=True)
while not Path(sys.argv[1], "go").exists():
    pass
print(storage.create(sys.argv[1] + "/claim", sys.argv[2].encode()))
"""
    processes = [_python(script, str(tmp_path), str(number)) for number in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()

    won = [process.communicate()[0].strip() == "True" for process in processes]

    assert sum(won) == 1
    assert (tmp_path / "claim").read_text() == str(won.index(True))


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_claim_has_one_winner_where_there_are_no_hard_links(refusal, tmp_path, monkeypatch):
    def refuse(*_about):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)

    with ThreadPoolExecutor(16) as executor:
        won = list(executor.map(lambda number: storage.create(f"{tmp_path}/claim", b"%d" % number), range(16)))

    assert sum(won) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_a_link_that_was_made_though_it_was_called_a_failure_is_ours(tmp_path, monkeypatch):
    really_link = os.link

    def link_and_forget(source, target):
        really_link(source, target)
        raise FileExistsError(errno.EEXIST, "the repeated request of an NFS client", str(target))

    monkeypatch.setattr(os, "link", link_and_forget)

    assert storage.create(f"{tmp_path}/claim", b"me") is True
    monkeypatch.setattr(os, "link", really_link)
    assert storage.create(f"{tmp_path}/claim", b"me") is False


@pytest.mark.parametrize("seed", range(6))
def test_a_writer_killed_in_the_midst_of_a_publish_leaves_the_whole_file_or_none(seed, tmp_path):
    script = """
import sys
from tasks import storage
print("go", flush=True)
while True:
    for letter in b"ab":
        storage.publish_bytes(sys.argv[1] + "/clip.mp4", bytes([letter]) * 8_000_000)
"""
    writer = _python(script, str(tmp_path))
    writer.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.0, 0.12))
    writer.kill()
    writer.wait()

    if storage.exists(f"{tmp_path}/clip.mp4"):
        content = storage.read_bytes(f"{tmp_path}/clip.mp4")
        assert content in {b"a" * 8_000_000, b"b" * 8_000_000}
    assert set(storage.list_files(str(tmp_path))) <= {f"{tmp_path}/clip.mp4"}
    storage.sweep(str(tmp_path), older_than_seconds=0.0)
    assert {path.name for path in tmp_path.iterdir()} <= {"clip.mp4"}


def test_a_sweep_removes_leftovers_of_the_dead_and_nothing_else(tmp_path):
    old, young = (f".video.mp4.{letter * 32}.tmp" for letter in "ab")
    for name in (f"clips/a/{old}", young, ".hidden.tmp", "video.mp4", f"x.{'c' * 32}.tmp"):
        storage.publish_bytes(f"{tmp_path}/{name}", b"1")
    os.utime(tmp_path / "clips" / "a" / old, (time.time() - 7200,) * 2)

    assert storage.sweep(str(tmp_path), older_than_seconds=3600) == 1
    assert not (tmp_path / "clips" / "a" / old).exists()
    assert len(list(tmp_path.iterdir())) == 5
    assert storage.sweep(f"{tmp_path}/absent", older_than_seconds=0) == 0
    assert storage.sweep("memory://anything", older_than_seconds=0) == 0


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "clip").write_bytes(b"before")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(storage.StorageError, match="No space left") as raised:
        storage.publish_bytes(f"{tmp_path}/clip", b"after")

    assert not raised.value.transient
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"clip": b"before"}


def test_a_file_system_that_cannot_sync_folders_is_good_enough(tmp_path, monkeypatch):
    really_sync = os.fsync

    def sync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 a link of the kernel's
            raise OSError(errno.EINVAL, "not here")
        really_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)

    storage.publish_bytes(f"{tmp_path}/clip", b"1")

    assert storage.read_bytes(f"{tmp_path}/clip") == b"1"


@pytest.mark.parametrize(("code", "kind", "transient"), [
    (errno.EACCES, storage.PermissionDeniedError, False),
    (errno.ENOTDIR, storage.NotFoundError, False),
    (errno.ESTALE, storage.StorageError, True),
    (errno.ETIMEDOUT, storage.StorageError, True),
    (errno.ECONNRESET, storage.StorageError, True),
    (errno.EIO, storage.StorageError, False),
])  # fmt: skip
def test_errors_of_the_system_become_ours(code, kind, transient, tmp_path, monkeypatch):
    def fail(*_about, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", fail)

    with pytest.raises(storage.StorageError, match=str(tmp_path)) as raised:
        storage.read_bytes(f"{tmp_path}/clip")

    assert (type(raised.value), raised.value.transient) == (kind, transient)
    assert isinstance(raised.value.__cause__, OSError)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(storage.PermissionDeniedError):
        storage.list_files(str(tmp_path))


def test_the_md5_of_a_file_is_that_of_its_present_bytes(tmp_path):
    path = tmp_path / "reference.png"
    for content in (b"aaaa", b"bbbb"):
        storage.publish_bytes(str(path), content)
        assert storage.content_md5(str(path)) == hashlib.md5(content).hexdigest()


def test_the_md5_of_an_unchanged_file_is_computed_once(tmp_path):
    storage.publish_bytes(f"{tmp_path}/reference.png", b"pixels")
    storage.content_md5(f"{tmp_path}/reference.png")
    before = local_files._md5_of_version.cache_info()

    storage.content_md5((tmp_path / "reference.png").as_uri())

    after = local_files._md5_of_version.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_a_name_as_long_as_the_file_system_allows_is_published(tmp_path):
    storage.publish_bytes(f"{tmp_path}/{'n' * 251}.mp4", b"1")
    storage.publish_bytes(f"{tmp_path}/{'ä' * 125}.mp4", b"1")

    assert len(storage.list_files(str(tmp_path))) == 2


def test_readers_never_see_a_part_of_a_file(tmp_path):
    uri, stop = f"{tmp_path}/status.json", threading.Event()
    storage.publish_bytes(uri, b"a" * 300_000)

    def write():
        for number in range(60):
            storage.publish_bytes(uri, bytes([97 + number % 26]) * 300_000)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not stop.is_set():
        content = storage.read_bytes(uri)
        seen.add((len(content), len(set(content))))
    writer.join()

    assert seen == {(300_000, 1)}


def test_pauses_grow_and_differ():
    pauses = [[storage.DEFAULT_POLICY.pause_seconds(attempt) for _ in range(50)] for attempt in (1, 2, 3)]

    assert max(pauses[0]) <= 0.5 <= min(pauses[2]) <= max(pauses[2]) <= 2.0
    assert all(len(set(of_one_attempt)) > 1 for of_one_attempt in pauses)


def test_each_process_has_clients_of_its_own():
    object_store._filesystem("memory", 60.0, os.getpid())
    ours = object_store._filesystem.cache_info().currsize

    object_store._filesystem("memory", 60.0, os.getpid() + 1)  # what a forked child would ask for

    assert object_store._filesystem.cache_info().currsize == ours + 1
