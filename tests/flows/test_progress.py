"""What a terminal shows of a run."""

from __future__ import annotations

import gc
import io

from rich.console import Console
from rich.progress_bar import ProgressBar

from flows.progress import progress_bars
from tasks.progress import progress_sink


def drawn_after(num_clips: int) -> tuple[str, int]:
    """The text of clips that render two at a time, and how many bars are left in memory at the end."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, highlight=False, width=100)
    with progress_bars(console):
        show = progress_sink.get()
        for first in range(0, num_clips, 2):
            pair = [f"clip-{number}" for number in (first, first + 1)]
            for clip in pair:
                show(clip, "denoise", 1, 4)
            for clip in pair:
                show(clip, "rendered", 0, 0)
        gc.collect()
        num_bars = sum(type(thing) is ProgressBar for thing in gc.get_objects())
    return screen.getvalue(), num_bars


def test_every_clip_that_ended_has_its_line_and_its_bar_is_the_next_clips():
    text, num_bars = drawn_after(40)

    assert all(f"rendered  clip-{number}" in text for number in range(40))
    assert num_bars < 10


def test_a_clip_that_was_rendered_elsewhere_has_a_line_and_no_bar():
    screen = io.StringIO()
    with progress_bars(Console(file=screen, force_terminal=True, highlight=False, width=100)):
        progress_sink.get()("clip-1", "failed", 0, 0)

    assert screen.getvalue().count("clip-1") == 1
