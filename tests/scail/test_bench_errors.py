from __future__ import annotations

import torch

from scail.bench_errors import error_rows
from scail.bench_goals import Workload
from scail.config import SCAIL_TINY


def test_each_path_of_this_device_has_its_errors_and_finer_numbers_have_smaller_ones():
    work = Workload(SCAIL_TINY, torch.device("cpu"), torch.float32, 5, 32, 64, compiled=False)

    errors = {row.figure: row.reached for row in error_rows(work)}

    assert errors["error of a forward, fastest attention"] == errors["error after 50 steps, fastest attention"] == 0
    assert 0 < errors["error of a forward, int8 products"] < errors["error of a forward, fp8 products"] < 10
    assert 0 < errors["error after 50 steps, int8 products"] < errors["error after 50 steps, fp8 products"] < 10
