"""Remote bytes: read, publish atomically, claim. With `object_store.py`, its own part, the one user of fsspec.

A URI is a plain path, `file://`, `memory://`, `gs://`, `s3://` or, for reading only, `https://`. Whoever publishes
writes media first and the done record last; readers trust only what a done record names.

What the libraries do not do by themselves, each with a test:
- gcsfs probes every bucket by gRPC unless told not to before it is imported; an emulator then stalls for a minute.
- A listing cache makes `open().read()` return an overwritten object cut to its old size: it is off everywhere.
- `fsspec.exists` answers "no" to a 503: we ask for the object's information and let errors be errors.
- gcsfs retries whole files within retried requests, and writes to the target: we fetch blocks to a temporary name.
- A lost reply makes a claim or an upload look failed although it was done: we look before we believe the error.
"""

from __future__ import annotations

import mimetypes
import os
from pathlib import Path, PurePosixPath
from typing import Protocol

from tasks.local_files import LocalStore
from tasks.uris import (
    DEFAULT_POLICY,
    DamagedError,
    NotFoundError,
    PermissionDeniedError,
    RefusedUriError,
    StorageError,
    StoragePolicy,
    browser_url,
    join,
    local_path,
    name,
    parent,
    redact,
    resolve,
    scheme_of,
)

__all__ = [
    "DEFAULT_POLICY",
    "DamagedError",
    "NotFoundError",
    "PermissionDeniedError",
    "RefusedUriError",
    "StorageError",
    "StoragePolicy",
    "browser_url",
    "content_md5",
    "create",
    "delete",
    "delete_version",
    "download",
    "exists",
    "join",
    "list_files",
    "local_path",
    "name",
    "parent",
    "publish_bytes",
    "publish_file",
    "read_bytes",
    "redact",
    "resolve",
    "size",
    "sweep",
    "version",
]

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read once, when gcsfs is first imported

_CONTENT_TYPES = {  # not left to the machine's own table: an mp4 must play in a browser, not download
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}


def read_bytes(uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> bytes:
    return _store(uri, policy).read_bytes(uri)


def exists(uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> bool:
    """Whether there is a file or a folder with something in it.

    Raises:
        StorageError: If the store could not say; that is not a "no".
    """
    return _store(uri, policy).exists(uri)


def size(uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> int:
    """Bytes of a file."""
    return _store(uri, policy).size(uri)


def list_files(prefix_uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> list[str]:
    """URIs of all files below a folder, at any depth, sorted; empty if there is no such folder."""
    return sorted(_store(prefix_uri, policy).list_files(prefix_uri))


def download(uri: str, path: Path, *, max_bytes: int | None = None, policy: StoragePolicy = DEFAULT_POLICY) -> None:
    """Bring a file to `path`, checked against the store's checksum; in a failure `path` is as it was before.

    Raises:
        RefusedUriError: If the file has more than `max_bytes`, or more than the policy allows.
    """
    limit = policy.max_download_bytes if max_bytes is None else min(max_bytes, policy.max_download_bytes)
    _store(uri, policy).download(uri, path, limit)


def content_md5(uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> str:
    """Hex md5 of a file's bytes: as the store knows it, else computed from the bytes."""
    return _store(uri, policy).content_md5(uri)


def publish_bytes(
    uri: str, data: bytes, content_type: str | None = None, *, policy: StoragePolicy = DEFAULT_POLICY
) -> None:
    """Write or replace a file: readers see the old one or the new one whole, never a part."""
    _store(uri, policy).publish_bytes(uri, data, content_type or _content_type(uri))


def publish_file(
    path: Path, uri: str, content_type: str | None = None, *, policy: StoragePolicy = DEFAULT_POLICY
) -> str:
    """Like `publish_bytes`, from a file on this machine; returns the hex md5 of its bytes, which were read anyway."""
    return _store(uri, policy).publish_file(path, uri, content_type or _content_type(uri))


def create(uri: str, data: bytes, *, policy: StoragePolicy = DEFAULT_POLICY) -> bool:
    """Claim a name: true for exactly one of all callers, also if the store's reply to it was lost."""
    return _store(uri, policy).create(uri, data, _content_type(uri))


def delete(uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> None:
    """Remove a file; that there is none is no error, since a repeated call must not fail."""
    _store(uri, policy).delete(uri)


def version(uri: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> str:
    """A token that is another one whenever the file was written anew, with the same bytes too."""
    return _store(uri, policy).version(uri)


def delete_version(uri: str, expected: str, *, policy: StoragePolicy = DEFAULT_POLICY) -> bool:
    """Remove a file unless it was written anew since its `version` was asked for; false if it was.

    Only gs compares and removes in one step; elsewhere a file written within the same moment is removed too.
    """
    store = _store(uri, policy)
    try:
        if store.version(uri) != expected:
            return False
    except NotFoundError:
        return True
    return store.delete_version(uri, expected)


def sweep(prefix_uri: str, older_than_seconds: float, *, policy: StoragePolicy = DEFAULT_POLICY) -> int:
    """Remove what killed local writers left below a folder; returns how many. Object stores keep no such thing."""
    store = _store(prefix_uri, policy)
    return store.sweep(prefix_uri, older_than_seconds) if isinstance(store, LocalStore) else 0


class Store(Protocol):
    """What the functions above need of a kind of storage."""

    def read_bytes(self, uri: str) -> bytes: ...
    def exists(self, uri: str) -> bool: ...
    def size(self, uri: str) -> int: ...
    def list_files(self, uri: str) -> list[str]: ...
    def download(self, uri: str, path: Path, max_bytes: int) -> None: ...
    def content_md5(self, uri: str) -> str: ...
    def publish_bytes(self, uri: str, data: bytes, content_type: str) -> None: ...
    def publish_file(self, path: Path, uri: str, content_type: str) -> str: ...
    def create(self, uri: str, data: bytes, content_type: str) -> bool: ...
    def delete(self, uri: str) -> None: ...
    def version(self, uri: str) -> str: ...
    def delete_version(self, uri: str, expected: str) -> bool: ...


def _store(uri: str, policy: StoragePolicy) -> Store:
    scheme = scheme_of(uri)
    if scheme not in policy.allowed_schemes:
        allowed = ", ".join(sorted(policy.allowed_schemes))
        raise RefusedUriError(f"{redact(uri)} is of the scheme {scheme!r}; allowed are {allowed}")
    if scheme == "file":
        return LocalStore()
    if scheme in {"http", "https"}:
        from tasks.https_input import HttpsInput

        return HttpsInput(policy)
    if scheme == "gs":
        from tasks.google_store import GoogleStore

        return GoogleStore(policy)
    if scheme == "s3":
        from tasks.amazon_store import AmazonStore

        return AmazonStore(policy)
    if scheme == "memory":
        from tasks.object_store import MemoryStore

        return MemoryStore(policy)
    raise RefusedUriError(f"The scheme {scheme!r} is allowed, but we know only file, https, memory, gs, s3")


def _content_type(uri: str) -> str:
    suffix = PurePosixPath(name(uri)).suffix.lower()
    return _CONTENT_TYPES.get(suffix) or mimetypes.guess_type(f"file{suffix}")[0] or "application/octet-stream"
