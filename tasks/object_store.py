"""Objects behind fsspec: what is the same for gs (google_store.py), s3 (amazon_store.py) and, for tests, memory.

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
CLAIM = "claim"  # the metadata entry by which a claimant knows its own object again
TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})


@dataclass(frozen=True)
class Stat:
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
        self._upload(uri, Stat(len(data), bytes_md5(data)), lambda: self._put_bytes(uri, data, content_type))

    def publish_file(self, path: Path, uri: str, content_type: str) -> str:
        try:
            num_bytes, md5 = path.stat().st_size, local_files.md5(path)
        except OSError as error:
            raise translated(error, str(path)) from error
        sent = Stat(num_bytes, md5)
        self._upload(uri, sent, lambda: self._put_file(uri, path, content_type, sent))
        return md5

    def create(self, uri: str, data: bytes, content_type: str) -> bool:
        token = uuid.uuid4().hex
        return self._attempt(uri, lambda: self._create_once(uri, data, content_type, token))

    def delete(self, uri: str) -> None:
        try:
            self._attempt(uri, lambda: self._call("rm_file", object_key(uri)))
        except NotFoundError:
            return

    def version(self, uri: str) -> str:
        return self._attempt(uri, lambda: self._stat(uri)).version

    def delete_version(self, uri: str, expected: str) -> bool:  # noqa: ARG002 compared by the caller
        self.delete(uri)
        return True

    @abstractmethod
    def _stat(self, uri: str) -> Stat: ...

    @abstractmethod
    def _put_bytes(self, uri: str, data: bytes, content_type: str, *, claim: str | None = None) -> None:
        """Upload; with a claim, only where there is nothing yet, else FileExistsError."""

    @abstractmethod
    def _put_file(self, uri: str, path: Path, content_type: str, sent: Stat) -> None: ...

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

    def _copy_checked(self, uri: str, stat: Stat, target: BinaryIO | None) -> str:
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
            block = self._call("cat_file", object_key(uri), start=start, end=end, num_bytes=end - start)
            if len(block) != end - start:
                raise DamagedError(f"{uri}: {len(block)} bytes came of the {end - start} from byte {start} on")
            return bytes(block)

        return self._attempt(uri, read)

    def _upload(self, uri: str, sent: Stat, put: Callable[[], None]) -> None:
        def put_unless_there() -> None:
            try:
                put()
            except Exception:
                if not self._has_arrived(uri, sent):
                    raise
                logger.info("%s arrived although the store's reply was lost", uri)

        self._attempt(uri, put_unless_there)

    def _has_arrived(self, uri: str, sent: Stat) -> bool:
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
            if stat.md5 not in {None, bytes_md5(data)}:
                self.publish_bytes(uri, data, content_type)
        return True


class MemoryStore(ObjectStore):
    """A dictionary of this process: for tests, and for flows tried out without a bucket."""

    scheme = "memory"
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def _stat(self, uri: str) -> Stat:
        info = self._fs.info(object_key(uri))
        if info["type"] != "file":
            raise NotFoundError(f"{uri} is a folder, not a file")
        return Stat(info["size"], bytes_md5(self._fs.cat_file(object_key(uri))), version=str(info["created"]))

    def _put_bytes(
        self,
        uri: str,
        data: bytes,
        content_type: str,  # noqa: ARG002
        *,
        claim: str | None = None,  # noqa: ARG002
    ) -> None:
        self._fs.pipe_file(object_key(uri), bytes(data))

    def _put_file(self, uri: str, path: Path, content_type: str, sent: Stat) -> None:  # noqa: ARG002
        self._fs.pipe_file(object_key(uri), path.read_bytes())

    def _create_once(self, uri: str, data: bytes, content_type: str, token: str) -> bool:
        with self._lock:
            if self._fs.exists(object_key(uri)):
                return False
            self._put_bytes(uri, data, content_type, claim=token)
            return True

    def _was_repeated(self, error: Exception) -> bool:  # noqa: ARG002
        return True

    def _translated(self, error: Exception, uri: str) -> StorageError:
        return translated(error, uri) if isinstance(error, OSError) else StorageError(f"{uri}: {error!r}")


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


def object_key(uri: str) -> str:
    key = _key(uri)
    if "/" not in key and not uri.startswith("memory:"):
        raise RefusedUriError(f"{uri} names a bucket, not a file in it")
    return key


def bytes_md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _crc32c() -> Any:
    import google_crc32c

    return google_crc32c.Checksum()  # type: ignore[no-untyped-call]
