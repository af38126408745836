"""Seconds by stage, taken once, with the device synchronised."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

logger = logging.getLogger(__name__)

GIB = 1024**3


@dataclass
class StageClock:
    """Collects the time of each stage of one clip, and the most memory that was held.

    Attributes:
        device: Its queue is empty when a stage begins and when it ends.
        seconds: Time by stage, in the order in which the stages ran; a stage that ran twice has the sum.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        taken = self._now() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        logger.info("%s: %.2f s", name, taken)

    def peak_memory_gib(self) -> float:
        """On a GPU the most that was allocated since the clock was made; on a CPU the process's peak resident size."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
