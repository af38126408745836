"""Where clips go: the window of live futures, their order, and the kinds of workers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from scail.config import SamplingParams
from tasks import cluster, window
from tasks.cluster import Workers, parse_workers
from tasks.errors import ClusterLostError, DeviceFaultError, RefusedError
from tasks.jobs import ClipJob, ClipRequest, ClipResult, ClipStatus
from tasks.window import run_window


def job(number: int, **request) -> ClipJob:
    row = {"row": number, "clip_id": f"clip-{number}", "reference": "r.png", "pose": "p.mp4"} | request
    return ClipJob(
        request=ClipRequest(**row), key=f"{number:032x}", params=SamplingParams(), checkpoint_fingerprint="model"
    )


def rendered(of: ClipJob) -> ClipResult:
    return ClipResult(row=of.request.row, clip_id=of.clip_id, status=ClipStatus.RENDERED)


@dataclasses.dataclass(eq=False)
class FakeFuture:
    """Is done when it is asked the second time, and then answers or raises."""

    answer: object
    asked: int = 0

    @property
    def wrapped_future(self) -> FakeFuture:
        return self

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def result(self) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class FakeWorkers:
    """Answers each clip by its next prepared answer, else with its result."""

    def __init__(self, answers: dict[str, list[object]] | None = None) -> None:
        self.answers = answers or {}
        self.submitted: list[str] = []
        self.futures: list[FakeFuture] = []
        self.most_live = 0

    def submit(self, of: ClipJob) -> FakeFuture:
        self.submitted.append(of.clip_id)
        prepared = self.answers.get(of.clip_id)
        self.futures.append(FakeFuture(prepared.pop(0) if prepared else rendered(of)))
        self.most_live = max(self.most_live, sum(future.asked < 2 for future in self.futures))
        return self.futures[-1]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(window, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(window, "POLL_SECONDS", 0.0)


def outcomes(workers: FakeWorkers, num_jobs: int, num_slots: int = 2) -> dict[str, object]:
    results = run_window([job(number) for number in range(num_jobs)], workers.submit, lambda: num_slots)
    return {of.clip_id: outcome for of, outcome in results}


def test_no_more_clips_are_submitted_than_the_workers_take():
    workers = FakeWorkers()

    results = outcomes(workers, num_jobs=9, num_slots=3)

    assert len(results) == len(workers.submitted) == 9
    assert workers.most_live == 3


def test_a_clip_whose_worker_is_lost_is_submitted_again():
    from distributed import KilledWorker

    workers = FakeWorkers(
        {"clip-1": [KilledWorker("clip-1", SimpleNamespace(address="tcp://127.0.0.1:1"), 50), DeviceFaultError("gone")]}
    )

    results = outcomes(workers, num_jobs=3)

    assert workers.submitted.count("clip-1") == 3
    assert {result.status for result in results.values()} == {ClipStatus.RENDERED}


def test_a_clip_that_another_run_renders_is_asked_for_after_the_others():
    workers = FakeWorkers({"clip-0": [None, None]})

    results = outcomes(workers, num_jobs=3, num_slots=1)

    assert workers.submitted == ["clip-0", "clip-1", "clip-2", "clip-0", "clip-0"]
    assert isinstance(results["clip-0"], ClipResult)


def test_any_other_error_is_the_clips_outcome_at_once():
    workers = FakeWorkers({"clip-0": [ValueError("a bug")]})

    results = outcomes(workers, num_jobs=2)

    assert workers.submitted.count("clip-0") == 1
    assert isinstance(results["clip-0"], ValueError)
    assert isinstance(results["clip-1"], ClipResult)


def test_a_clip_that_loses_every_worker_ends_as_a_failure():
    workers = FakeWorkers({"clip-0": [DeviceFaultError("gone")] * 100})

    results = outcomes(workers, num_jobs=1)

    assert isinstance(results["clip-0"], DeviceFaultError)
    assert len(workers.submitted) == 1 + window.MAX_RESUBMISSIONS


def test_when_the_scheduler_stays_away_every_clip_that_is_left_has_an_outcome():
    answers = iter([2, 2])

    def num_slots() -> int:
        try:
            return next(answers)
        except StopIteration:
            raise ClusterLostError("gone") from None

    workers = FakeWorkers()
    results = dict(
        (of.clip_id, outcome)
        for of, outcome in run_window([job(number) for number in range(5)], workers.submit, num_slots)
    )

    assert len(results) == 5
    assert sum(isinstance(outcome, ClusterLostError) for outcome in results.values()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local", Workers()),
        ("3", Workers(num_processes=3)),
        ("tcp://gpu-1:8786", Workers(address="tcp://gpu-1:8786")),
    ],
)
def test_workers_are_of_three_kinds(text, expected):
    assert parse_workers(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "gpu-1:8786", "tcp://gpu-1", "http://gpu-1:80", "1.5"])
def test_any_other_workers_are_refused(text):
    with pytest.raises(RefusedError, match="expected `local`"):
        parse_workers(text)


@pytest.mark.parametrize(("visible", "expected"), [("0,2", ["0", "2"]), ("", []), ("-1", []), ("GPU-ab", ["GPU-ab"])])
def test_the_visible_gpus_are_those_that_cuda_would_use(visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert cluster.visible_gpus() == expected


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    with pytest.raises(RefusedError, match="this machine has 2 GPUs"), cluster.local_cluster(3, "checkpoint"):
        pass
