"""s3:// against moto's server, through a proxy that breaks things."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from functools import cached_property
from types import MappingProxyType

import pytest

from tasks import amazon_store, object_store, storage
from tests.tasks.emulators import amazon_emulator

pytest.importorskip("moto.server", reason="the s3 emulator is not installed")
pytest.importorskip("s3fs", reason="the extra 's3' is not installed")
pytest.register_assert_rewrite("tests.tasks.object_store_contract")

from tests.tasks.object_store_contract import ObjectStoreContract  # noqa: E402


@pytest.fixture(scope="module")
def proxy():
    object_store._filesystem.cache_clear()
    with amazon_emulator() as proxy:
        yield proxy
    object_store._filesystem.cache_clear()


@pytest.fixture
def no_long_pauses(monkeypatch):
    """botocore pauses for up to min(2^n, 20) seconds."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda _backoff, _context: 0.05)


class TestAmazonStorage(ObjectStoreContract):
    scheme = "s3"
    upload = MappingProxyType({"method": "PUT"})
    media = MappingProxyType({"method": "GET", "contains": "test_"})

    def direct_url(self, uri):
        return self._presigned("get_object", uri)

    def overwritten_by_others(self, uri, data):
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self._presigned("put_object", uri), data, headers, method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def _presigned(self, method, uri):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return self._signer.generate_presigned_url(method, Params={"Bucket": bucket, "Key": key})

    @cached_property
    def _signer(self):
        import boto3

        return boto3.client("s3", endpoint_url=self.proxy.upstream)

    @pytest.mark.parametrize(("head", "md5"), [
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"'}, "9e107d9d372bb6826bd81d3542a419d6"),
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6-3"'}, None),
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"', "ServerSideEncryption": "aws:kms"}, None),
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"', "ServerSideEncryption": "aws:kms:dsse"}, None),
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"', "SSECustomerAlgorithm": "AES256"}, None),
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"', "ServerSideEncryption": "AES256"},
         "9e107d9d372bb6826bd81d3542a419d6"),
        ({}, None),
    ])  # fmt: skip
    def test_an_etag_is_taken_for_an_md5_only_where_it_is_one(self, head, md5):
        assert amazon_store._md5_of_etag(head) == md5

    def test_an_object_uploaded_in_parts_has_its_md5_computed(self):
        client = storage._store(self.base, storage.DEFAULT_POLICY)._fs
        parts = bytes(6 * 2**20)
        client.pipe_file(f"{self.base}/parts".removeprefix("s3://"), parts * 2, chunksize=6 * 2**20)

        assert "-2" in client.info(f"{self.base}/parts")["ETag"]
        assert storage.content_md5(f"{self.base}/parts") == object_store.bytes_md5(parts * 2)


def test_without_its_extra_s3_says_what_to_install():
    script = "import sys; sys.modules['s3fs'] = None; from tasks import storage; storage.read_bytes('s3://bucket/key')"

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert "StorageError" in ended.stderr
    assert "pip install 'scail-batch-renders[s3]'" in ended.stderr
