"""Where a render says how far it is: a bar on the terminal of the process that renders, otherwise the log."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Protocol

logger = logging.getLogger(__name__)


class ProgressSink(Protocol):
    def __call__(self, clip_id: str, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage` are behind this clip; a stage without units has a total of 0.

        The last stage of a clip is its status.
        """


def log_progress(clip_id: str, stage: str, done: int, total: int) -> None:
    """About ten lines for a clip's denoising, one for every other stage."""
    if done == total or done % max(1, total // 10) == 0:
        logger.info("%s: %s %s", clip_id, stage, f"{done}/{total}" if total else "")


progress_sink: ContextVar[ProgressSink] = ContextVar("progress_sink", default=log_progress)
