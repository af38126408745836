"""Which failure is tried again, and where."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace

import pytest

from scail.errors import CheckpointError, GenerationError, InvalidInputError, OutOfMemoryError
from tasks import errors
from tasks.errors import Policy, Where, policy_for, retry_here
from tasks.storage import DamagedError, PermissionDeniedError, StorageError

HERE, ELSEWHERE, NOWHERE = Where.SAME_WORKER, Where.ANOTHER_WORKER, Where.NOWHERE


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidInputError("a text file"), Policy(NOWHERE)),
        (CheckpointError("a weight is missing"), Policy(NOWHERE)),
        (StorageError("503", transient=True), Policy(HERE, 3)),
        (DamagedError("cut short"), Policy(HERE, 3)),
        (PermissionDeniedError("403"), Policy(NOWHERE)),
        (errors.ScratchFullError("0 bytes"), Policy(HERE, 3)),
        (OutOfMemoryError("80 GiB"), Policy(HERE, 4)),
        (GenerationError("not finite"), Policy(HERE, 2)),
        (errors.DeviceFaultError("illegal address"), Policy(ELSEWHERE)),
        (errors.ClaimLostError("taken for dead"), Policy(ELSEWHERE)),
        (errors.WorkerClosingError("told to end"), Policy(ELSEWHERE)),
        (asyncio.CancelledError(), Policy(ELSEWHERE)),
        (errors.RunCancelledError("stopped"), Policy(NOWHERE)),
        (errors.TooManyStartsError("3 workers"), Policy(NOWHERE)),
        (RuntimeError("Failed to reach API at http://127.0.0.1:4200/api/"), Policy(ELSEWHERE)),
        (RuntimeError("a bug of ours"), Policy(NOWHERE)),
        (ZeroDivisionError(), Policy(NOWHERE)),
    ],
)
def test_every_class_of_failure_has_its_place(error, expected):
    assert policy_for(error) == expected


def test_what_dask_and_prefect_raise_for_a_lost_worker_goes_elsewhere():
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError
    from prefect.exceptions import CrashedRun

    lost = [KilledWorker("task", None, 3), FutureCancelledError("key", None), CommClosedError(), CrashedRun()]

    assert {policy_for(error).where for error in lost} == {ELSEWHERE}


@pytest.mark.parametrize(("run_count", "expected"), [(1, True), (3, True), (4, False)])
def test_prefect_repeats_a_clip_as_often_as_its_policy_says(run_count, expected):
    state, task_run = SimpleNamespace(data=OutOfMemoryError("full")), SimpleNamespace(run_count=run_count)

    assert retry_here(None, task_run, state) is expected


def test_prefect_leaves_what_belongs_elsewhere_to_the_window():
    state = SimpleNamespace(data=errors.DeviceFaultError("gone"))

    assert not retry_here(None, SimpleNamespace(run_count=1), state)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: device-side assert triggered", errors.DeviceFaultError),
        ("CUDA error: out of memory", OutOfMemoryError),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OutOfMemoryError),
        ("shapes do not match", RuntimeError),
    ],
)
def test_a_fault_of_the_device_is_told_from_other_errors(message, expected):
    with pytest.raises(RuntimeError if expected is RuntimeError else expected) as raised, errors.device_faults_named():
        raise RuntimeError(message)

    assert type(raised.value) is expected


def test_errors_survive_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(StorageError("503", transient=True)))

    assert error.transient
    assert str(error) == "503"
