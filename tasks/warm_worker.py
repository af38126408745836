"""A warm worker's clips, one after another, and how much of the time its GPU has work.

The stages are those of `tasks.render`, with its turns: while one clip computes, the next one's files are decoded and
prepared, and the one before it is encoded. What is left out is storage, of which a benchmark has none.

`Fleet` has a worker process for each GPU, which sees no other, to say how many clips several make in the time of one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from tasks.cluster import visible_gpus
from tasks.resident import check_visible_gpus
from tasks.turns import Turn

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from scail import SamplingParams, ScailPipeline
    from scail.bench_goals import Workload
    from scail.config import RuntimeConfig

WORKER_THREADS = 2  # as a worker has them


@dataclass(frozen=True)
class BusyTimes:
    """Seconds on the clock, each clip's on the GPU as (begin, end), in the order in which they came."""

    spans: tuple[tuple[float, float], ...]

    @property
    def seconds_per_clip(self) -> float:
        """From the end of one clip's work on the GPU to the next one's, the mean of all but the first."""
        ends = [end for _, end in self.spans]
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    @property
    def clips_per_hour(self) -> float:
        return 3600 / self.seconds_per_clip

    @property
    def busy_share(self) -> float:
        """Of the time between the first clip's end and the last one's, that in which a clip was on the GPU."""
        ends = [end for _, end in self.spans]
        return sum(end - begin for begin, end in self.spans[1:]) / (ends[-1] - ends[0])


def render_clips(
    pipeline: ScailPipeline, clips: Sequence[tuple[Path, Path]], folder: Path, params: SamplingParams
) -> BusyTimes:
    """Render clips as a warm worker does, at least two, and say when the GPU had work.

    Args:
        pipeline: That stays in the process.
        clips: Reference image and pose video of each.
        folder: Where the videos go.
        params: Of every clip.
    """
    from scail.preprocess import clip_pixels
    from scail.streamed_video import StreamedVideo
    from scail.video import read_image, read_video

    spans: list[tuple[float, float]] = []

    def render(number: int) -> None:
        reference, pose = clips[number]
        with StreamedVideo(folder / f"{number}.mp4", fps=24.0, metadata={"clip": number}) as video:
            with Turn() as turn:
                picture, frames = read_image(reference), read_video(pose)
                pixels = clip_pixels(picture, frames, frames.shape[1:3])
                turn.compute()
                begin = time.perf_counter()
                pipeline.render(pixels, f"clip {number}", params=params, on_frames=video.write)
                spans.append((begin, time.perf_counter()))
            video.finish()

    with ThreadPoolExecutor(WORKER_THREADS) as pool:
        for done in [pool.submit(render, number) for number in range(len(clips))]:
            done.result()
    return BusyTimes(tuple(spans))


def write_clips(folder: Path, *, num_clips: int, num_frames: int, height: int, width: int) -> list[tuple[Path, Path]]:
    """References and pose videos of walking figures, no two alike, of the clips' size."""
    import numpy as np
    from PIL import Image

    from scail.mini.motion import joints_of_motion
    from scail.pose.render import render_pose
    from scail.pose.skeleton import PoseSequence
    from scail.video import encode_video

    clips = []
    for number in range(num_clips):
        rng = np.random.default_rng(number)
        reference, pose = folder / f"reference{number}.png", folder / f"pose{number}.mp4"
        coarse = rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(reference)
        joints = joints_of_motion("walk", num_frames, cycles=1.0 + number / 8, centre=(0.0, 0.0, 2600.0))
        encode_video(pose, render_pose(PoseSequence(joints[:, None], height, width)), fps=24.0, metadata={})
        clips.append((reference, pose))
    return clips


@dataclass(frozen=True)
class WorkerPlan:
    """What each process of a fleet renders, on a GPU of its own or all of them on the CPU."""

    work: Workload
    runtime: RuntimeConfig
    params: SamplingParams
    num_clips: int


class Fleet:
    """Warm workers, a process each; use it in a `with`."""

    def __init__(self, plan: WorkerPlan, num_workers: int) -> None:
        """Start them; they load a model and render a first clip side by side."""
        context = get_context("spawn")
        self._connections, self.processes = [], []
        for gpu in (visible_gpus() or list(map(str, range(num_workers))))[:num_workers]:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(plan, theirs), daemon=True)
            with _visible(gpu):
                process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    def render(self, workers: Iterable[int]) -> list[BusyTimes]:
        """All clips once by each of the given workers at the same time, while the others wait.

        Raises:
            RuntimeError: If a worker has died.
        """
        asked = [self._connections[number] for number in workers]
        try:
            for connection in asked:
                connection.send("render")
            return [connection.recv() for connection in asked]
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("a worker of the benchmark has died; its own message is above") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_failure: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=60)
            process.kill()
            process.join()


@contextmanager
def _visible(gpu: str) -> Iterator[None]:
    """Inside, a process that is started sees one GPU from its first line on: its arguments bring torch with them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _serve(plan: WorkerPlan, connection: Connection) -> None:
    """A process of a fleet: renders its clips as often as it is asked to."""
    from scail.bench import random_pipeline

    work = plan.work
    if work.device.type == "cuda":
        check_visible_gpus()
    pipeline = random_pipeline(work.config, device=work.device, dtype=work.dtype, runtime=plan.runtime)
    with TemporaryDirectory() as name:
        folder = Path(name)
        clips = write_clips(
            folder, num_clips=plan.num_clips + 1, num_frames=work.num_frames, height=work.height, width=work.width
        )
        render_clips(pipeline, clips[:2], folder, plan.params)
        try:
            while connection.recv():
                connection.send(render_clips(pipeline, clips, folder, plan.params))
        except EOFError:  # whoever asks has enough
            return
