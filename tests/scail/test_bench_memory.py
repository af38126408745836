from __future__ import annotations

import math

import torch

from scail.bench_goals import Workload
from scail.bench_memory import memory_rows
from scail.config import SCAIL_TINY


def test_each_policy_has_its_peak_and_its_slowdown_beside_the_goals():
    work = Workload(SCAIL_TINY, torch.device("cpu"), torch.float32, 5, 32, 64, compiled=False)

    rows = {row.figure: row for row in memory_rows(work, "fp8")}

    assert {figure: row.goal for figure, row in rows.items()} == {
        "peak memory, float8, resident": None,
        "peak memory, float8, balanced": 22.0,
        "peak memory, float8, low": 16.0,
        "slowdown, float8, balanced": 3.0,
        "slowdown, float8, low": 25.0,
    }
    assert all(math.isfinite(row.reached) for row in rows.values())
    assert rows["slowdown, float8, low"].beside > 0
