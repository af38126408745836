"""A machine that is taken away, with real processes: its clips are finished or given back in time."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tasks.jobs import Attempt
from tasks.tls import write_certificates
from tests.chaos.harness import (
    NUM_WORKERS,
    Cluster,
    attempts_of,
    done_clips,
    wait_for_computing,
    wait_until,
    write_clips,
)

ALLOWED_SECONDS = 25.0


def starts_of(output) -> list[Attempt]:
    return [attempt for attempts in attempts_of(output).values() for attempt in attempts]


def command_of(cluster: Cluster, worker: psutil.Process) -> tuple[str, subprocess.Popen]:
    """Name and process of the `scail worker` that keeps a worker."""
    above = {parent.pid for parent in worker.parents()}
    return next((name, process) for name, process in cluster.processes.items() if process.pid in above)


def seconds_until_ended(process: subprocess.Popen) -> float:
    start = time.monotonic()
    assert process.wait(60) == 0
    return time.monotonic() - start


def test_a_worker_told_to_end_gives_its_clip_back_at_the_next_step(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, ["slow 2"] * 2), tmp_path / "out")
    worker = wait_for_computing(run)
    name, command = command_of(cluster, worker)
    command.terminate()
    seconds = seconds_until_ended(command)
    cluster.processes.pop(name)
    alive = worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    outcome = run.wait()
    cluster.start_worker(int(name.rpartition("-")[2]))

    assert seconds < ALLOWED_SECONDS
    assert not alive
    assert outcome == 0, run.tail()
    assert set(done_clips(run.output)) == {"clip-0", "clip-1"}
    returned = [start for start in starts_of(run.output) if start.outcome == "WorkerClosingError"]
    assert {start.worker.rpartition(":")[2] for start in returned} == {str(worker.pid)}
    assert all(start.outcome for start in starts_of(run.output))


def test_a_clip_whose_worker_was_told_to_end_and_killed_goes_elsewhere_and_is_not_blamed(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, ["hang-once, told to end"]), tmp_path / "out")
    worker = wait_for_computing(run)
    name, command = command_of(cluster, worker)
    command.terminate()
    wait_until(lambda: starts_of(run.output)[0].told_to_end, "it is on record that the worker was told to end")
    worker.kill()
    seconds = seconds_until_ended(command)
    cluster.processes.pop(name)
    outcome = run.wait()
    cluster.start_worker(int(name.rpartition("-")[2]))

    assert seconds < ALLOWED_SECONDS
    assert outcome == 0, run.tail()
    assert set(done_clips(run.output)) == {"clip-0"}
    assert [start.outcome for start in sorted(starts_of(run.output), key=lambda start: start.number)][-1] == "published"


def greeting(cluster: Cluster, certificates: Path | None) -> bytes:
    """The first byte that the scheduler sends to somebody with these certificates."""
    context = ssl.create_default_context(cafile=str(cluster.tls_dir / "ca.pem"))
    context.check_hostname = False
    if certificates:
        context.load_cert_chain(certificates / "node.pem", certificates / "node.key")
    plain = socket.create_connection(("127.0.0.1", cluster.ports["scheduler"]), timeout=10)
    with context.wrap_socket(plain) as connection:
        return connection.recv(1)


def test_the_scheduler_speaks_with_nobody_who_has_no_certificate_of_its_authority(cluster, tmp_path):
    write_certificates(tmp_path, [])

    welcome = greeting(cluster, cluster.tls_dir)
    for foreign in (None, tmp_path / "node"):
        with pytest.raises(ssl.SSLError, match=r"certificate required|unknown ca|UNKNOWN_CA"):
            greeting(cluster, foreign)

    assert len(welcome) == 1


def test_health_is_asked_over_the_same_certificates(cluster):
    ask = partial(subprocess.run, capture_output=True, text=True, check=False, timeout=60, env=cluster.environment)
    scail = [sys.executable, "-m", "flows.cli", "health"]

    answers = [ask([*scail, service, cluster.address]) for service in ("server", "scheduler", "worker")]
    elsewhere = ask([*scail, "scheduler", cluster.address.rpartition(":")[0] + ":9"])

    assert [answer.returncode for answer in answers] == [0, 0, 0], answers
    assert f"{NUM_WORKERS} workers" in answers[1].stdout
    assert elsewhere.returncode == 1
    assert "no Dask scheduler answers" in elsewhere.stderr
