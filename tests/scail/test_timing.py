from __future__ import annotations

import logging
import time

import pytest
import torch

from scail.timing import StageClock

CPU = torch.device("cpu")


def test_stages_keep_the_order_in_which_they_ran():
    clock = StageClock(CPU)

    for name in ("read", "compute", "write"):
        with clock.stage(name):
            pass

    assert list(clock.seconds) == ["read", "compute", "write"]


def test_a_stage_has_the_time_that_passed_in_it():
    clock = StageClock(CPU)
    start = time.perf_counter()

    with clock.stage("sleep"):
        time.sleep(0.02)

    assert 0.02 <= clock.seconds["sleep"] <= time.perf_counter() - start


def test_a_stage_that_ran_twice_has_the_sum():
    clock = StageClock(CPU)

    for _ in range(2):
        with clock.stage("sleep"):
            time.sleep(0.01)

    assert clock.seconds["sleep"] >= 0.02
    assert list(clock.seconds) == ["sleep"]


def test_what_a_stage_raises_passes_through():
    clock = StageClock(CPU)

    with pytest.raises(KeyError, match="lost"), clock.stage("broken"):
        raise KeyError("lost")


def test_each_clock_starts_empty():
    with StageClock(CPU).stage("first"):
        pass

    assert StageClock(CPU).seconds == {}


def test_every_stage_is_one_line_in_the_log(caplog):
    clock = StageClock(CPU)

    with caplog.at_level(logging.INFO, "scail.timing"):
        for name in ("read", "write"):
            with clock.stage(name):
                pass

    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["read", "write"]


def test_on_a_cpu_the_peak_is_that_of_the_process():
    clock = StageClock(CPU)
    before = clock.peak_memory_gib()

    block = bytearray(64 * 1024**2)
    block[::4096] = b"x" * len(block[::4096])  # touched, so that it is resident

    assert 0.05 < before <= clock.peak_memory_gib() < 1024


def test_on_a_gpu_the_clock_is_read_only_when_the_queue_is_empty(monkeypatch):
    device = torch.device("cuda", 0)
    events = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(("synchronize", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 3 * 1024**3)

    clock = StageClock(device)
    with clock.stage("compute"):
        events.append(("compute", device))

    assert events == [(name, device) for name in ("reset", "synchronize", "compute", "synchronize")]
    assert clock.peak_memory_gib() == 3
