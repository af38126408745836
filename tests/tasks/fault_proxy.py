"""An HTTP proxy in front of an emulator that does to requests what networks and busy servers do to them."""

from __future__ import annotations

import http.client
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit


class Fault(StrEnum):
    NONE = "none"
    UNAVAILABLE = "503"
    TOO_MANY = "429"
    FORBIDDEN = "403"
    RESET = "reset"  # the connection breaks before the server sees the request
    LOST_REPLY = "lost reply"  # the server has done it, and nobody hears of it
    STALL = "stall"
    HALF_BODY = "half body"
    CORRUPT = "corrupt"  # one bit of what is uploaded, or of what comes back


ALL_FAULTS = tuple(fault for fault in Fault if fault not in {Fault.NONE, Fault.FORBIDDEN})


class Request(NamedTuple):
    method: str
    path: str
    fault: Fault


class _Rule(NamedTuple):
    method: str
    contains: str
    faults: Iterator[Fault]


class FaultProxy:
    """Forwards to `upstream`; `requests` is what came, in order, with what was done to it."""

    def __init__(self, stall_seconds: float = 2.5) -> None:
        self.stall_seconds = stall_seconds
        self.upstream = ""
        self.requests: list[Request] = []
        self.rewrite: Callable[[str, bytes], bytes] | None = None  # (path, reply) → reply
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="fault-proxy").start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        self._rules.clear()
        self.requests.clear()
        self.rewrite = None

    def next_are(self, *faults: Fault, method: str = "", contains: str = "") -> None:
        """The next matching requests suffer these, one after the other."""
        self._rules.append(_Rule(method, contains, iter(faults)))

    def always(self, fault: Fault, *, method: str = "", contains: str = "") -> None:
        self._rules.append(_Rule(method, contains, itertools.repeat(fault)))

    def at_random(self, share: float, seed: int, faults: tuple[Fault, ...] = ALL_FAULTS) -> None:
        generator = random.Random(seed)
        drawn = (generator.choice(faults) if generator.random() < share else Fault.NONE for _ in itertools.count())
        self._rules.append(_Rule("", "", drawn))

    def count(self, method: str = "", contains: str = "") -> int:
        return sum(request.method.startswith(method) and contains in request.path for request in list(self.requests))

    def fault_of(self, method: str, path: str) -> Fault:
        with self._lock:
            fault = Fault.NONE
            for rule in self._rules:
                if method.startswith(rule.method) and rule.contains in path:
                    fault = next(rule.faults, Fault.NONE)
                if fault is not Fault.NONE:
                    break
            self.requests.append(Request(method, path, fault))
            return fault


def _handler_of(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_about):
            return

        def handle(self):
            with suppress(ConnectionError, TimeoutError):
                super().handle()

        def _serve(self):
            body = self._read_body()
            fault = proxy.fault_of(self.command, self.path)
            match fault:
                case Fault.UNAVAILABLE | Fault.TOO_MANY | Fault.FORBIDDEN:
                    self._reply(int(fault), [("Content-Type", "text/plain")], b"come back later")
                case Fault.RESET:
                    self._break()
                case Fault.STALL:
                    time.sleep(proxy.stall_seconds)
                    self._break()
                case _:
                    self._forward(body, fault)

        def _forward(self, body, fault):
            corrupt_upload = fault is Fault.CORRUPT and self.command in {"PUT", "POST"} and len(body) > 20
            status, headers, reply = self._ask(_flipped(body, len(body) - 16) if corrupt_upload else body)
            if proxy.rewrite:
                reply = proxy.rewrite(self.path, reply)
            is_content = not any(word in dict(headers).get("Content-Type", "") for word in ("json", "xml"))
            if fault is Fault.CORRUPT and self.command == "GET" and status < 300 and reply and is_content:
                reply = _flipped(reply, len(reply) // 2)
            if fault is Fault.LOST_REPLY:
                self._break()
            elif fault is Fault.HALF_BODY and reply:
                self._reply(status, headers, reply, sent=len(reply) // 2)
            else:
                self._reply(status, headers, reply)

        def _ask(self, body):
            upstream = http.client.HTTPConnection(urlsplit(proxy.upstream).netloc, timeout=60)
            names = [name for name in self.headers if name.lower() not in {"connection", "transfer-encoding"}]
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name in dict.fromkeys(names):
                upstream.putheader(name, self.headers[name])
            upstream.endheaders(body)
            answer = upstream.getresponse()
            reply = answer.read()
            upstream.close()
            dropped = {"transfer-encoding", "connection", "date", "server"}
            return answer.status, [(n, v) for n, v in answer.getheaders() if n.lower() not in dropped], reply

        def _read_body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _reply(self, status, headers, reply, sent=None):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else reply[:sent])
            if sent is not None:
                self._break(gently=True)

        def _break(self, *, gently=False):
            """Close: with a reset, or so that what was sent still arrives."""
            if not gently:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815

    return Handler


def _flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
