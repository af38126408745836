"""Objects behind fsspec: gs, s3 and, for tests, memory. The half of `tasks/storage.py` that names the libraries.

gcsfs and s3fs repeat a request that was answered by 5xx, or whose connection broke, five times or more. We repeat
only what they do not: a stall, bytes that do not match their checksum, an upload that did not arrive. Whatever
else still fails after that goes up as it is, `transient` or not.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from tasks import local_files
from tasks.uris import (
    DamagedError,
    NotFoundError,
    PermissionDeniedError,
    RefusedUriError,
    StorageError,
    StoragePolicy,
    refuse_if_larger,
    translated,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_BLOCK_SIZE = 16 * 2**20  # one ranged request
_NUM_PARALLEL_BLOCKS = 4
_UPLOAD_CHUNK_SIZE = 8 * 2**20  # of one request; gs wants a multiple of 256 KiB, s3 at least 5 MiB
_UPLOAD_SESSION = re.compile(r"(upload_id=)[^&\s]+")  # of a resumable upload; whoever knows it may write
_CLAIM = "claim"  # the metadata entry by which a claimant knows its own object again
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
_DAMAGE_CODES = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"})


@dataclass(frozen=True)
class _Stat:
    """What a store knows of an object. A composite one has no md5, and some encrypted ones neither."""

    size: int
    md5: str | None
    crc32c: str | None = None
    claim: str | None = None
    version: str = ""  # another one whenever the object was written


class ObjectStore(ABC):
    """`tasks.storage.Store` over an fsspec file system. The subclasses hold what differs between the stores."""

    scheme: ClassVar[str]

    def __init__(self, policy: StoragePolicy) -> None:
        self._policy = policy
        self._fs = _filesystem(self.scheme, policy.request_timeout_seconds, os.getpid())

    def read_bytes(self, uri: str) -> bytes:
        def read() -> bytes:
            stat = self._stat(uri)
            refuse_if_larger(uri, stat.size, self._policy.max_read_bytes)
            buffer = io.BytesIO()
            self._copy_checked(uri, stat, buffer)
            return buffer.getvalue()

        return self._attempt(uri, read)

    def exists(self, uri: str) -> bool:
        try:
            self._attempt(uri, lambda: self._call("info", _key(uri)))
        except NotFoundError:
            return False
        return True

    def size(self, uri: str) -> int:
        return self._attempt(uri, lambda: self._stat(uri)).size

    def list_files(self, uri: str) -> list[str]:
        prefix = _key(uri)
        # A folder that gets its first file while s3fs looks comes out as if it were a file; its type tells.
        found = self._attempt(uri, lambda: self._call("find", prefix, detail=True))
        keys = [key.lstrip("/") for key, info in found.items() if info["type"] == "file"]
        return [
            f"{self.scheme}://{key}"
            for key in keys
            if not key.endswith("/") and (key == prefix or key.startswith(f"{prefix}/"))
        ]

    def download(self, uri: str, path: Path, max_bytes: int) -> None:
        def fetch() -> None:
            stat = self._stat(uri)
            refuse_if_larger(uri, stat.size, max_bytes)
            local_files.write_atomically(path, partial(self._copy_checked, uri, stat))

        self._attempt(uri, fetch)

    def content_md5(self, uri: str) -> str:
        def ask_or_compute() -> str:
            stat = self._stat(uri)
            return stat.md5 or self._copy_checked(uri, stat, None)

        return self._attempt(uri, ask_or_compute)

    def publish_bytes(self, uri: str, data: bytes, content_type: str) -> None:
        self._upload(uri, _Stat(len(data), _md5(data)), lambda: self._put_bytes(uri, data, content_type))

    def publish_file(self, path: Path, uri: str, content_type: str) -> str:
        try:
            num_bytes, md5 = path.stat().st_size, local_files.md5(path)
        except OSError as error:
            raise translated(error, str(path)) from error
        sent = _Stat(num_bytes, md5)
        self._upload(uri, sent, lambda: self._put_file(uri, path, content_type, sent))
        return md5

    def create(self, uri: str, data: bytes, content_type: str) -> bool:
        token = uuid.uuid4().hex
        return self._attempt(uri, lambda: self._create_once(uri, data, content_type, token))

    def delete(self, uri: str) -> None:
        try:
            self._attempt(uri, lambda: self._call("rm_file", _object_key(uri)))
        except NotFoundError:
            return

    def version(self, uri: str) -> str:
        return self._attempt(uri, lambda: self._stat(uri)).version

    def delete_version(self, uri: str, expected: str) -> bool:  # noqa: ARG002 compared by the caller
        self.delete(uri)
        return True

    @abstractmethod
    def _stat(self, uri: str) -> _Stat: ...

    @abstractmethod
    def _put_bytes(self, uri: str, data: bytes, content_type: str, *, claim: str | None = None) -> None:
        """Upload; with a claim, only where there is nothing yet, else FileExistsError."""

    @abstractmethod
    def _put_file(self, uri: str, path: Path, content_type: str, sent: _Stat) -> None: ...

    @abstractmethod
    def _was_repeated(self, error: Exception) -> bool:
        """Whether the library has already repeated the request that ended with this error."""

    @abstractmethod
    def _translated(self, error: Exception, uri: str) -> StorageError: ...

    def _call(self, method: str, *args: Any, num_bytes: int = 0, **kwargs: Any) -> Any:
        """A method of the file system under our time limit: the libraries have none over all their retries."""
        if self._fs.async_impl:
            kwargs["timeout"] = self._policy.time_limit(num_bytes)
        return getattr(self._fs, method)(*args, **kwargs)

    def _attempt(self, uri: str, action: Callable[[], Result]) -> Result:
        """Run an action, again if it is worth it, and turn a library's error into one of ours."""
        attempt = 1
        while True:
            try:
                return action()
            except StorageError as error:  # of an attempt within this one: only damage is worth a new start
                if not isinstance(error, DamagedError) or attempt == self._policy.max_attempts:
                    raise
                failure: StorageError = error
            except Exception as error:
                failure = self._translated(error, uri)
                if not failure.transient or self._was_repeated(error) or attempt == self._policy.max_attempts:
                    raise failure from error
            logger.warning("Attempt %s of %s failed: %s", attempt, self._policy.max_attempts, failure)
            time.sleep(self._policy.pause_seconds(attempt))
            attempt += 1

    def _copy_checked(self, uri: str, stat: _Stat, target: BinaryIO | None) -> str:
        """Write an object's bytes, compare them with the store's checksum, return their md5."""
        md5, crc32c = hashlib.md5(usedforsecurity=False), _crc32c() if stat.crc32c and not stat.md5 else None
        for start in range(0, stat.size, _BLOCK_SIZE * _NUM_PARALLEL_BLOCKS):
            for block in self._read_blocks(uri, start, min(start + _BLOCK_SIZE * _NUM_PARALLEL_BLOCKS, stat.size)):
                md5.update(block)
                if crc32c:
                    crc32c.update(block)
                if target:
                    target.write(block)
        if stat.md5 not in {None, md5.hexdigest()}:
            raise DamagedError(f"{uri}: the bytes that came have md5 {md5.hexdigest()}; the store says {stat.md5}")
        if crc32c and base64.b64encode(crc32c.digest()).decode() != stat.crc32c:
            raise DamagedError(f"{uri}: the bytes that came do not match the store's crc32c {stat.crc32c}")
        return md5.hexdigest()

    def _read_blocks(self, uri: str, start: int, end: int) -> list[bytes]:
        starts = range(start, end, _BLOCK_SIZE)
        if len(starts) == 1:
            return [self._read_block(uri, start, end)]
        with ThreadPoolExecutor(len(starts)) as executor:
            return list(executor.map(lambda at: self._read_block(uri, at, min(at + _BLOCK_SIZE, end)), starts))

    def _read_block(self, uri: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            block = self._call("cat_file", _object_key(uri), start=start, end=end, num_bytes=end - start)
            if len(block) != end - start:
                raise DamagedError(f"{uri}: {len(block)} bytes came of the {end - start} from byte {start} on")
            return bytes(block)

        return self._attempt(uri, read)

    def _upload(self, uri: str, sent: _Stat, put: Callable[[], None]) -> None:
        def put_unless_there() -> None:
            try:
                put()
            except Exception:
                if not self._has_arrived(uri, sent):
                    raise
                logger.info("%s arrived although the store's reply was lost", uri)

        self._attempt(uri, put_unless_there)

    def _has_arrived(self, uri: str, sent: _Stat) -> bool:
        try:
            stat = self._stat(uri)
        except Exception:  # noqa: BLE001 the upload's own error says more than this one
            return False
        return stat.size == sent.size and stat.md5 == sent.md5

    def _create_once(self, uri: str, data: bytes, content_type: str, token: str) -> bool:
        try:
            self._put_bytes(uri, data, content_type, claim=token)
        except Exception:
            try:
                stat = self._stat(uri)
            except (FileNotFoundError, NotFoundError):
                stat = None
            if stat is None:
                raise
            if stat.claim != token:
                return False
            if stat.md5 not in {None, _md5(data)}:
                self.publish_bytes(uri, data, content_type)
        return True


class MemoryStore(ObjectStore):
    """A dictionary of this process: for tests, and for flows tried out without a bucket."""

    scheme = "memory"
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def _stat(self, uri: str) -> _Stat:
        info = self._fs.info(_object_key(uri))
        if info["type"] != "file":
            raise NotFoundError(f"{uri} is a folder, not a file")
        return _Stat(info["size"], _md5(self._fs.cat_file(_object_key(uri))), version=str(info["created"]))

    def _put_bytes(
        self,
        uri: str,
        data: bytes,
        content_type: str,  # noqa: ARG002
        *,
        claim: str | None = None,  # noqa: ARG002
    ) -> None:
        self._fs.pipe_file(_object_key(uri), bytes(data))

    def _put_file(self, uri: str, path: Path, content_type: str, sent: _Stat) -> None:  # noqa: ARG002
        self._fs.pipe_file(_object_key(uri), path.read_bytes())

    def _create_once(self, uri: str, data: bytes, content_type: str, token: str) -> bool:
        with self._lock:
            if self._fs.exists(_object_key(uri)):
                return False
            self._put_bytes(uri, data, content_type, claim=token)
            return True

    def _was_repeated(self, error: Exception) -> bool:  # noqa: ARG002
        return True

    def _translated(self, error: Exception, uri: str) -> StorageError:
        return translated(error, uri) if isinstance(error, OSError) else StorageError(f"{uri}: {error!r}")


class GoogleStore(ObjectStore):
    """Google Cloud Storage through gcsfs, which compares each upload's md5 with the reply (`consistency="md5"`)."""

    scheme = "gs"

    def _stat(self, uri: str) -> _Stat:
        bucket, _, key = _object_key(uri).partition("/")
        info = self._call("call", "GET", "b/{}/o/{}", bucket, key, json_out=True)  # info() would list the folder too
        if "gzip" in info.get("contentEncoding", ""):
            raise StorageError(f"{uri} is stored with Content-Encoding gzip; upload it without")
        md5 = info.get("md5Hash")
        return _Stat(
            size=int(info["size"]),
            md5=base64.b64decode(md5).hex() if md5 else None,
            crc32c=info.get("crc32c"),
            claim=info.get("metadata", {}).get(_CLAIM),
            version=str(info["generation"]),
        )

    def delete_version(self, uri: str, expected: str) -> bool:
        bucket, _, key = _object_key(uri).partition("/")

        def delete() -> bool:
            try:
                self._call("call", "DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=expected)
            except FileNotFoundError:
                return True
            except Exception as error:
                if getattr(error, "code", None) in {412, "412"}:
                    return False
                raise
            return True

        return self._attempt(uri, delete)

    def _put_bytes(self, uri: str, data: bytes, content_type: str, *, claim: str | None = None) -> None:
        self._call(
            "pipe_file",
            _object_key(uri),
            data,
            content_type=content_type,
            chunksize=_UPLOAD_CHUNK_SIZE,
            metadata={_CLAIM: claim} if claim else None,
            mode="create" if claim else "overwrite",
            num_bytes=len(data),
        )

    def _put_file(self, uri: str, path: Path, content_type: str, sent: _Stat) -> None:
        self._call(
            "put_file",
            str(path),
            _object_key(uri),
            content_type=content_type,
            chunksize=_UPLOAD_CHUNK_SIZE,
            num_bytes=sent.size,
        )

    def _was_repeated(self, error: Exception) -> bool:
        from gcsfs.retry import ChecksumError, is_retriable

        return is_retriable(error) and not isinstance(error, ChecksumError)

    def _translated(self, error: Exception, uri: str) -> StorageError:
        from gcsfs.retry import ChecksumError, HttpError, is_retriable
        from google.auth.exceptions import DefaultCredentialsError

        text = _UPLOAD_SESSION.sub(r"\1…", str(error))
        message = f"{uri}: {type(error).__name__}: {text}"
        status = int(error.code or 0) if isinstance(error, HttpError) else 0
        if isinstance(error, ChecksumError):
            return DamagedError(message)
        if status in {401, 403} or isinstance(error, DefaultCredentialsError) or text.startswith("Forbidden"):
            return PermissionDeniedError(message)
        if isinstance(error, FileExistsError):  # a claim that was gone again when we looked
            return StorageError(message, transient=True)
        if isinstance(error, FileNotFoundError) and _UPLOAD_SESSION.search(str(error)):  # it wants to start again
            return StorageError(message, transient=True)
        if isinstance(error, OSError) and not is_retriable(error):
            return translated(error, uri)
        return StorageError(message, transient=is_retriable(error) or status in _TRANSIENT_STATUSES)


class AmazonStore(ObjectStore):
    """S3 and what speaks its protocol, through s3fs."""

    scheme = "s3"

    def _stat(self, uri: str) -> _Stat:
        bucket, _, key = _object_key(uri).partition("/")
        head = self._call("call_s3", "head_object", Bucket=bucket, Key=key)
        return _Stat(
            head["ContentLength"],
            _md5_of_etag(head),
            claim=head.get("Metadata", {}).get(_CLAIM),
            version=f"{head['ETag']} {head['LastModified'].isoformat()} {head.get('VersionId', '')}",
        )

    def _put_bytes(self, uri: str, data: bytes, content_type: str, *, claim: str | None = None) -> None:
        metadata = {"Metadata": {_CLAIM: claim}} if claim else {}
        self._call(
            "pipe_file",
            _object_key(uri),
            data,
            ContentType=content_type,
            mode="create" if claim else "overwrite",
            num_bytes=len(data),
            **metadata,
        )
        self._check_arrival(uri, _Stat(len(data), _md5(data)))

    def _put_file(self, uri: str, path: Path, content_type: str, sent: _Stat) -> None:
        self._call("put_file", str(path), _object_key(uri), ContentType=content_type, num_bytes=sent.size)
        self._check_arrival(uri, sent)

    def _check_arrival(self, uri: str, sent: _Stat) -> None:
        """Where the store has no md5 (an upload in parts, a key of KMS), botocore's own crc32 of each part stands."""
        stat = self._stat(uri)
        if stat.size != sent.size or stat.md5 not in {None, sent.md5}:
            raise DamagedError(
                f"{uri}: the store has {stat.size} bytes, md5 {stat.md5}; we sent {sent.size}, {sent.md5}"
            )

    def _was_repeated(self, error: Exception) -> bool:
        """botocore repeats a request until its answer begins; what goes wrong in the body is ours."""
        from botocore.exceptions import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            HTTPClientError,
            ResponseStreamingError,
        )

        if isinstance(error, TimeoutError):  # of a body's read, or of our own limit for the whole call
            return not isinstance(error.__cause__, HTTPClientError)
        before_the_body = isinstance(error, HTTPClientError) and not isinstance(error, ResponseStreamingError)
        return before_the_body or _s3_status(error) in {500, 502, 503, 504}

    def _translated(self, error: Exception, uri: str) -> StorageError:
        from aiohttp import ClientError as ConnectionFailure
        from botocore.exceptions import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            FlexibleChecksumError,
            HTTPClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )
        from botocore.parsers import ResponseParserError  # type: ignore[import-untyped,import-not-found,unused-ignore]

        message = f"{uri}: {type(error).__name__}: {error}"
        if isinstance(error, FlexibleChecksumError) or _s3_code(error) in _DAMAGE_CODES:
            return DamagedError(message)
        if isinstance(error, NoCredentialsError | PartialCredentialsError) or _s3_status(error) in {401, 403}:
            return PermissionDeniedError(message)
        broken = isinstance(error, HTTPClientError | ConnectionFailure | ResponseParserError)
        if isinstance(error, FileExistsError):  # a claim that was gone again when we looked
            return StorageError(message, transient=True)
        if isinstance(error, OSError) and not broken and _s3_status(error) not in _TRANSIENT_STATUSES:
            return translated(error, uri)
        return StorageError(message, transient=broken or _s3_status(error) in _TRANSIENT_STATUSES)


def object_store(scheme: str, policy: StoragePolicy) -> ObjectStore:
    stores: dict[str, type[ObjectStore]] = {store.scheme: store for store in (MemoryStore, GoogleStore, AmazonStore)}
    if scheme not in stores:
        raise RefusedUriError(f"The scheme {scheme!r} is allowed, but we know only file, https, {', '.join(stores)}")
    return stores[scheme](policy)


@lru_cache(maxsize=8)  # fsspec's own cache has one entry a thread and never lets go; and a fork needs new ones
def _filesystem(scheme: str, request_timeout_seconds: float, process_id: int) -> Any:  # noqa: ARG001
    import fsspec

    options: dict[str, dict[str, Any]] = {
        "memory": {},
        "gs": {"consistency": "md5", "requests_timeout": request_timeout_seconds},
        "s3": {
            "config_kwargs": {
                "connect_timeout": min(10.0, request_timeout_seconds),
                "read_timeout": request_timeout_seconds,
                "retries": {"mode": "standard", "total_max_attempts": 6},
            }
        },
    }
    try:
        store = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options[scheme])
    except ImportError as error:
        extra = "'scail-batch-renders[s3]'" if scheme == "s3" else "scail-batch-renders"
        raise StorageError(f"{scheme}:// needs a package that is missing here; pip install {extra}") from error
    if scheme == "s3":
        store.retries = 1  # s3fs repeats whole reads of requests that it repeats and botocore repeats: 5 × 5 × 6
    return store


def _key(uri: str) -> str:
    """What fsspec calls the path: bucket and key."""
    return uri.partition("://")[2].strip("/")


def _object_key(uri: str) -> str:
    key = _key(uri)
    if "/" not in key and not uri.startswith("memory:"):
        raise RefusedUriError(f"{uri} names a bucket, not a file in it")
    return key


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _crc32c() -> Any:
    import google_crc32c

    return google_crc32c.Checksum()  # type: ignore[no-untyped-call]


def _md5_of_etag(head: dict[str, Any]) -> str | None:
    """The ETag, where it is an md5: not of an upload in parts, and not under a key of KMS or the customer's."""
    etag = str(head.get("ETag", "")).strip('"')
    encrypted = head.get("SSECustomerAlgorithm") or str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
    return etag if len(etag) == 32 and "-" not in etag and not encrypted else None


def _s3_reply(error: Exception) -> dict[str, Any]:
    """The store's reply, which s3fs hides behind an OSError."""
    for candidate in (error, error.__cause__):
        reply = getattr(candidate, "response", None)
        if isinstance(reply, dict):
            return reply
    return {}


def _s3_status(error: Exception) -> int:
    return int(_s3_reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _s3_code(error: Exception) -> str:
    return str(_s3_reply(error).get("Error", {}).get("Code", ""))
