"""The soak's judgement of memory."""

from __future__ import annotations

import gc
import os

from tests.chaos.harness import NUM_WORKERS
from tests.chaos.memory import Growth, MemoryLog, Sample


def log_of(mib_after_clips) -> MemoryLog:
    """Of one process that was there for 500 clips, the first 100 of them its warm-up."""
    log = MemoryLog(warm_up_clips=100)
    log.samples["coordinator", 1] = [Sample(done, mib_after_clips(done)) for done in range(500)]
    return log


def test_what_grows_while_it_warms_up_and_then_stays_is_flat():
    [growth] = log_of(lambda done: 100 + min(done, 99)).growths()

    assert growth == Growth("coordinator", 199, 199, 399)
    assert growth.is_flat


def test_what_grows_by_a_fiftieth_over_the_run_is_not_flat():
    [growth] = log_of(lambda done: 100 + done / 100).growths()

    assert not growth.is_flat
    assert str(growth) == "101.2 → 104.8 MiB over 399 clips, +3.6 %, +9.2 KiB a clip"


def test_of_processes_that_followed_one_another_the_one_that_saw_most_clips_is_judged():
    log = log_of(lambda _: 100.0)
    log.samples["coordinator", 2] = [Sample(done, float(done)) for done in range(500, 620)]
    log.samples["coordinator", 3] = [Sample(done, float(done)) for done in range(700, 710)]  # too brief to tell

    assert [growth.num_clips for growth in log.growths()] == [399]


def test_a_process_is_asked_for_its_memory_and_one_that_is_gone_is_not_missed():
    log = MemoryLog(warm_up_clips=0)

    log.note("coordinator", os.getpid(), num_done=3)
    log.note("coordinator", 2**22 + 1, num_done=3)

    [[sample]] = log.samples.values()
    assert sample.num_done == 3
    assert sample.mib > 1


def test_scheduler_and_workers_have_settled_with_all_that_they_keep(cluster):
    with cluster.connect() as client:
        num_kept = [client.run_on_scheduler(gc.get_freeze_count), *client.run(gc.get_freeze_count).values()]

    assert len(num_kept) == 1 + NUM_WORKERS
    assert min(num_kept) > 100_000
