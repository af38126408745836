"""What every object store must do, whatever the network does meanwhile. Run against gs and against s3."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from tasks import object_store, storage
from tests.tasks.emulators import BUCKET
from tests.tasks.fault_proxy import ALL_FAULTS, Fault

IMPATIENT = storage.StoragePolicy(request_timeout_seconds=2.0, call_timeout_seconds=20.0, first_pause_seconds=0.05)


@pytest.mark.usefixtures("no_long_pauses")
class ObjectStoreContract:
    """Subclasses give `scheme`, the fixture `proxy`, and what their store's requests look like."""

    scheme: str
    upload: Mapping[str, str]  # which requests upload a small object
    media: Mapping[str, str]  # which requests read an object's bytes

    @pytest.fixture(autouse=True)
    def _fresh_start(self, proxy, request):
        proxy.reset()
        self.proxy = proxy
        self.base = f"{self.scheme}://{BUCKET}/{request.node.name}"
        yield
        proxy.reset()

    def direct_url(self, uri):
        """The object behind the proxy's back, as another process sees it."""
        raise NotImplementedError

    def seen_by_others(self, uri):
        with urllib.request.urlopen(self.direct_url(uri), timeout=10) as answer:
            return answer.read()

    def overwritten_by_others(self, uri, data):
        """Another process writes, past this one's client."""
        raise NotImplementedError

    def test_what_is_published_comes_back(self):
        uri = storage.join(self.base, "clips", "ä b", "vid#?%20{x}&=+.mp4")

        storage.publish_bytes(uri, b"frames" * 100)

        assert storage.read_bytes(uri) == b"frames" * 100
        assert storage.size(uri) == 600
        assert storage.exists(uri)
        assert storage.content_md5(uri) == hashlib.md5(b"frames" * 100).hexdigest()
        assert storage.list_files(self.base) == [uri]

    def test_an_empty_object_is_an_object(self, tmp_path):
        uri = f"{self.base}/_SUCCESS"

        storage.publish_bytes(uri, b"")
        storage.download(uri, tmp_path / "success")

        assert storage.read_bytes(uri) == b""
        assert (tmp_path / "success").read_bytes() == b""

    def test_what_is_absent_is_not_found(self, tmp_path):
        uri = f"{self.base}/absent"

        assert not storage.exists(uri)
        assert storage.list_files(uri) == []
        storage.delete(uri)
        for action in (storage.read_bytes, storage.size, storage.content_md5):
            with pytest.raises(storage.NotFoundError, match="absent"):
                action(uri)
        with pytest.raises(storage.NotFoundError):
            storage.download(uri, tmp_path / "absent")
        assert list(tmp_path.iterdir()) == []

    def test_a_bucket_that_is_absent_is_an_error_and_not_an_empty_list(self):
        with pytest.raises(storage.NotFoundError):
            storage.list_files(f"{self.scheme}://no-such-bucket/clips")
        with pytest.raises(storage.NotFoundError):
            storage.publish_bytes(f"{self.scheme}://no-such-bucket/clip", b"")

    def test_a_bucket_is_not_a_file(self):
        with pytest.raises(storage.RefusedUriError, match="names a bucket"):
            storage.publish_bytes(f"{self.scheme}://{BUCKET}", b"")

    def test_a_folder_lists_only_what_is_below_it(self):
        for name in ("done/a.json", "done/deep/b.json", "done-not/c.json"):
            storage.publish_bytes(f"{self.base}/{name}", b"{}")

        assert storage.list_files(f"{self.base}/done") == [f"{self.base}/done/a.json", f"{self.base}/done/deep/b.json"]
        assert storage.exists(f"{self.base}/done")
        assert not storage.exists(f"{self.base}/don")

    def test_deleting_twice_is_as_good_as_once(self):
        uri = f"{self.base}/clip"
        storage.publish_bytes(uri, b"1")

        storage.delete(uri)
        storage.delete(uri)

        assert not storage.exists(uri)

    def test_more_than_allowed_is_refused_before_it_is_fetched(self, tmp_path):
        uri = f"{self.base}/big"
        storage.publish_bytes(uri, b"x" * 1000)
        self.proxy.requests.clear()

        with pytest.raises(storage.RefusedUriError, match="1000 bytes; at most 999"):
            storage.download(uri, tmp_path / "big", max_bytes=999)
        with pytest.raises(storage.RefusedUriError, match="1000 bytes"):
            storage.read_bytes(uri, policy=storage.StoragePolicy(max_read_bytes=10))

        assert self.proxy.count(**self.media) == 0
        assert list(tmp_path.iterdir()) == []

    def test_a_video_plays_in_a_browser(self):
        expected = {"a.mp4": "video/mp4", "a.jpg": "image/jpeg", "a.json": "application/json"}
        expected |= {"a.csv": "text/csv; charset=utf-8", "a.html": "text/html; charset=utf-8"}
        for name in expected:
            storage.publish_bytes(f"{self.base}/{name}", b"0123456789")

        for name, content_type in expected.items():
            request = urllib.request.Request(self.direct_url(f"{self.base}/{name}"), headers={"Range": "bytes=2-4"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert (answer.status, answer.headers["Content-Type"], answer.read()) == (206, content_type, b"234")

    def test_a_published_file_keeps_the_type_of_its_target_and_not_of_its_scratch_name(self, tmp_path):
        scratch = tmp_path / "scratch.tmp"
        scratch.write_bytes(b"video")

        storage.publish_file(scratch, f"{self.base}/video.mp4")

        with urllib.request.urlopen(self.direct_url(f"{self.base}/video.mp4"), timeout=10) as answer:
            assert answer.headers["Content-Type"] == "video/mp4"

    def test_another_process_overwriting_an_object_is_seen_at_once_and_whole(self):
        uri = f"{self.base}/shared/status.json"
        storage.publish_bytes(uri, b"1")
        storage.list_files(f"{self.base}/shared")
        assert (storage.size(uri), storage.read_bytes(uri)) == (1, b"1")

        self.overwritten_by_others(uri, b"12345")
        self.overwritten_by_others(f"{self.base}/shared/new.json", b"new")

        assert storage.read_bytes(uri) == b"12345"
        assert storage.size(uri) == 5
        assert storage.exists(f"{self.base}/shared/new.json")
        assert storage.list_files(f"{self.base}/shared") == [f"{self.base}/shared/new.json", uri]

    def test_a_large_file_goes_up_in_chunks_and_down_in_blocks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(object_store, "_BLOCK_SIZE", 2**20)
        video = random.Random(0).randbytes(9 * 2**20 + 7)
        (tmp_path / "video.mp4").write_bytes(video)

        md5 = storage.publish_file(tmp_path / "video.mp4", f"{self.base}/video.mp4")
        storage.download(f"{self.base}/video.mp4", tmp_path / "back.mp4")

        assert (tmp_path / "back.mp4").read_bytes() == video
        assert md5 == hashlib.md5(video, usedforsecurity=False).hexdigest()
        assert self.proxy.count(**self.media) == 10

    @pytest.mark.parametrize("faults", [
        (Fault.UNAVAILABLE, Fault.UNAVAILABLE),
        (Fault.TOO_MANY, Fault.RESET, Fault.HALF_BODY),
        (Fault.STALL,),
        (Fault.CORRUPT, Fault.CORRUPT),
        (Fault.LOST_REPLY,),
    ])  # fmt: skip
    def test_a_read_survives(self, faults):
        uri = f"{self.base}/clip.mp4"
        storage.publish_bytes(uri, b"frames" * 1000)
        self.proxy.next_are(*faults, **self.media)

        assert storage.read_bytes(uri, policy=IMPATIENT) == b"frames" * 1000
        assert self.proxy.count(**self.media) == len(faults) + 1

    @pytest.mark.parametrize("faults", [
        (Fault.UNAVAILABLE, Fault.UNAVAILABLE),
        (Fault.TOO_MANY, Fault.RESET),
        (Fault.STALL,),
        (Fault.CORRUPT, Fault.CORRUPT),
        (Fault.LOST_REPLY,),
    ])  # fmt: skip
    def test_a_publish_survives(self, faults):
        uri = f"{self.base}/clip.mp4"
        self.proxy.next_are(*faults, **self.upload)

        storage.publish_bytes(uri, b"frames" * 1000, policy=IMPATIENT)

        assert self.seen_by_others(uri) == b"frames" * 1000

    @pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.HALF_BODY, Fault.CORRUPT, Fault.STALL, Fault.RESET])
    def test_a_fault_for_ever_ends_in_bounded_time_and_leaves_nothing_behind(self, fault, tmp_path):
        uri = f"{self.base}/clip.mp4"
        storage.publish_bytes(uri, b"frames" * 1000)
        (tmp_path / "clip.mp4").write_bytes(b"what was there before")
        self.proxy.always(fault, **self.media)
        started = time.monotonic()

        with pytest.raises(storage.StorageError, match=r"clip\.mp4") as raised:
            storage.download(uri, tmp_path / "clip.mp4", policy=replace(IMPATIENT, request_timeout_seconds=0.7))

        assert raised.value.transient
        assert time.monotonic() - started < 30
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there before"]

    def test_a_library_that_has_retried_is_not_made_to_do_so_again(self):
        uri = f"{self.base}/clip.mp4"
        storage.publish_bytes(uri, b"frames")
        self.proxy.always(Fault.UNAVAILABLE, **self.media)

        with pytest.raises(storage.StorageError):
            storage.read_bytes(uri)

        assert self.proxy.count(**self.media) == 6

    @pytest.mark.slow
    def test_the_librarys_own_pauses_end_within_a_minute(self, monkeypatch):
        monkeypatch.undo()
        self.proxy.always(Fault.UNAVAILABLE)
        sleep, pauses = asyncio.sleep, Counter()

        def add_up(seconds, *rest):
            pauses[asyncio.current_task()] += seconds  # requests side by side pause side by side
            return sleep(0, *rest)

        monkeypatch.setattr(asyncio, "sleep", add_up)
        started = time.monotonic()

        with pytest.raises(storage.StorageError) as raised:
            storage.exists(f"{self.base}/clip")

        assert raised.value.transient
        assert 3 < time.monotonic() - started + max(pauses.values()) < 60  # and nobody has to wait for it here

    def test_an_upload_that_never_succeeds_says_that_it_may_later(self):
        self.proxy.always(Fault.UNAVAILABLE, **self.upload)

        with pytest.raises(storage.StorageError, match=r"clip\.mp4") as raised:
            storage.publish_bytes(f"{self.base}/clip.mp4", b"frames")

        assert raised.value.transient

    def test_an_upload_that_is_always_corrupt_is_never_accepted(self):
        self.proxy.always(Fault.CORRUPT, **self.upload)

        with pytest.raises(storage.DamagedError):
            storage.publish_bytes(f"{self.base}/clip.mp4", b"frames" * 10, policy=IMPATIENT)

    def test_no_permission_is_said_at_once_and_for_good(self):
        self.proxy.always(Fault.FORBIDDEN, contains=BUCKET)

        for action in (storage.read_bytes, storage.exists, storage.list_files):
            self.proxy.requests.clear()
            with pytest.raises(storage.PermissionDeniedError) as raised:
                action(f"{self.base}/clip.mp4")
            assert not raised.value.transient
            assert self.proxy.count() <= 4

    def test_existence_is_not_denied_because_the_store_is_down(self):
        storage.publish_bytes(f"{self.base}/done.json", b"{}")
        self.proxy.always(Fault.UNAVAILABLE)

        with pytest.raises(storage.StorageError) as raised:
            storage.exists(f"{self.base}/done.json")

        assert raised.value.transient
        assert not isinstance(raised.value, storage.NotFoundError)

    def test_a_listing_that_fails_is_not_an_empty_one(self):
        self.proxy.always(Fault.UNAVAILABLE)

        with pytest.raises(storage.StorageError) as raised:
            storage.list_files(self.base)

        assert raised.value.transient

    def test_a_claim_is_won_once(self):
        uri = f"{self.base}/claim"

        assert storage.create(uri, b"first") is True
        assert storage.create(uri, b"second") is False
        assert storage.create(uri, b"first") is False
        assert storage.read_bytes(uri) == b"first"

    def test_of_sixteen_racing_claims_one_wins(self):
        ready = threading.Barrier(16)

        def claim(uri, number):
            ready.wait()
            return storage.create(uri, b"%d" % number)

        with ThreadPoolExecutor(16) as executor:
            for uri in (f"{self.base}/{name}" for name in ("first", "second", "third")):
                won = list(executor.map(partial(claim, uri), range(16)))
                assert sum(won) == 1
                assert self.seen_by_others(uri) == b"%d" % won.index(True)

    def test_of_sixteen_racing_claims_one_wins_when_every_other_reply_is_lost(self):
        uri = f"{self.base}/claim"
        self.proxy.at_random(0.5, seed=3, faults=(Fault.LOST_REPLY,))

        with ThreadPoolExecutor(16) as executor:
            won = list(executor.map(lambda _: storage.create(uri, b"same for all"), range(16)))

        assert sum(won) == 1

    def test_a_claim_whose_reply_was_lost_is_ours(self):
        self.proxy.next_are(Fault.LOST_REPLY, **self.upload)

        assert storage.create(f"{self.base}/claim", b"me") is True

    def test_a_claim_that_another_won_is_not_ours_though_our_reply_was_lost_and_the_bytes_agree(self):
        uri = f"{self.base}/claim"
        assert storage.create(uri, b"same for all")
        self.proxy.next_are(Fault.LOST_REPLY, **self.upload)

        assert storage.create(uri, b"same for all") is False

    def test_a_claim_that_arrived_corrupt_is_ours_and_mended(self):
        uri = f"{self.base}/claim"
        self.proxy.next_are(Fault.CORRUPT, **self.upload)

        assert storage.create(uri, b"the token of the one who won") is True
        assert self.seen_by_others(uri) == b"the token of the one who won"

    def test_one_client_serves_all_threads(self):
        def publish(number):
            storage.publish_bytes(f"{self.base}/{number}", b"%d" % number)
            return storage._store(self.base, storage.DEFAULT_POLICY)._fs

        with ThreadPoolExecutor(8) as executor:
            clients = {id(client) for client in executor.map(publish, range(40))}

        assert len(clients) == 1
        assert len(storage.list_files(self.base)) == 40

    def test_two_hundred_clips_survive_a_network_that_fails_one_request_in_ten(self, tmp_path, caplog):
        caplog.set_level(logging.CRITICAL)  # gcsfs logs a traceback for each of these faults
        contents = {
            f"{self.base}/{path}": random.Random(path).randbytes(200 + number)
            for number in range(200)
            for path in (
                f"clips/{number:03}/video.mp4",
                f"clips/{number:03}/poster.jpg",
                f"clips/{number:03}/metrics.json",
                f"done/{number:03}.json",
            )
        }
        self.proxy.at_random(0.1, seed=20)

        def publish_clip(number):
            for uri in list(contents)[number * 4 : number * 4 + 4]:
                storage.publish_bytes(uri, contents[uri], policy=IMPATIENT)

        def read_back(uri):
            path = tmp_path / hashlib.md5(uri.encode()).hexdigest()
            storage.download(uri, path, policy=IMPATIENT)
            return path.read_bytes()

        with ThreadPoolExecutor(24) as executor:
            list(executor.map(publish_clip, range(200)))
            read = dict(zip(contents, executor.map(read_back, contents), strict=True))

        suffered = [request.fault for request in self.proxy.requests if request.fault is not Fault.NONE]
        assert set(suffered) == set(ALL_FAULTS)
        assert len(suffered) > 200
        assert read == contents
        self.proxy.reset()
        assert storage.list_files(self.base) == sorted(contents)
        assert len(list(tmp_path.iterdir())) == len(contents)
