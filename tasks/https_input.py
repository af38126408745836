"""Inputs behind https, most of them presigned: read only, bounded in size and time, never from inside our network.

A row's URL is a stranger's. Each host, and each host that it redirects to, is resolved once, all its addresses are
checked, and the connection goes to an address that was checked: a name that resolves differently a moment later
gains nothing. A signature covers the method and the host, so there is no HEAD, and no port in `Host` that was not
in the URL. Query strings are signatures: no message shows one. Proxies of the environment are not used.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from tasks import local_files
from tasks.uris import (
    DamagedError,
    NotFoundError,
    PermissionDeniedError,
    RefusedUriError,
    StorageError,
    StoragePolicy,
    redact,
    refuse_if_larger,
    translated,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_REDIRECTS = 5
_MAX_ADDRESSES = 8  # of one host; each may cost a time-out
_MAX_RETRY_AFTER_SECONDS = 30.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class HttpsInput:
    """`tasks.storage.Store` of what can only be read."""

    def __init__(self, policy: StoragePolicy) -> None:
        self._policy = policy

    def read_bytes(self, uri: str) -> bytes:
        def read() -> bytes:
            buffer = io.BytesIO()
            self._copy(uri, self._policy.max_read_bytes, buffer)
            return buffer.getvalue()

        return self._attempt(uri, read)

    def download(self, uri: str, path: Path, max_bytes: int) -> None:
        copy = partial(self._copy, uri, max_bytes)
        self._attempt(uri, lambda: local_files.write_atomically(path, copy))

    def exists(self, uri: str) -> bool:
        try:
            self._attempt(uri, lambda: self._size(uri))
        except NotFoundError:
            return False
        return True

    def size(self, uri: str) -> int:
        num_bytes = self._attempt(uri, lambda: self._size(uri))
        if num_bytes is None:
            raise StorageError(f"{redact(uri)} does not say how many bytes it has")
        return num_bytes

    def content_md5(self, uri: str) -> str:
        return self._attempt(uri, lambda: self._copy(uri, self._policy.max_download_bytes, None))

    def list_files(self, uri: str) -> list[str]:
        raise RefusedUriError(f"{redact(uri)}: there is no way to list what lies behind https")

    def publish_bytes(self, uri: str, data: bytes, content_type: str) -> None:  # noqa: ARG002
        _refuse_to_write(uri)

    def publish_file(self, path: Path, uri: str, content_type: str) -> str:  # noqa: ARG002
        _refuse_to_write(uri)

    def create(self, uri: str, data: bytes, content_type: str) -> bool:  # noqa: ARG002
        _refuse_to_write(uri)

    def delete(self, uri: str) -> None:
        _refuse_to_write(uri)

    def delete_version(self, uri: str, expected: str) -> bool:  # noqa: ARG002
        _refuse_to_write(uri)

    def version(self, uri: str) -> str:
        raise RefusedUriError(f"{redact(uri)}: files behind https are inputs, and are not watched")

    def _attempt(self, uri: str, action: Callable[[], Result]) -> Result:
        for attempt in range(1, self._policy.max_attempts + 1):
            try:
                return action()
            except (OSError, http.client.HTTPException) as error:
                failure = _failure(error, uri)
                if not failure.transient or attempt == self._policy.max_attempts:
                    raise failure from error
            except ValueError:  # from the parts of an address that is none; what it says may quote the signature
                raise RefusedUriError(f"{redact(uri)} is no valid URL, or leads to one that is not") from None
            except StorageError as error:
                if not error.transient or attempt == self._policy.max_attempts:
                    raise
                failure = error
            logger.warning("Attempt %s of %s failed: %s", attempt, self._policy.max_attempts, failure)
            time.sleep(max(getattr(failure, "retry_after", 0.0), self._policy.pause_seconds(attempt)))
        raise AssertionError("the last attempt returns or raises")

    def _size(self, uri: str) -> int | None:
        with self._get(uri, first_byte_only=True) as response:
            if response.status == 416:  # there is no first byte
                return 0
            total = re.fullmatch(r"bytes 0-0/(\d+)", response.getheader("Content-Range", ""))
            return int(total[1]) if total else response.length if response.status == 200 else None

    def _copy(self, uri: str, max_bytes: int, target: BinaryIO | None) -> str:
        """Write the body, checked as far as the server lets us, and return its md5."""
        started, num_received, md5 = time.monotonic(), 0, hashlib.md5(usedforsecurity=False)
        with self._get(uri) as response:
            declared, expected_md5 = response.length, _declared_md5(response)
            if declared is None and not response.chunked:  # then an answer cut short, even in its headers, looks whole
                raise DamagedError(f"{redact(uri)}: the answer does not say where it ends")
            refuse_if_larger(uri, declared or 0, max_bytes)
            while block := response.read1(2**16):  # read() would wait for all of it, however slowly it comes
                num_received += len(block)
                refuse_if_larger(uri, num_received, max_bytes)
                if time.monotonic() - started > self._policy.time_limit(num_received):
                    raise StorageError(f"{redact(uri)}: only {num_received} bytes in time; given up", transient=True)
                md5.update(block)
                if target:
                    target.write(block)
        if declared not in {None, num_received}:
            raise DamagedError(f"{redact(uri)}: {num_received} bytes came of {declared}")
        if expected_md5 not in {None, md5.hexdigest()}:
            raise DamagedError(f"{redact(uri)}: md5 {md5.hexdigest()} came; the server says {expected_md5}")
        return md5.hexdigest()

    @contextmanager
    def _get(self, uri: str, *, first_byte_only: bool = False) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET after all redirects, if it is one with a body."""
        url = uri
        for _ in range(_MAX_REDIRECTS + 1):
            connection = self._connection(url)
            try:
                response = self._answer(connection, url, first_byte_only=first_byte_only)
                location = response.getheader("Location")
                if response.status not in {301, 302, 303, 307, 308} or not location:
                    _raise_unless_ok(response, uri)
                    yield response
                    return
            finally:
                connection.close()
            url = urljoin(url, location)
        raise RefusedUriError(f"{redact(uri)} redirects more than {_MAX_REDIRECTS} times")

    def _connection(self, url: str) -> _CheckedConnection:
        parts = urlsplit(url)
        if parts.scheme not in self._policy.allowed_schemes & {"http", "https"}:
            raise RefusedUriError(f"{redact(url)} is of the scheme {parts.scheme!r}, which is not allowed")
        if not parts.hostname or "@" in parts.netloc:
            raise RefusedUriError(f"{redact(url)} needs a host, and no user or password; use a presigned URL")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise RefusedUriError(f"{redact(url)} has no valid port") from error
        addresses = _addresses(parts.hostname, port)
        if not self._policy.allow_private_addresses:
            _refuse_inner_addresses(parts.hostname, addresses)
        return _CheckedConnection(parts, port, addresses, self._policy.request_timeout_seconds)

    def _answer(self, connection: _CheckedConnection, url: str, *, first_byte_only: bool) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Accept-Encoding": "identity", "User-Agent": "scail-batch-renders"}
        try:
            connection.request(
                "GET",
                quote(target, safe="/%?:=&~+!$,;'@()*[]"),
                headers=headers | ({"Range": "bytes=0-0"} if first_byte_only else {}),
            )
            return connection.getresponse()
        finally:
            connection.watchdog.cancel()


class _CheckedConnection(http.client.HTTPConnection):
    """A connection to one of the given addresses, under the host's own name.

    A socket's time limit starts anew with every byte. The watchdog's is for everything from the handshake to the
    end of the headers, after which its owner cancels it.
    """

    def __init__(self, parts: SplitResult, port: int, addresses: list[str], timeout: float) -> None:
        super().__init__(parts.hostname or "", port, timeout=timeout)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.default_port = 443 if self._tls else 80  # else `Host` would carry a port that the signature does not
        self._addresses = addresses
        self.watchdog = threading.Timer(timeout, self._hang_up)
        self.watchdog.daemon = True

    def connect(self) -> None:
        self.sock = self._first_that_answers()
        if self._tls:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.watchdog.start()
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def _hang_up(self) -> None:
        with suppress(OSError):  # it ended by itself meanwhile
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def _first_that_answers(self) -> socket.socket:
        *others, last = self._addresses
        for address in others:
            with suppress(OSError):
                return socket.create_connection((address, self.port), self.timeout)
        return socket.create_connection((last, self.port), self.timeout)


class _BusyError(StorageError):
    """The server asks us to come back later."""

    def __init__(self, message: str, *, transient: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(message, transient=transient)
        self.retry_after = retry_after


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))[:_MAX_ADDRESSES]


def _refuse_inner_addresses(host: str, addresses: list[str]) -> None:
    for address in addresses:
        if not all(inner.is_global and not inner.is_multicast for inner in _reached_by(address)):
            raise RefusedUriError(f"https host {host!r} is {address}, which is not an address of the public internet")


def _reached_by(address: str) -> list[_Address]:
    """The address itself and the IPv4 address that it stands for in a translated or tunnelled network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return [ip]
    embedded = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        embedded.append(ipaddress.IPv4Address(ip.packed[-4:]))
    if ip.ipv4_mapped:  # not global by itself, whatever it stands for
        return [ip.ipv4_mapped]
    return [ip, *(inner for inner in embedded if inner)]


def _raise_unless_ok(response: http.client.HTTPResponse, uri: str) -> None:
    status, message = response.status, f"{redact(uri)}: {response.status} {response.reason}"
    if status in {404, 410}:
        raise NotFoundError(message)
    if status in {401, 403}:
        raise PermissionDeniedError(f"{message}; a presigned URL may have expired")
    if status in {408, 425, 429} or status >= 500:
        after = response.getheader("Retry-After", "")
        seconds = float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0
        raise _BusyError(message, retry_after=min(seconds, _MAX_RETRY_AFTER_SECONDS))
    if status not in {200, 206, 416}:
        raise StorageError(f"{message}; expected 200")
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise StorageError(f"{redact(uri)} came with Content-Encoding {response.getheader('Content-Encoding')}")


def _declared_md5(response: http.client.HTTPResponse) -> str | None:
    """Google's own header, or the standard one. An ETag may be anything."""
    if response.getheader("x-goog-stored-content-encoding", "identity") != "identity":
        return None  # the hash is of what is stored; what comes is unpacked
    google = re.search(r"md5=([A-Za-z0-9+/]{22}==)", response.getheader("x-goog-hash", ""))
    standard = re.fullmatch(r"([A-Za-z0-9+/]{22}==)", response.getheader("Content-MD5", ""))
    declared = google or standard
    return base64.b64decode(declared[1]).hex() if declared else None


def _failure(error: OSError | http.client.HTTPException, uri: str) -> StorageError:
    if isinstance(error, socket.gaierror):
        again = error.errno == socket.EAI_AGAIN
        return StorageError(f"{redact(uri)}: the host's name has no address: {error.strerror}", transient=again)
    if isinstance(error, ssl.SSLCertVerificationError):
        return StorageError(f"{redact(uri)}: the host's certificate is not to be trusted: {error.verify_message}")
    if isinstance(error, ssl.SSLError | http.client.HTTPException):
        return StorageError(f"{redact(uri)}: the connection broke: {type(error).__name__}", transient=True)
    return translated(error, uri)


def _refuse_to_write(uri: str) -> NoReturn:
    raise RefusedUriError(f"{redact(uri)}: https is for reading only")
