"""URIs of a batch's files, what may be touched of them, and what can go wrong.

The part of `tasks/storage.py` that moves no bytes; it hands these names on, so that others import them from there.
A plain path or the rest of a `gs://`, `s3://` or `memory://` URI is taken as it is; `file://` and `https://` are
percent-encoded, as their standards want it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import random
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urljoin

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_REPEATABLE_ERRNOS = frozenset({errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE})
_ENCODED = frozenset({"file", "http", "https"})


class StorageError(Exception):
    """Base of every error of this module; the message names the URI, without the signature of a signed one.

    `transient` says whether the same call may succeed later.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotFoundError(StorageError):
    """There is no such object, folder or bucket."""


class PermissionDeniedError(StorageError):
    """The store knows no credentials of ours, or they do not reach this far."""


class RefusedUriError(StorageError):
    """We do not touch this: the scheme is not allowed, the address is private, or there is too much of it."""


class DamagedError(StorageError):
    """The bytes that came or went are not those that the store has, or were cut short."""

    def __init__(self, message: str, *, transient: bool = True) -> None:
        super().__init__(message, transient=transient)


def translated(error: OSError, uri: str) -> StorageError:
    """What an error of the operating system means for a file or an object."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"{redact(uri)}: there is no such file")
    message = f"{redact(uri)}: {type(error).__name__}: {error}"
    if isinstance(error, PermissionError):
        return PermissionDeniedError(message)
    transient = isinstance(error, ConnectionError | TimeoutError) or error.errno in _REPEATABLE_ERRNOS
    return StorageError(message, transient=transient)


def refuse_if_larger(uri: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise RefusedUriError(f"{redact(uri)} has {num_bytes} bytes; at most {max_bytes} are allowed")


@dataclass(frozen=True)
class StoragePolicy:
    """What may be touched, how much of it, and for how long."""

    allowed_schemes: frozenset[str] = frozenset({"file", "memory", "gs", "s3", "https"})
    allow_private_addresses: bool = False  # of an https input: loopback, link-local and private networks
    max_read_bytes: int = 2**30  # into memory
    max_download_bytes: int = 128 * 2**30  # to disk; a checkpoint is the largest
    request_timeout_seconds: float = 60.0  # one request; of an https input, one wait for bytes
    call_timeout_seconds: float = 300.0  # one call of a library with all its own retries
    min_bytes_per_second: int = 256 * 2**10  # what a large file adds to the time limit
    max_attempts: int = 5  # of what the libraries do not repeat themselves
    first_pause_seconds: float = 0.5  # doubled after each attempt

    def time_limit(self, num_bytes: int) -> float:
        """Seconds after which moving so many bytes is given up."""
        return self.call_timeout_seconds + num_bytes / self.min_bytes_per_second

    def pause_seconds(self, attempt: int) -> float:
        """How long to wait after the attempt of this number, so that many clients do not come back together."""
        return random.uniform(0.5, 1.0) * self.first_pause_seconds * 2.0 ** (attempt - 1)


DEFAULT_POLICY = StoragePolicy()


def redact(uri: str) -> str:
    """The URI as it may be shown: without user, query and fragment, unless they are part of an object's name."""
    if "://" not in uri or scheme_of(uri) in {"gs", "s3", "memory"}:
        return uri
    scheme, _, rest = re.split("[?#]", uri, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def join(base_uri: str, *parts: str) -> str:
    """Names below a folder. The query of an https base, which signs that base alone, is dropped."""
    names = "/".join(part.strip("/") for part in parts)
    if "://" in base_uri and scheme_of(base_uri) in _ENCODED:
        base_uri, names = _without_query(base_uri), quote(names)
    if not names or not base_uri:
        return base_uri or names
    folder = base_uri.rstrip("/")
    return f"{folder}///{names}" if folder.endswith(":") else f"{folder}/{names}"  # file:/// is a folder too


def resolve(base_uri: str, relative_or_uri: str) -> str:
    """What a manifest in the folder `base_uri` means by a cell: URIs and absolute paths pass as they are.

    Raises:
        RefusedUriError: If `..` climbs out of the bucket.
    """
    if _SCHEME.match(relative_or_uri) or relative_or_uri.startswith("/"):
        return relative_or_uri
    scheme, base = scheme_of(base_uri), base_uri.rstrip("/")
    if scheme in {"http", "https"}:
        return urljoin(_without_query(base_uri).rstrip("/") + "/", quote(relative_or_uri, safe="/%?&=+,;:@!$'()*~"))
    if "://" not in base_uri:
        return os.path.normpath(Path(base_uri) / relative_or_uri)
    if scheme == "file":
        return Path(os.path.normpath(_file_path(base_uri) / relative_or_uri)).as_uri()
    root, _, folder = base.partition("://")[2].partition("/")
    path = posixpath.normpath(posixpath.join(folder, relative_or_uri))
    if path == ".." or path.startswith("../"):
        raise RefusedUriError(f"{relative_or_uri!r} leads out of {scheme}://{root} when read from {base_uri}")
    return f"{scheme}://{root}/{path}"


def parent(uri: str) -> str:
    """The folder of a file; a bucket or a root is its own."""
    if "://" not in uri:
        return str(Path(uri).parent)
    prefix, _, path = _without_query(uri).rstrip("/").partition("://")
    folder, slash, _ = path.rpartition("/")
    if prefix == "file":
        return f"file://{folder or '/'}"
    return f"{prefix}://{folder if slash else path}"


def name(uri: str) -> str:
    """The last part of a URI, decoded and without a query: fit for a file name and for a message."""
    if "://" not in uri:
        return Path(uri).name
    last = _without_query(uri).rstrip("/").rpartition("/")[2]
    return unquote(last) if scheme_of(uri) in {"http", "https", "file"} else last


def local_path(uri: str) -> Path | None:
    """Where the file lies on this machine, or None if it is remote and needs a download."""
    return _file_path(uri) if scheme_of(uri) == "file" else None


def browser_url(uri: str) -> str | None:
    """Where somebody who may see the object can open it in a browser; None for what only this machine has.

    Google's and Amazon's addresses ask for a log-in where the bucket is not public.
    """
    scheme, (bucket, _, key) = scheme_of(uri), uri.partition("://")[2].partition("/")
    if scheme == "gs":
        return f"https://storage.cloud.google.com/{bucket}/{quote(key)}"
    if scheme == "s3":
        return f"https://{bucket}.s3.amazonaws.com/{quote(key)}"
    return uri if scheme == "https" else None


def scheme_of(uri: str) -> str:
    """Lower-case scheme; a plain path is a file."""
    match = _SCHEME.match(uri)
    return match[1].lower() if match else "file"


def _without_query(uri: str) -> str:
    return re.split("[?#]", uri, maxsplit=1)[0] if scheme_of(uri) in _ENCODED else uri


def _file_path(uri: str) -> Path:
    if not _SCHEME.match(uri):
        return Path(uri)
    host, _, path = _without_query(uri).partition("://")[2].partition("/")
    if host not in {"", "localhost"}:
        raise RefusedUriError(f"{uri} names the host {host!r}; a local file is file:///path, with three slashes")
    return Path(f"/{unquote(path)}")
