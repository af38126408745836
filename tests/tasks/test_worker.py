"""What a worker process does besides rendering: claims, locks, a watchdog, and starting again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from scail.errors import InvalidInputError
from tasks import attempts, scratch, storage, worker
from tasks.attempts import PUBLISHED, cancelling_on_exit, open_attempt, read_attempts
from tasks.errors import (
    ClaimLostError,
    DeviceFaultError,
    RenderedElsewhereError,
    RunCancelledError,
    ScratchFullError,
    TooManyStartsError,
    WorkerClosingError,
)
from tasks.jobs import Attempt, AttemptStage
from tasks.scratch import clip_scratch, sweep_scratch
from tasks.settings import Settings
from tasks.storage import DEFAULT_POLICY, StorageError
from tasks.tls import write_certificates

KEY = "0" * 32


@pytest.fixture
def output(tmp_path) -> str:
    return str(tmp_path / "out")


def started(output: str, run_id: str = "run-1", **settings):
    return open_attempt(output, KEY, run_id=run_id, settings=Settings(**settings))


def leave_record(output: str, number: int, *, silent_seconds: float = 0.0, **fields) -> None:
    """A start as a dead or distant worker has left it."""
    seen_at = (datetime.now(UTC) - timedelta(seconds=silent_seconds)).isoformat()
    given = {"run_id": "run-0", "worker": f"host:{number}", "stage": AttemptStage.COMPUTING} | fields
    record = Attempt(number=number, started_at=seen_at, seen_at=seen_at, **given)
    storage.publish_bytes(f"{output}/attempts/{KEY}/{number}.json", record.model_dump_json().encode())


def recorded(output: str) -> list[Attempt]:
    return read_attempts(output, KEY, policy=DEFAULT_POLICY)


def test_a_start_and_its_end_are_on_record(output):
    with started(output) as attempt:
        attempt.enter(AttemptStage.COMPUTING)
        during = recorded(output)[0]
    with pytest.raises(ZeroDivisionError), started(output):
        1 / 0  # noqa: B018

    assert (during.stage, during.outcome) == (AttemptStage.COMPUTING, None)
    assert [attempt.outcome for attempt in recorded(output)] == [PUBLISHED, "ZeroDivisionError"]


def test_of_many_workers_one_has_the_clip(output):
    start, results = threading.Barrier(8), []

    def try_it(number: int) -> None:
        start.wait()
        try:
            with started(output, run_id=f"run-{number}"):
                results.append("mine")
                time.sleep(0.5)
        except RenderedElsewhereError:
            results.append("elsewhere")

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(results) == ["elsewhere"] * 7 + ["mine"]


def test_a_clip_of_a_silent_worker_is_taken_over(output):
    leave_record(output, 1, silent_seconds=61)

    with started(output) as attempt:
        numbers = [record.number for record in attempt.log]

    assert numbers == [1, 2]


def test_the_same_run_does_not_wait_for_a_worker_that_its_scheduler_gave_up(output):
    leave_record(output, 1, run_id="run-1")

    with started(output, run_id="run-1") as attempt:
        assert attempt.log[-1].number == 2


def test_a_worker_that_was_taken_for_dead_stops_at_its_next_step(output):
    def steps() -> None:
        with started(output, claim_seconds=0.3) as attempt:
            leave_record(output, 2)
            for _ in range(50):
                attempt.check()
                time.sleep(0.05)

    with pytest.raises(ClaimLostError):
        steps()


def test_a_worker_that_was_taken_for_dead_does_not_publish(output):
    with started(output) as attempt:
        leave_record(output, 2)
        with pytest.raises(ClaimLostError):
            attempt.confirm()


def test_a_worker_at_work_keeps_its_clip(output):
    with started(output, claim_seconds=0.6):
        time.sleep(1.5)
        with pytest.raises(RenderedElsewhereError), started(output, run_id="run-2", claim_seconds=0.6):
            pass


def test_a_clip_that_took_three_workers_with_it_fails_and_a_later_run_may_try_again(output):
    for number in (1, 2, 3):
        leave_record(output, number, silent_seconds=100)

    with pytest.raises(TooManyStartsError, match=r"3 workers .*: host:1 \(computing, step 0\), h"), started(output):
        pass
    with pytest.raises(TooManyStartsError), started(output):
        pass  # the same run hears the same again, and no worker is risked for it
    with started(output, run_id="run-2"):
        pass

    assert [record.outcome for record in recorded(output)][3:] == ["TooManyStartsError", PUBLISHED]


def test_workers_that_died_while_a_clip_only_waited_are_not_its_fault(output):
    for number in (1, 2, 3):
        leave_record(output, number, silent_seconds=100, stage=AttemptStage.PREPARING)

    with started(output) as attempt:
        assert attempt.log[-1].number == 4


@pytest.mark.parametrize(
    ("steps", "is_poison"),
    [
        ([0, 0, 0], True),
        ([7, 7, 7], True),
        ([2, 7, 7], False),  # the clip has been past step 2 alive
        ([9, 4, 2], False),
        ([2, 7, 4, 7, 7], True),
        ([1, 2, 3, 4, 5], False),
        ([1, 2, 3, 4, 5, 6], True),  # at no step twice, but too many
    ],
)
def test_a_dead_worker_is_not_held_against_a_clip_that_has_got_further(output, steps, is_poison):
    for number, done in enumerate(steps, 1):
        leave_record(output, number, silent_seconds=100, steps=done)

    with pytest.raises(TooManyStartsError) if is_poison else nullcontext(), started(output):
        pass


def test_a_clip_that_reached_its_publication_is_not_what_killed_the_worker_while_it_rendered(output):
    for number, stage in enumerate(["computing", "computing", "publishing", "computing"], 1):
        leave_record(output, number, silent_seconds=100, steps=6 if stage == "publishing" else 3, stage=stage)

    with started(output) as attempt:
        assert attempt.log[-1].number == 5


def test_a_clip_that_had_left_the_gpu_is_not_what_killed_the_worker(output):
    for number in (1, 2, 3, 4):
        leave_record(output, number, silent_seconds=100, steps=6, stage=AttemptStage.ENCODING)

    with started(output) as attempt:
        assert attempt.log[-1].number == 5


def test_a_clip_that_left_the_gpu_once_is_not_what_killed_the_worker_at_its_last_step(output):
    for number, stage in enumerate(["computing", "computing", "encoding", "computing"], 1):
        leave_record(output, number, silent_seconds=100, steps=6, stage=stage)

    with started(output) as attempt:
        assert attempt.log[-1].number == 5


def test_the_steps_behind_a_clip_go_on_record_while_it_renders(output):
    with started(output, claim_seconds=1.0) as attempt:
        attempt.enter(AttemptStage.COMPUTING)
        attempt.reached(3)
        deadline = time.monotonic() + 5
        while recorded(output)[0].steps != 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        during = recorded(output)[0]

    assert (during.stage, during.steps, during.outcome) == (AttemptStage.COMPUTING, 3, None)


def test_a_clip_that_breaks_one_gpu_after_the_other_is_poison_too(output):
    for number in (1, 2, 3):
        leave_record(output, number, outcome=DeviceFaultError.__name__)

    with pytest.raises(TooManyStartsError), started(output):
        pass


def test_bad_input_is_heard_again_in_the_same_run_and_looked_at_again_in_another(output):
    leave_record(output, 1, run_id="run-1", outcome="InvalidInputError", message="line 2: a text file")

    with pytest.raises(InvalidInputError, match="line 2: a text file"), started(output, run_id="run-1"):
        pass
    with started(output, run_id="run-2"):
        pass


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RunCancelledError])
def test_a_stopped_run_stops_clips_that_it_cannot_tell(output, reason):
    with started(output, claim_seconds=0.3) as attempt:
        with pytest.raises(reason), stopping(output, tell=lambda _run_id: None):
            raise reason
        with pytest.raises(RunCancelledError):
            attempt.confirm()


def test_a_clip_that_is_told_stops_without_asking_the_store(output, monkeypatch):
    monkeypatch.setattr(attempts, "stopped_runs", set())
    with started(output) as attempt:
        with pytest.raises(KeyboardInterrupt), stopping(output, tell=attempts.stopped_runs.add):
            raise KeyboardInterrupt
        with pytest.raises(RunCancelledError):
            attempt.check()


def test_a_run_that_fails_lets_its_clips_end(output):
    with started(output) as attempt:
        with pytest.raises(ValueError, match="a bug"), stopping(output, tell=attempts.stopped_runs.add):
            raise ValueError("a bug")
        attempt.confirm()


def stopping(output, *, tell):
    return cancelling_on_exit(output, "run-1", policy=DEFAULT_POLICY, tell=tell)


def test_a_worker_told_to_end_leaves_its_clips_between_two_steps(output, monkeypatch):
    monkeypatch.setattr(attempts, "worker_closing", threading.Event())

    with started(output) as attempt:
        attempts.worker_closing.set()
        with pytest.raises(WorkerClosingError):
            attempt.check()


def test_a_worker_told_to_end_finishes_what_has_its_last_step_behind_it(output, monkeypatch):
    monkeypatch.setattr(attempts, "worker_closing", threading.Event())

    with started(output) as attempt:
        attempt.enter(AttemptStage.COMPUTING)
        attempts.worker_closing.set()
        attempt.check(finishing=True)
        attempt.enter(AttemptStage.PUBLISHING)
        attempt.confirm()

    assert [record.outcome for record in recorded(output)] == [PUBLISHED]


def test_it_is_on_record_at_once_that_a_worker_was_told_to_end(output, monkeypatch):
    monkeypatch.setattr(attempts, "worker_closing", threading.Event())
    monkeypatch.setattr(attempts, "CLOSING_LOOK_SECONDS", 0.05)

    with started(output, claim_seconds=8.0):
        attempts.worker_closing.set()
        deadline = time.monotonic() + 20
        while not recorded(output)[0].told_to_end and time.monotonic() < deadline:
            time.sleep(0.05)
        during = recorded(output)[0]

    assert (during.told_to_end, during.outcome) == (True, None)


def test_workers_that_were_told_to_end_are_not_held_against_a_clip(output):
    for number in (1, 2, 3):
        leave_record(output, number, silent_seconds=100, told_to_end=True)

    with started(output) as attempt:
        assert attempt.log[-1].number == 4


def test_a_folder_in_scratch_belongs_to_one_process_at_a_time(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from tasks.scratch import clip_scratch\n"
        f"with clip_scratch(Path({str(tmp_path)!r}), '{KEY}', min_free_bytes=0) as folder:\n"
        "    (folder / 'rendered').touch(); print(folder, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    theirs = Path(other.stdout.readline().strip())
    with clip_scratch(tmp_path, KEY, min_free_bytes=0) as ours:
        pass
    other.kill()
    other.wait()

    with clip_scratch(tmp_path, KEY, min_free_bytes=0) as after:
        found = (after / "rendered").exists()

    assert ours != theirs == after
    assert found  # what the killed process had rendered need not be rendered again
    assert not list(tmp_path.iterdir())


def test_what_was_rendered_stays_for_the_next_attempt_only_if_that_may_publish_it(tmp_path):
    for error, stays in ((StorageError("503", transient=True), True), (ValueError("a bug"), False)):
        with pytest.raises(type(error)), clip_scratch(tmp_path, KEY, min_free_bytes=0):
            raise error
        assert bool(list(tmp_path.iterdir())) is stays


def test_a_full_disk_is_named_as_such_before_and_after_the_fact(tmp_path, monkeypatch):
    free = [10]
    monkeypatch.setattr(scratch, "_free_bytes", lambda _folder: free[0])

    with pytest.raises(ScratchFullError, match="has 10 bytes left"), clip_scratch(tmp_path, KEY, min_free_bytes=11):
        pass

    def fill_up() -> None:
        with clip_scratch(tmp_path, KEY, min_free_bytes=5):
            free[0] = 1
            raise OSError("ffmpeg could not write")

    with pytest.raises(ScratchFullError, match="no room"):
        fill_up()


def test_leftovers_are_swept_when_they_are_old_or_the_room_is_needed(tmp_path, monkeypatch):
    leftover = tmp_path / f"{KEY}.0"
    leftover.mkdir()

    assert sweep_scratch(tmp_path) == 0
    monkeypatch.setattr(scratch, "_free_bytes", lambda folder: 10 if any(folder.iterdir()) else 100)
    with clip_scratch(tmp_path, "1" * 32, min_free_bytes=50):
        pass

    assert not leftover.exists()


@pytest.mark.parametrize(("seconds", "survives"), [(0.5, False), (60.0, True)])
def test_the_watchdog_ends_a_process_that_hangs_with_the_interpreters_lock(seconds, survives):
    program = (
        "import ctypes; from tasks import watchdog\n"
        f"watchdog.start()\nwith watchdog.time_limit({seconds}): ctypes.PyDLL(None).sleep(3)"
    )

    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)

    assert done.returncode == (0 if survives else -signal.SIGKILL)


def test_the_watchdog_ends_with_the_process_that_it_watches():
    program = "import os; from tasks import watchdog; watchdog.start(); print(watchdog._watchdog.pid); os._exit(1)"

    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)

    watchdog = Path("/proc") / listed.stdout.strip()
    deadline = time.monotonic() + 20
    while watchdog.exists() and "Z" not in (watchdog / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_there_is_one_worker_per_gpu_and_each_sees_its_own(tmp_path):
    specs = worker.worker_specs("tcp://127.0.0.1:8786", checkpoint=str(tmp_path), gpus=["0", "GPU-ab"])

    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["0", "GPU-ab"]
    assert all(spec.environment["SCAIL_CHECKPOINT"] == str(tmp_path) for spec in specs)
    assert len({spec.name for spec in specs}) == 2
    assert len(worker.worker_specs("tcp://127.0.0.1:8786", checkpoint=str(tmp_path), gpus=[])) == 1


def test_workers_and_their_nannies_find_the_certificates_in_their_environment(tmp_path):
    write_certificates(tmp_path, [])
    node = tmp_path / "node"

    [spec] = worker.worker_specs("tls://gpu:8786", checkpoint=str(tmp_path), gpus=[], tls_dir=node)

    assert spec.environment["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
    assert spec.environment["DASK_DISTRIBUTED__COMM__TLS__WORKER__CERT"] == str(node / "node.pem")
    assert json.loads(spec.environment["DASK_DISTRIBUTED__NANNY__PRELOAD"]) == ["tasks.ending"]


def test_a_worker_that_ended_without_an_error_is_started_again(tmp_path):
    lines = tmp_path / "lines"
    program = (
        "import sys, os, signal, socket; from tasks.worker import WorkerSpec, keep_workers\n"
        "server = socket.create_server(('127.0.0.1', 0)); port = server.getsockname()[1]\n"
        "def say(line):\n"
        f"    open({str(lines)!r}, 'a').write(line + chr(10))\n"
        "    if 'starting it again' in line: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"spec = WorkerSpec('w', ({sys.executable!r}, '-c', 'pass'), dict(os.environ))\n"
        "keep_workers(f'tcp://127.0.0.1:{port}', [spec], say=say)"
    )

    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60, env=os.environ)

    assert done.returncode == 0
    assert lines.read_text().startswith("w ended with 0; starting it again")
