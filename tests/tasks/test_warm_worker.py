from __future__ import annotations

import os

import pytest
import torch

from scail.bench import random_pipeline
from scail.bench_goals import Workload
from scail.config import EXACT, SCAIL_TINY, SamplingParams
from scail.video import probe_video
from tasks.warm_worker import BusyTimes, Fleet, WorkerPlan, render_clips, write_clips


def test_the_gpu_is_idle_between_the_clips():
    times = BusyTimes(((0.0, 2.0), (2.5, 4.0), (4.0, 6.0)))

    assert times.seconds_per_clip == 2.0
    assert times.busy_share == pytest.approx(3.5 / 4)


def test_clips_are_rendered_one_after_another_each_into_its_video(tmp_path):
    pipeline = random_pipeline(SCAIL_TINY, device=torch.device("cpu"), dtype=torch.float32)
    clips = write_clips(tmp_path, num_clips=3, num_frames=5, height=64, width=96)

    times = render_clips(pipeline, clips, tmp_path, SamplingParams(num_inference_steps=1, guidance_scale=1.0))

    assert len({reference.read_bytes() for reference, _ in clips}) == 3
    infos = [probe_video(tmp_path / f"{number}.mp4") for number in range(3)]
    assert {(info.num_frames, info.width, info.height) for info in infos} == {(5, 96, 64)}
    assert all(earlier[1] <= later[0] for earlier, later in zip(times.spans, times.spans[1:], strict=False))
    assert 0 < times.busy_share <= 1


def test_a_fleet_renders_in_processes_of_its_own_and_says_when_one_has_died():
    work = Workload(SCAIL_TINY, torch.device("cpu"), torch.float32, 5, 64, 96, compiled=False)
    plan = WorkerPlan(work, EXACT, SamplingParams(num_inference_steps=1, guidance_scale=1.0), num_clips=2)

    with Fleet(plan, 2) as fleet:
        [alone] = fleet.render([0])
        together = fleet.render([0, 1])
        fleet.processes[1].kill()
        with pytest.raises(RuntimeError, match="has died"):
            fleet.render([1])

    assert all(len(times.spans) == 3 and times.clips_per_hour > 0 for times in (alone, *together))
    assert not any(process.is_alive() for process in fleet.processes)


class Witness:
    """Stands for a plan; says what its process saw when its arguments came."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ = state
        (self.folder / str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))


def test_a_process_sees_one_gpu_before_its_arguments_bring_torch(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,GPU-9")

    with Fleet(Witness(tmp_path), 2) as fleet:
        for process in fleet.processes:
            process.join(60)  # a witness has nothing to render

    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["GPU-7", "GPU-9"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-7,GPU-9"
    assert "'Witness' object has no attribute 'work'" in capfd.readouterr().err
