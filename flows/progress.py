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

    def show(clip_id: str, stage: str, done: int, total: int) -> None:
        if clip_id not in by_clip:
            by_clip[clip_id] = bars.add_task(clip_id, total=None, stage=stage)
        bars.update(by_clip[clip_id], stage=stage)
        if total:
            bars.update(by_clip[clip_id], completed=done, total=total)
        if stage in STATUSES:
            bars.remove_task(by_clip.pop(clip_id))
            console.print(f"{stage:<9} {clip_id}", markup=False)

    token = progress_sink.set(show)
    try:
        with bars:
            yield
    finally:
        progress_sink.reset(token)
