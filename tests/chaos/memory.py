"""How the memory of a long run's processes goes, once they have warmed up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import psutil

MIB = 2**20
FLAT = 0.02  # of what it was after the warm-up
MIN_SAMPLES = 10


@dataclass(frozen=True)
class Sample:
    """What a process had when so many clips of the run were done."""

    num_done: int
    mib: float


@dataclass(frozen=True)
class Growth:
    """Of one process, from after its warm-up to its end; medians of the first and the last tenth of that time."""

    role: str
    start_mib: float
    end_mib: float
    num_clips: int

    @property
    def share(self) -> float:
        return self.end_mib / self.start_mib - 1

    @property
    def is_flat(self) -> bool:
        return self.share <= FLAT

    def __str__(self) -> str:
        per_clip = 1024 * (self.end_mib - self.start_mib) / max(1, self.num_clips)
        return (
            f"{self.start_mib:.1f} → {self.end_mib:.1f} MiB over {self.num_clips} clips, "
            f"{100 * self.share:+.1f} %, {per_clip:+.1f} KiB a clip"
        )


@dataclass
class MemoryLog:
    """Samples of every process, by what it is to the run.

    Attributes:
        warm_up_clips: So many clips have to be done after a process was first seen before it counts.
    """

    warm_up_clips: int
    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def note(self, role: str, pid: int, num_done: int) -> None:
        try:
            size = psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            return
        if size:  # none of a process that has just ended
            self.samples[role, pid].append(Sample(num_done, size / MIB))

    def growths(self) -> Iterator[Growth]:
        """Of each role's process that was there for most clips; of none that did not live long enough to be judged."""
        longest: dict[str, Growth] = {}
        for (role, _), samples in self.samples.items():
            growth = self._growth(role, samples)
            if growth and (role not in longest or growth.num_clips > longest[role].num_clips):
                longest[role] = growth
        yield from longest.values()

    def _growth(self, role: str, samples: list[Sample]) -> Growth | None:
        warm = [sample for sample in samples if sample.num_done >= samples[0].num_done + self.warm_up_clips]
        if len(warm) < MIN_SAMPLES:
            return None
        tenth = len(warm) // 10
        start, end = (median(sample.mib for sample in part) for part in (warm[:tenth], warm[-tenth:]))
        return Growth(role, start, end, warm[-1].num_done - warm[0].num_done)


def worker_processes(supervisor_pid: int) -> list[int]:
    """The processes with a model below a `scail worker`."""
    try:
        below = psutil.Process(supervisor_pid).children(recursive=True)
        return [process.pid for process in below if "spawn_main" in " ".join(process.cmdline())]
    except psutil.NoSuchProcess:
        return []
