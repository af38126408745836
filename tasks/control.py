"""What people ask of a run while it goes on: to pause, to go on, to stop. The state of its flow run says it.

Whoever clicks in Prefect's UI, or calls its API, sets that state; a worker of Prefect's acts on some of them, for
flows that it started. Here the flow itself looks, so that every run obeys, whoever started it:

Paused, Suspended        no clip is begun; those under way are finished
Running                  clips are begun again
Cancelling, a final one  clips stop at their next step
Scheduled, Pending       a worker of Prefect's starts the run anew: this process leaves it and its clips to that one
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING
from uuid import UUID

from tasks.errors import RefusedError, RunCancelledError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


class Wish(StrEnum):
    """What is asked of a run."""

    RENDER = "render"
    PAUSE = "pause"
    STOP = "stop"
    LEAVE = "leave"  # to the process that has taken it over


class Control:
    """The latest wish, from looks at a flow run's state every two seconds."""

    def __init__(self, flow_run_id: UUID) -> None:
        self._flow_run_id = flow_run_id
        self._wish = Wish.RENDER
        self._ended = threading.Event()

    def obeying(self, num_slots: Callable[[], int]) -> Callable[[], int]:
        """`num_slots`, which gives none while the run is paused, and raises when it is over.

        Raises (the returned function):
            RunCancelledError: If the run was cancelled.
            prefect.exceptions.Abort: If another process has taken the run over.
        """

        def slots() -> int:
            if self._wish is Wish.STOP:
                raise RunCancelledError("the run was cancelled")
            if self._wish is Wish.LEAVE:
                from prefect.exceptions import Abort

                raise Abort("another process goes on with this run")
            return 0 if self._wish is Wish.PAUSE else num_slots()

        return slots

    def look(self, client: SyncPrefectClient) -> None:
        """Ask for the state once."""
        flow_run = client.read_flow_run(self._flow_run_id)
        wish = wish_of(flow_run.state, earlier=self._wish)
        if wish is not self._wish:
            logger.info("asked to %s: the run is %s", wish, flow_run.state_name)
        self._wish = wish

    def look_until_ended(self) -> None:
        """The loop of the thread: a server that does not answer changes nothing."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            while not self._ended.wait(LOOK_SECONDS):
                try:
                    self.look(client)
                except Exception as error:  # noqa: BLE001  whatever it is, the clips under way must not suffer
                    logger.debug("the run's state is not known: %s", error)

    def end(self) -> None:
        self._ended.set()


def wish_of(state: State | None, *, earlier: Wish) -> Wish:
    """What a state that others have set asks of the process that runs the flow."""
    if state is None or earlier in {Wish.STOP, Wish.LEAVE}:
        return earlier
    if state.is_cancelling() or state.is_final():
        return Wish.STOP
    if state.is_scheduled() or state.is_pending():
        return Wish.LEAVE
    return Wish.PAUSE if state.is_paused() else Wish.RENDER


@contextmanager
def controlled(flow_run_id: str) -> Iterator[Control]:
    """While open, what is asked of the flow run is known."""
    control = Control(UUID(flow_run_id))
    run = contextvars.copy_context().run  # with it goes the address of a server that only this process has
    thread = threading.Thread(target=run, args=(control.look_until_ended,), name="control", daemon=True)
    thread.start()
    try:
        yield control
    finally:
        control.end()


def was_cancelled() -> bool:
    """Whether the running flow, which a signal ends, was cancelled, and not just its process told to end."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    if not flow_run.id:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run.id)).state
    except Exception as error:  # noqa: BLE001  a server that does not answer cancelled nothing
        logger.info("the run's state is not known: %s", error)
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def start_id() -> str:
    """Tells this start of the running flow run from the others that it has if it is restarted.

    A clip that an earlier start left on a worker is then waited for and not taken away, and the mark that stopped an
    earlier start stops no later one.
    """
    from prefect.runtime import flow_run

    return f"{flow_run.id}.{flow_run.run_count}" if flow_run.run_count else str(flow_run.id)


def pause(run: str) -> str:
    """Have a run begin no more clips. Returns its name.

    Raises:
        RefusedError: If there is no such run, or it is not under way, or no server is configured.
    """
    from prefect.states import Paused

    return _set_state(run, Paused(message="paused by `scail pause`"), expected=("RUNNING",))


def resume(run: str) -> str:
    """Have a paused run go on."""
    from prefect.states import Running

    # Forced: one that the UI suspended, and that no deployment started, Prefect would not let go on.
    return _set_state(run, Running(message="resumed by `scail resume`"), expected=("PAUSED",), force=True)


def cancel(run: str) -> str:
    """Have a run stop its clips at their next step."""
    from prefect.states import Cancelling

    not_over = ("RUNNING", "PAUSED", "SCHEDULED", "PENDING")
    return _set_state(run, Cancelling(message="cancelled by `scail cancel`"), expected=not_over)


def _set_state(run: str, state: State, *, expected: tuple[str, ...], force: bool = False) -> str:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise RefusedError("runs are found by their Prefect server: set PREFECT_API_URL; without one there is Ctrl-C")
    with get_client(sync_client=True) as client:
        flow_run = _find(client, run)
        if flow_run.state is None or flow_run.state.type.value not in expected:
            raise RefusedError(f"{flow_run.name} is {flow_run.state_name}; expected {' or '.join(expected).lower()}")
        client.set_flow_run_state(flow_run.id, state, force=force)
    return flow_run.name


def _find(client: SyncPrefectClient, run: str) -> FlowRun:
    """The flow run of this id, or the newest of this name."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    try:
        filters = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run)]))
    except ValueError:
        filters = FlowRunFilter(name=FlowRunFilterName(any_=[run]))
    found = client.read_flow_runs(flow_run_filter=filters, sort=FlowRunSort.START_TIME_DESC, limit=1)
    if not found:
        raise RefusedError(f"the server knows no run {run!r}; expected a flow run's id or name")
    return found[0]
