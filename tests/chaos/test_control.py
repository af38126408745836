"""Who has a say over a run while it goes on: its priority, its share of the GPUs, and whoever stops it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tasks.jobs import Attempt
from tests.chaos.harness import attempts_of, wait_for_computing, write_clips

SLOW = "slow 0.4"  # per step; a clip is on the GPU for about two seconds


def starts_of(output: Path) -> list[Attempt]:
    """The first start of every clip, in the order in which they began."""
    return sorted((attempts[0] for attempts in attempts_of(output).values()), key=lambda attempt: attempt.started_at)


def test_a_run_of_higher_priority_overtakes_one_that_came_first(cluster, tmp_path):
    for name in ("first", "urgent"):
        (tmp_path / name).mkdir()
    first = cluster.render(write_clips(tmp_path / "first", [SLOW] * 12), tmp_path / "first" / "out")
    wait_for_computing(first)

    urgent = cluster.render(
        write_clips(tmp_path / "urgent", [SLOW] * 4), tmp_path / "urgent" / "out", "--priority", 5, name="urgent"
    )

    assert urgent.wait() == 0, urgent.tail()
    assert first.process.poll() is None, "the first run was over before the urgent one"
    assert first.wait() == 0, first.tail()
    began = [attempt.started_at for attempt in starts_of(urgent.output)]
    between = [attempt for attempt in starts_of(first.output) if began[0] < attempt.started_at < began[-1]]
    assert len(between) <= 1  # on its way to a worker already when the urgent clips came


def test_a_run_holds_no_more_gpus_than_it_may(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [SLOW] * 5), tmp_path / "out", "--max-gpus", 1)

    assert run.wait() == 0, run.tail()
    starts = starts_of(run.output)
    assert len(starts) == 5
    for earlier, later in pairwise(starts):
        assert earlier.seen_at <= later.started_at, "two clips were under way at a time"
