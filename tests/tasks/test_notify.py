import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks import notify, storage
from tasks.jobs import ClipJob, ClipRequest, ClipResult, ClipStatus
from tasks.notify import Notifications, StatusFile, open_notifications
from tasks.plan import Plan
from tasks.results import summarise
from tasks.run_status import RunState, RunStatus
from tasks.settings import Settings
from tasks.webhook import Webhook, signature
from tests.tasks.test_results import failed, rendered, run_of

SECRET = "correct horse"


class Receiver:
    """A webhook's other end on this machine; it answers with the given codes in turn, the last one for ever."""

    def __init__(self, codes, headers, seconds):
        self.requests = []
        self._codes = chain(codes, repeat(codes[-1]))
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((dict(self.headers), body))
                time.sleep(seconds)
                self.send_response(receiver.code_for(self.headers, body))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):
                receiver.requests.append((dict(self.headers), b"GET"))

            def log_message(self, *_args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=hidden"

    def code_for(self, headers, body):
        timestamp = headers.get("X-Scail-Timestamp", "")
        if not hmac.compare_digest(headers.get("X-Scail-Signature", ""), signature(SECRET, timestamp, body)):
            return 401
        return next(self._codes)

    @property
    def events(self):
        return [json.loads(body) for _, body in self.requests]


@contextmanager
def receiving(*codes, headers=None, seconds=0.0) -> Iterator[Receiver]:
    receiver = Receiver(codes or (204,), headers or {}, seconds)
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()


def plan_of(num_jobs, settled=()):
    requests = [
        ClipRequest(row=row, clip_id=f"c{row}", reference="r.png", pose="p.mp4") for row in range(2, 2 + num_jobs)
    ]
    jobs = [
        ClipJob(request=request, key=f"k{request.row}", params={}, checkpoint_fingerprint="f") for request in requests
    ]
    return Plan(tuple(jobs), {}, tuple(settled))


def hook(url, secret=SECRET, **changes):
    return Webhook(url, secret, **{"first_pause_seconds": 0.01, "timeouts_seconds": (1.0, 1.0)} | changes)


def notifications(*notifiers, output="gs://studio/out", flush_seconds=5.0):
    return Notifications(
        notifiers, run_id="run-1", manifest_uri="gs://studio/m.csv", output_uri=output, flush_seconds=flush_seconds
    )


def render(told, results=(), summary=None):
    with told:
        told.started(plan_of(len(results)))
        for result in results:
            told.clip(result)
        if summary:
            told.finished(summary)


def status_of(path):
    return RunStatus.model_validate_json(Path(path).read_bytes())


def test_a_run_is_told_as_cloud_events_that_are_signed_and_in_order():
    results = [rendered(2, "a"), failed(3, "b")]

    with receiving() as receiver:
        render(notifications(hook(receiver.url)), results, summarise(results, run_of()))

    started, first, second, finished = receiver.events
    assert [event["type"] for event in receiver.events] == [
        "scail.run.started",
        "scail.clip.finished",
        "scail.clip.finished",
        "scail.run.finished",
    ]
    assert {event["specversion"] for event in receiver.events} == {"1.0"}
    assert {event["source"] for event in receiver.events} == {"gs://studio/out/runs/run-1"}
    assert len({event["id"] for event in receiver.events}) == 4
    assert started["data"]["status"]["num_rows"] == 2
    assert (first["subject"], first["data"]["clip"]["status"]) == ("a", "rendered")
    assert first["data"]["clip"]["video"] == "gs://studio/out/clips/a/video.mp4"
    assert second["data"]["clip"]["message"] == "the pose has 3 frames"
    assert finished["data"]["status"]["state"] == "failed"
    assert finished["data"]["summary"]["counts"]["rendered"] == 1
    assert receiver.requests[0][0]["Content-Type"].startswith("application/cloudevents+json")


def test_the_signature_is_of_the_time_stamp_and_the_body():
    assert signature("key", "1700000000", b'{"a":1}') == (
        "sha256=" + hmac.new(b"key", b'1700000000.{"a":1}', "sha256").hexdigest()
    )


def test_what_may_recover_is_repeated_with_the_same_event_id():
    with receiving(503, 429, 408, 204) as receiver:
        told = notifications(hook(receiver.url))
        with told:
            told.started(plan_of(0))
            told.finished(summarise([], run_of()))

    assert [event["type"].rpartition(".")[2] for event in receiver.events] == ["started"] * 4 + ["finished"]
    assert len({event["id"] for event in receiver.events[:4]}) == 1


def test_a_receiver_that_asks_for_time_gets_it():
    with receiving(429, 204, headers={"Retry-After": "1"}) as receiver:
        start = time.monotonic()
        render(notifications(hook(receiver.url)), (), summarise([], run_of()))

    assert time.monotonic() - start > 1.0
    assert len(receiver.requests) == 3


@pytest.mark.parametrize(
    ("code", "secret", "answered"), [(204, "wrong", 401), (400, SECRET, 400), (410, SECRET, 410), (302, SECRET, 302)]
)
def test_what_cannot_recover_is_tried_once_and_no_redirect_is_followed(code, secret, answered, caplog):
    with receiving(code, headers={"Location": "/elsewhere"}) as receiver:
        render(notifications(hook(receiver.url, secret)), (), summarise([], run_of()))

    assert len(receiver.requests) == 2  # one for each event
    assert b"GET" not in [body for _, body in receiver.requests]
    assert f"answered {answered}" in caplog.text
    assert "hidden" not in caplog.text
    assert SECRET not in caplog.text


def test_without_a_secret_nothing_is_signed():
    with receiving() as receiver:
        render(notifications(hook(receiver.url, None)), (), summarise([], run_of()))

    assert all("X-Scail-Signature" not in headers for headers, _ in receiver.requests)


def test_a_receiver_that_refuses_connections_costs_the_run_nothing(caplog):
    with receiving() as receiver:
        url = receiver.url
    results = [rendered(row, f"c{row}") for row in range(2, 12)]

    start = time.monotonic()
    told = notifications(hook(url))
    with told:
        told.started(plan_of(10))
        for result in results:
            told.clip(result)
        seconds_of_clips = time.monotonic() - start
        told.finished(summarise(results, run_of()))

    assert seconds_of_clips < 0.2
    assert "was not delivered" in caplog.text


def test_a_receiver_that_hangs_delays_neither_a_clip_nor_the_end_of_the_run_for_long():
    results = [rendered(row, f"c{row}") for row in range(2, 102)]

    with receiving(seconds=20.0) as receiver:
        told = notifications(hook(receiver.url, timeouts_seconds=(1.0, 20.0)), flush_seconds=0.5)
        start = time.monotonic()
        render(told, results, summarise(results, run_of()))
        seconds = time.monotonic() - start

    assert seconds < 2.0


def test_when_too_many_events_wait_the_oldest_go_and_the_end_of_the_run_stays(caplog):
    results = [rendered(row, f"c{row}") for row in range(2, 52)]

    with receiving(seconds=0.05) as receiver:
        render(notifications(hook(receiver.url, max_waiting=5)), results, summarise(results, run_of()))

    assert 5 <= len(receiver.events) < 20
    assert receiver.events[-1]["type"] == "scail.run.finished"
    assert "events were dropped" in caplog.text


def test_status_json_is_there_for_the_run_and_for_the_newest_run(tmp_path):
    output = str(tmp_path)
    settled = [ClipResult(row=9, clip_id="s", status=ClipStatus.SKIPPED)]
    told = notifications(StatusFile(output, "run-1", min_seconds_between_writes=0.0), output=output)

    with told:
        told.started(plan_of(4, settled), [ClipResult(row=8, clip_id="i", status=ClipStatus.INVALID)])
        assert told.status.eta_seconds is None
        told.clip(rendered(2, "a"))
        deadline = time.monotonic() + 5
        while not (tmp_path / "status.json").exists() or status_of(tmp_path / "status.json").last_clip is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status = status_of(tmp_path / "status.json")
        told.finished(summarise([rendered(2, "a")], run_of(output)))

    assert (status.state, status.num_rows, status.num_settled) == (RunState.RUNNING, 6, 3)
    assert (status.counts[ClipStatus.SKIPPED], status.counts[ClipStatus.INVALID]) == (1, 1)
    assert (status.last_clip.clip_id, status.last_clip.seconds) == ("a", 45.0)
    assert status.eta_seconds is not None
    final = status_of(tmp_path / "status.json")
    assert final == status_of(tmp_path / "runs" / "run-1" / "status.json")
    assert final.state is RunState.COMPLETED
    assert final.report == f"{output}/runs/run-1/report.html"


def test_the_time_that_is_left_follows_from_the_rows_that_have_come(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(notify.time, "monotonic", lambda: now[0])
    told = notifications()

    told.started(plan_of(4))
    now[0] += 60.0
    told.clip(rendered(2, "a"))
    after_one = told.status.eta_seconds
    now[0] += 30.0
    told.clip(rendered(3, "b"))

    assert after_one == pytest.approx(180.0)
    assert told.status.eta_seconds == pytest.approx(90.0)


def test_status_json_is_written_rarely_and_ends_with_the_truth(tmp_path, monkeypatch):
    publish_bytes, written = storage.publish_bytes, []
    monkeypatch.setattr(
        storage, "publish_bytes", lambda uri, *a, **kw: written.append(uri) or publish_bytes(uri, *a, **kw)
    )
    results = [rendered(row, f"c{row}") for row in range(2, 302)]
    told = notifications(StatusFile(str(tmp_path), "run-1", min_seconds_between_writes=0.2), output=str(tmp_path))

    with told:
        told.started(plan_of(300))
        for result in results:
            told.clip(result)
            time.sleep(0.001)
        told.finished(summarise(results, run_of()))

    assert 4 <= len(written) <= 20  # two files each time
    assert status_of(tmp_path / "status.json").counts[ClipStatus.RENDERED] == 300


def test_a_run_in_which_nothing_happens_still_says_that_it_is_alive(tmp_path):
    status_file = StatusFile(str(tmp_path), "run-1", min_seconds_between_writes=0.0, heartbeat_seconds=0.05)
    told = notifications(status_file, output=str(tmp_path))

    with told:
        told.started(plan_of(3))
        time.sleep(0.3)
        path = tmp_path / "status.json"
        first = status_of(path).updated_at
        time.sleep(0.3)
        later = status_of(path).updated_at

    assert later > first


def test_an_output_that_cannot_be_written_is_said_once_and_fails_nothing(tmp_path, caplog, monkeypatch):
    def read_only(uri, *_args, **_kwargs):
        raise storage.PermissionDeniedError(f"{uri}: read-only")

    monkeypatch.setattr(storage, "publish_bytes", read_only)
    results = [rendered(row, f"c{row}") for row in range(2, 22)]
    told = notifications(StatusFile(str(tmp_path), "run-1", min_seconds_between_writes=0.0))

    with caplog.at_level(logging.WARNING):
        render(told, results, summarise(results, run_of()))

    assert len([record for record in caplog.records if "read-only" in record.message]) == 1


def test_a_notifier_that_raises_stops_neither_the_run_nor_the_other_notifiers(tmp_path):
    class Broken:
        def notify(self, _event):
            raise RuntimeError("broken")

        def close(self, _timeout_seconds):
            raise RuntimeError("broken")

    status_file = StatusFile(str(tmp_path), "run-1", min_seconds_between_writes=0.0)

    render(notifications(Broken(), status_file, output=str(tmp_path)), (), summarise([], run_of()))

    assert status_of(tmp_path / "status.json").state is RunState.COMPLETED


def test_a_run_that_is_stopped_says_why(tmp_path):
    status_file = StatusFile(str(tmp_path), "run-1", min_seconds_between_writes=0.0)
    told = notifications(status_file, output=str(tmp_path))
    told.started(plan_of(2))

    with pytest.raises(KeyboardInterrupt), told:
        raise KeyboardInterrupt("by hand")

    status = status_of(tmp_path / "status.json")
    assert (status.state, status.message) == (RunState.STOPPED, "KeyboardInterrupt: by hand")


def test_a_run_that_was_refused_tells_nothing(tmp_path):
    told = notifications(StatusFile(str(tmp_path), "run-1"), output=str(tmp_path))

    with pytest.raises(ValueError, match="no row"), told:
        raise ValueError("no row")

    assert not list(tmp_path.iterdir())


def test_the_webhook_is_told_if_its_address_is_set(tmp_path):
    with receiving() as receiver:
        settings = Settings(webhook_url=receiver.url, webhook_secret=SECRET)
        told = open_notifications(settings, run_id="run-1", manifest_uri="m.csv", output_uri=str(tmp_path))
        render(told, (), summarise([], run_of()))

    assert len(receiver.events) == 2
    assert SECRET not in repr(settings)
    assert status_of(tmp_path / "status.json").state is RunState.COMPLETED


def test_an_address_that_is_none_is_refused_at_once():
    with pytest.raises(ValidationError, match="webhook_url"):
        Settings(webhook_url="ftp://example.org/hook")
