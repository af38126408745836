"""Progress on a terminal: a bar for each clip under way, one tick per denoising step; a line for each that ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tasks.jobs import ClipStatus
from tasks.progress import progress_sink

STATUSES = frozenset(ClipStatus)


@contextmanager
def progress_bars(console: Console) -> Iterator[None]:
    """While open, what is rendered in this process shows its progress on `console`."""
    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]:<14}"),
        TimeElapsedColumn(),
        console=console,
    )
    by_clip: dict[str, TaskID] = {}

    free: list[TaskID] = []  # bars of clips that ended; the columns keep what they drew for each bar that ever was

    def show(clip_id: str, stage: str, done: int, total: int) -> None:
        if stage in STATUSES:
            if clip_id in by_clip:
                free.append(by_clip.pop(clip_id))
                bars.update(free[-1], visible=False)
            console.print(f"{stage:<9} {clip_id}", markup=False)
            return
        if clip_id not in by_clip:
            bar = free.pop() if free else bars.add_task(clip_id, total=None, stage=stage)
            bars.reset(bar, total=None, visible=True, description=clip_id, stage=stage)
            by_clip[clip_id] = bar
        bars.update(by_clip[clip_id], stage=stage)
        if total:
            bars.update(by_clip[clip_id], completed=done, total=total)

    token = progress_sink.set(show)
    try:
        with bars:
            yield
    finally:
        progress_sink.reset(token)
