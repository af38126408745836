"""What the state of a flow run asks of the process that runs it."""

from __future__ import annotations

import time

import pytest
from prefect import states
from prefect.exceptions import Abort

from tasks.control import Control, Wish, controlled, pause, wish_of
from tasks.errors import RefusedError, RunCancelledError

RUN = "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (states.Running(), Wish.RENDER),
        (states.Paused(), Wish.PAUSE),
        (states.Suspended(), Wish.PAUSE),
        (states.Cancelling(), Wish.STOP),
        (states.Cancelled(), Wish.STOP),
        (states.Crashed(), Wish.STOP),
        (states.Scheduled(), Wish.LEAVE),
        (states.AwaitingRetry(), Wish.LEAVE),
        (states.Pending(), Wish.LEAVE),
        (None, Wish.RENDER),
    ],
)
def test_a_state_is_a_wish(state, expected):
    assert wish_of(state, earlier=Wish.RENDER) is expected


def test_a_paused_run_that_is_running_again_renders_and_one_that_was_stopped_never_does():
    assert wish_of(states.Running(), earlier=Wish.PAUSE) is Wish.RENDER
    assert wish_of(states.Running(), earlier=Wish.STOP) is Wish.STOP
    assert wish_of(states.Paused(), earlier=Wish.LEAVE) is Wish.LEAVE


class Server:
    """Answers with one state after the other; an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def read_flow_run(self, _flow_run_id):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return type("FlowRun", (), {"state": answer, "state_name": answer.name})


def test_a_run_gets_slots_by_what_is_asked_of_it():
    control = Control(RUN)
    slots = control.obeying(lambda: 3)
    server = Server(states.Running(), states.Paused(), states.Running(), states.Cancelling())

    seen = []
    for _ in range(3):
        control.look(server)
        seen.append(slots())
    control.look(server)

    assert seen == [3, 0, 3]
    with pytest.raises(RunCancelledError):
        slots()


def test_a_run_that_another_process_has_is_left_without_a_last_state():
    control = Control(RUN)
    control.look(Server(states.Pending()))

    with pytest.raises(Abort):
        control.obeying(lambda: 3)()


def test_a_server_that_does_not_answer_changes_nothing(monkeypatch):
    server = Server(ConnectionError("gone"), states.Paused())
    monkeypatch.setattr("tasks.control.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: _Opened(server))

    with controlled(RUN) as control:
        slots = control.obeying(lambda: 3)
        deadline = time.monotonic() + 10
        while slots() and time.monotonic() < deadline:
            time.sleep(0.01)
        paused = slots() == 0

    assert paused


class _Opened:
    def __init__(self, server):
        self.server = server

    def __enter__(self):
        return self.server

    def __exit__(self, *_):
        return None


def test_without_a_server_there_is_nobody_to_ask(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(RefusedError, match="PREFECT_API_URL"):
        pause("spring.csv")
