"""Who has a say over a run while it goes on: its priority, its share of the GPUs, and whoever pauses or stops it."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tasks.jobs import Attempt, AttemptStage
from tests.chaos.harness import (
    ROOT,
    Cluster,
    attempts_of,
    computing,
    done_clips,
    num_computed,
    wait_for_computing,
    wait_until,
    write_clips,
)

SLOW = "slow 0.4"  # per step; a clip is on the GPU for about two seconds
SLOWER = "slow 2.0 until"  # about nine: a command that has a say over the run must have started before its end
STEP_SECONDS = 1.0
LONG = f"slow {STEP_SECONDS}"
REACTION_SECONDS = 1.0  # beside the step itself: signals, messages, two processes on a busy machine
LOOK_SECONDS = 2.0  # a run's state is asked for so often


def starts_of(output: Path) -> list[Attempt]:
    """The first start of every clip, in the order in which they began."""
    return sorted((attempts[0] for attempts in attempts_of(output).values()), key=lambda attempt: attempt.started_at)


def ask(cluster: Cluster, wish: str, run: object) -> None:
    """`scail pause RUN`, and its like."""
    command = [sys.executable, "-m", "flows.cli", wish, str(run)]
    subprocess.run(command, env=cluster.environment, cwd=ROOT, check=True, timeout=60)


def seconds_until_stopped(output: Path, since: float) -> list[float]:
    """For each clip that was computing, the seconds from `since` to its end."""

    def ended() -> list[Attempt] | None:
        last = [attempts[-1] for attempts in attempts_of(output).values()]
        return last if all(attempt.outcome for attempt in last) else None

    stopped = wait_until(ended, "every start has an outcome", 30)
    assert {attempt.outcome for attempt in stopped} == {"RunCancelledError"}
    return [
        (datetime.fromisoformat(attempt.seen_at) - datetime.fromtimestamp(since, UTC)).total_seconds()
        for attempt in stopped
        if attempt.stage is AttemptStage.COMPUTING
    ]


def test_a_run_of_higher_priority_overtakes_one_that_came_first(cluster, tmp_path):
    for name in ("first", "urgent"):
        (tmp_path / name).mkdir()
    first = cluster.render(write_clips(tmp_path / "first", [f"{SLOWER} overtaken"] * 10), tmp_path / "first" / "out")
    wait_for_computing(first)

    urgent = cluster.render(
        write_clips(tmp_path / "urgent", [SLOW] * 4), tmp_path / "urgent" / "out", "--priority", 5, name="urgent"
    )
    wait_until(lambda: cluster.num_waiting(priority=5), "an urgent clip waits for its turn", every=0.3)
    cluster.let_go("overtaken")

    assert urgent.wait() == 0, urgent.tail()
    assert first.wait() == 0, first.tail()
    began = [attempt.started_at for attempt in starts_of(urgent.output)]
    of_first = [attempt.started_at for attempt in starts_of(first.output)]
    assert max(of_first) > began[-1], "the first run had begun all its clips before the urgent one"
    assert len([start for start in of_first if began[0] < start < began[-1]]) <= 1  # on its way to a worker already


def test_a_run_holds_no_more_gpus_than_it_may(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [SLOW] * 3), tmp_path / "out", "--max-gpus", 1)

    assert run.wait() == 0, run.tail()
    starts = starts_of(run.output)
    assert len(starts) == 3
    for earlier, later in pairwise(starts):
        assert earlier.seen_at <= later.started_at, "two clips were under way at a time"


@pytest.mark.parametrize("workers", ["local", "2", None], ids=["local", "processes", "cluster"])
def test_ctrl_c_stops_the_clips_within_a_step_and_publishes_nothing(cluster, tmp_path, workers, monkeypatch):
    if workers:  # on one machine, few have a server
        monkeypatch.setattr(Cluster, "api_url", "")
    run = cluster.render(write_clips(tmp_path, [LONG] * 3, num_steps=30), tmp_path / "out", workers=workers)
    wait_for_computing(run)
    time.sleep(1.5 * STEP_SECONDS)

    children = psutil.Process(run.process.pid).children(recursive=True)

    since = time.time()
    run.interrupt()

    assert run.wait(30) == 1, run.tail()
    stopped = seconds_until_stopped(run.output, since)
    assert stopped
    assert max(stopped) < STEP_SECONDS + REACTION_SECONDS
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not done_clips(run.output)
    assert not list(run.output.glob("clips/*"))
    assert "stopped" in run.tail()
    assert "Traceback" not in run.tail()


def test_cancelling_stops_the_clips_within_a_step_and_frees_the_workers(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [LONG] * 4, num_steps=60), tmp_path / "out")
    wait_for_computing(run)
    next_dir = tmp_path / "next"
    next_dir.mkdir()
    following = cluster.render(write_clips(next_dir, ["hello"] * 2), next_dir / "out", name="next")

    since = time.time()
    cluster.cancel(cluster.flow_run_id(run))

    assert run.wait(60) == 1, run.tail()
    assert cluster.flow_state(run) == "CANCELLED"
    assert not done_clips(run.output)
    assert max(seconds_until_stopped(run.output, since)) < LOOK_SECONDS + STEP_SECONDS + REACTION_SECONDS
    assert following.wait(60) == 0, following.tail()
    assert len(done_clips(following.output)) == 2


def test_a_paused_run_finishes_what_is_under_way_and_goes_on_when_it_is_told(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [f"{SLOWER} paused"] * 10), tmp_path / "out")
    wait_for_computing(run)
    ask(cluster, "pause", cluster.flow_run_id(run))
    time.sleep(LOOK_SECONDS + 0.5)
    cluster.let_go("paused")
    wait_until(lambda: not computing(run.output) and not unended(run.output), "what was under way has ended")
    paused_at = num_computed(run.output)
    time.sleep(3)

    assert num_computed(run.output) == paused_at < 10
    assert run.process.poll() is None
    assert cluster.flow_state(run) == "PAUSED"
    ask(cluster, "resume", cluster.flow_run_id(run))
    assert run.wait() == 0, run.tail()
    assert num_computed(run.output) == 10
    assert len(done_clips(run.output)) == 10
    assert cluster.flow_state(run) == "COMPLETED"


def unended(output: Path) -> list[Attempt]:
    return [attempts[-1] for attempts in attempts_of(output).values() if attempts[-1].outcome is None]
