"""Prefect's server is gone for a minute; nothing waits for it, and no run loses its place among a deployment's."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from tests.chaos.harness import (
    Cluster,
    assert_all_rendered,
    computing,
    num_computed,
    wait_for_computing,
    wait_until,
    write_clips,
)

SLOWER = "slow 2.4"  # per step; a clip is on the GPU for about ten seconds


def test_rendering_goes_on_while_the_prefect_server_is_away_for_a_minute(cluster, tmp_path):
    workers = cluster.workers()
    run = cluster.render(write_clips(tmp_path, [SLOWER] * 14), tmp_path / "out")
    killed = wait_for_computing(run)
    lease = take_a_place(cluster)
    cluster.kill("server")
    back_at, away = time.monotonic() + 60, num_computed(run.output)
    killed.kill()
    wait_until(lambda: num_computed(run.output) >= away + 2, "clips are rendered without a server")
    wait_until(partial(computing_on_others, run.output, workers), "a fresh process renders without a server, too")
    time.sleep(max(0.0, back_at - time.monotonic()))
    is_under_way = run.process.poll() is None
    cluster.start_server()
    wait_until(cluster.server_answers, "the server answers again")

    cluster.call(f"v2/concurrency_limits/leases/{lease}/renew", {"lease_duration": 300})  # else 410, and the run ends
    assert is_under_way, "the run was over before the server was back"
    assert_all_rendered(cluster, run, 14)
    assert num_computed(run.output) <= 15


def take_a_place(cluster: Cluster) -> str:
    """What a run of a deployment with a limit holds, and renews every four minutes; its id."""
    cluster.call("v2/concurrency_limits/", {"name": "places", "limit": 4, "active": True})
    place = {"names": ["places"], "slots": 1, "mode": "concurrency", "lease_duration": 300}
    return cluster.call("v2/concurrency_limits/increment-with-lease", place)["lease_id"]


def computing_on_others(output: Path, workers: list[int]) -> bool:
    return any(int(attempt.worker.rpartition(":")[2]) not in workers for attempt in computing(output))
