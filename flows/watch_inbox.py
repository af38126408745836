"""The inbox's flow: looks once, and renders the next manifest that is whole, good and nobody else's.

Meant to be started every minute, and whenever an event tells of an upload. A look takes seconds; one that finds a
manifest is that run's coordinator until it ends, and the looks that start meanwhile find the next manifest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.render_manifest import render_manifest
from tasks import cluster
from tasks.control import was_cancelled
from tasks.errors import RefusedError
from tasks.form import DEFAULT_OPTIONS, RenderOptions
from tasks.inbox import Fate, Taken, take_next
from tasks.pending import output_below
from tasks.plan import holding
from tasks.results import summary_in
from tasks.settings import Settings

logger = logging.getLogger(__name__)

CANCELLED = "The run was cancelled. To have the rest rendered, upload the manifest again.\n"


@flow(name="watch-inbox", flow_run_name="{inbox}", validate_parameters=True)
def watch_inbox(inbox: str, output: str, options: RenderOptions = DEFAULT_OPTIONS) -> State[Any]:
    """Look into the inbox once; render the next manifest, if there is one.

    Args:
        inbox: The folder into which manifests are uploaded, such as `gs://studio/inbox`; `done` and `refused` appear
            beside it.
        output: The folder for clips and results, such as `gs://studio/renders`: `spring.csv` goes to its folder
            `spring`. What is there already is skipped.
        options: Everything has a sensible default; each manifest is rendered in this way.

    Returns:
        The state of the manifest's run; a completed one if there was nothing to do.

    Raises:
        RefusedError: If the options are not for an inbox.
    """
    state, refused = render_next(inbox, output, options)
    return state or Completed(message=f"nothing to render{refused_line(refused)}")


def render_next(
    inbox: str, output: str, options: RenderOptions, *, workers: cluster.Workers | None = None
) -> tuple[State[Any] | None, tuple[str, ...]]:
    """Take the next manifest, render it, and move it to where it belongs.

    Args:
        inbox, output, options: As above.
        workers: Where clips are rendered; where the settings say if absent.

    Returns:
        The state in which its run ended, None if there was none to take; and the names of manifests refused before.
    """
    if options.dry_run or options.only_status:
        raise RefusedError("an inbox renders whole manifests: a dry run and rows of one status are not for it")
    settings = Settings()
    workers = workers or cluster.parse_workers(settings.workers)
    runner = cluster.task_runner(workers, options.checkpoint or settings.checkpoint)
    with take_next(inbox, settings=settings) as look:
        if (taken := look.taken) is None:
            return None, look.refused
        render = render_manifest.with_options(task_runner=runner)
        with holding(taken.upload.uri, taken.data), refused_if_cancelled(taken):
            place = output_below(taken.upload.uri, inbox, output)
            state = render(taken.upload.uri, place, options, return_state=True)
        settle(taken, state)
        return state, look.refused


@contextmanager
def refused_if_cancelled(taken: Taken) -> Iterator[None]:
    """Whoever cancels the inbox's run means this manifest: the next look must not begin it again."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and was_cancelled():
            taken.settle(Fate.REFUSED, CANCELLED)
        raise


def watch_until(
    inbox: str,
    output: str,
    options: RenderOptions,
    *,
    workers: cluster.Workers,
    every_seconds: float | None,
    say: Callable[[str], None],
) -> bool:
    """Look into the inbox again and again, for people without a server.

    Args:
        inbox, output, options, workers: As above.
        every_seconds: Between two looks; None to end when there is nothing to render.
        say: Takes a line for each manifest.

    Returns:
        Whether no manifest was refused, and every row of the others was rendered or skipped.
    """
    all_ok = True
    while True:
        state, refused = render_next(inbox, output, options, workers=workers)
        if refused:
            say(refused_line(refused).removeprefix("; "))
        if state is not None:
            say(str(state.message))
        all_ok = all_ok and not refused and (state is None or state.is_completed())
        if state is None and every_seconds is None:
            return all_ok
        if state is None and every_seconds is not None:
            time.sleep(every_seconds)


def refused_line(names: Sequence[str]) -> str:
    return f"; refused: {', '.join(names)}" if names else ""


def settle(taken: Taken, state: State[Any]) -> None:
    """What becomes of an upload by the state in which its run ended."""
    result = None if state.is_cancelled() else state.result(raise_on_failure=False)
    if state.is_cancelled():
        taken.settle(Fate.REFUSED, CANCELLED)
    elif summary_in(result) is not None:
        taken.settle(Fate.DONE, f"{state.message}\n")
    else:
        logger.error("%s stays in the inbox: %s", taken.upload.uri, result)
        taken.fail(str(result))
