"""A run's results while it goes on."""

from __future__ import annotations

import math
import pickle
import tracemalloc

from tasks.jobs import ClipResult
from tasks.packed import PackedResults
from tests.tasks.test_results import rendered


def test_results_come_back_as_they_were_in_the_order_of_their_rows():
    odd = rendered(4, "b").failed_by(ValueError("a\nb, “c”"))
    not_a_number = rendered(2, "a").model_copy(update={"columns": {"note": ""}})
    metrics = not_a_number.metrics.model_copy(update={"seconds": {"denoise": math.inf}})
    not_a_number = not_a_number.model_copy(update={"metrics": metrics})

    packed = PackedResults([odd])
    packed.append(not_a_number)

    assert list(packed) == [not_a_number, odd] == list(packed)
    assert len(packed) == 2
    assert odd in packed
    assert rendered(5, "c") not in packed


def test_a_thousand_results_take_half_a_megabyte_and_not_ten():
    plain = [pickle.dumps(rendered(row, f"clip-{row}")) for row in range(1000)]  # as they come from a worker

    tracemalloc.start()
    try:
        packed = PackedResults()
        for data in plain:
            packed.append(pickle.loads(data))
        num_bytes, _ = tracemalloc.get_traced_memory()
        results: list[ClipResult] = [pickle.loads(data) for data in plain]
        num_bytes_unpacked = tracemalloc.get_traced_memory()[0] - num_bytes
    finally:
        tracemalloc.stop()

    assert len(results) == len(packed) == 1000
    assert num_bytes < 0.5e6
    assert num_bytes < num_bytes_unpacked / 15
