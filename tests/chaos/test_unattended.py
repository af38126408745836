"""Runs that nobody watches: started by the server, cancelled in its UI, brought back when their machine is gone."""

from __future__ import annotations

import json
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import automations
from flows.deployments import deploy
from tasks import object_store, storage
from tests.chaos.harness import (
    Cluster,
    attempts_of,
    computing,
    done_clips,
    free_port,
    kill_tree,
    num_computed,
    wait_until,
    write_clips,
)
from tests.chaos.test_steering import (
    LONG,
    LOOK_SECONDS,
    REACTION_SECONDS,
    SLOW,
    SLOWER,
    STEP_SECONDS,
    seconds_until_stopped,
)
from tests.tasks.emulators import BUCKET, PubSub, pubsub_emulator

UNSTARTED_SECONDS = 20
SILENCE_SECONDS = 35  # Prefect takes no heartbeat more often than every 30


@dataclass(frozen=True)
class Studio:
    """A cluster with deployments on its server, a coordinator for them, and a bucket with an inbox."""

    cluster: Cluster
    root: str
    deployments: dict[str, str]  # ids by name

    def start(self, manifest: Path, output: Path, *, state: str = "SCHEDULED") -> str:
        """What *Quick run* does in the UI; returns the flow run's id."""
        parameters = {"manifest": str(manifest), "output": str(output)}
        path = f"deployments/{self.deployments['render-manifest']}/create_flow_run"
        return self.cluster.call(path, {"parameters": parameters, "state": {"type": state}})["id"]

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return self.cluster.call(f"flow_runs/{flow_run_id}")

    def states(self, flow_run_id: str) -> list[str]:
        states = self.cluster.call(f"flow_run_states/?flow_run_id={flow_run_id}")
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def wait_for(self, flow_run_id: str, state: str, seconds: float = 120.0) -> None:
        wait_until(lambda: self.flow_run(flow_run_id)["state_name"] == state, f"the run is {state}", seconds, every=0.5)

    def process_of(self, flow_run_id: str) -> psutil.Process:
        """The process that runs the flow, below the coordinator."""
        coordinator = psutil.Process(self.cluster.processes["coordinator"].pid)

        def find() -> psutil.Process | None:
            for child in coordinator.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if child.environ().get("PREFECT__FLOW_RUN_ID") == flow_run_id:
                        return child
            return None

        return wait_until(find, "the flow run has a process")


@pytest.fixture(scope="module")
def module_bucket(bucket_server) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
        bucket_server.reset()
        object_store._filesystem.cache_clear()
        yield
        object_store._filesystem.cache_clear()


@pytest.fixture(scope="module")
def studio(shared_cluster, module_bucket) -> Iterator[Studio]:
    shared_cluster.wait_for_workers()
    root = f"gs://{BUCKET}/{uuid.uuid4().hex}"
    with temporary_settings({PREFECT_API_URL: shared_cluster.api_url}):
        registered = deploy({"inbox": f"{root}/inbox", "output": f"{root}/renders"})
        automations.register(
            [
                automations.silent_runs_crash(SILENCE_SECONDS),
                automations.unstarted_runs_come_back([item.name for item in registered], UNSTARTED_SECONDS),
            ]
        )
    studio = Studio(shared_cluster, root, {item.name: str(item.id) for item in registered})
    set_schedule(studio, on=False)
    shared_cluster.start_coordinator()
    yield studio
    set_schedule(studio, on=False)
    kill_tree(shared_cluster.processes.pop("coordinator"))


def set_schedule(studio: Studio, *, on: bool) -> None:
    """The switch of the inbox's schedule, in the UI."""
    verb = "resume_deployment" if on else "pause_deployment"
    studio.cluster.call(f"deployments/{studio.deployments['watch-inbox']}/{verb}", {})


def watch_runs(studio: Studio) -> list[dict[str, Any]]:
    deployments = {"id": {"any_": [studio.deployments["watch-inbox"]]}}
    return studio.cluster.call("flow_runs/filter", {"deployments": deployments})


def wait_for_a_clip(output: Path) -> None:
    wait_until(lambda: computing(output), "a clip is on a GPU", 120)


def test_cancelling_in_the_ui_stops_the_clips_within_a_step(studio, tmp_path):
    output = tmp_path / "out"
    flow_run_id = studio.start(write_clips(tmp_path, [LONG] * 4, num_steps=60), output)
    wait_for_a_clip(output)

    since = time.time()
    studio.cluster.cancel(flow_run_id)

    studio.wait_for(flow_run_id, "Cancelled", 60)
    assert max(seconds_until_stopped(output, since)) < LOOK_SECONDS + STEP_SECONDS + REACTION_SECONDS
    assert not done_clips(output)
    assert not list(output.glob("clips/*"))


def test_the_uis_pause_lets_clips_end_and_its_resume_goes_on_where_they_were(studio, tmp_path):
    output = tmp_path / "out"
    flow_run_id = studio.start(write_clips(tmp_path, [f"{SLOWER} paused-in-the-ui"] * 10), output)
    wait_for_a_clip(output)
    process = studio.process_of(flow_run_id)
    details = {"pause_timeout": (datetime.now(UTC) + timedelta(seconds=300)).isoformat(), "pause_reschedule": True}
    state = {"type": "PAUSED", "name": "Suspended", "state_details": details}

    studio.cluster.call(f"flow_runs/{flow_run_id}/set_state", {"state": state, "force": True})
    time.sleep(LOOK_SECONDS + 0.5)
    studio.cluster.let_go("paused-in-the-ui")
    wait_until(lambda: all(attempts[-1].outcome for attempts in attempts_of(output).values()), "no clip is under way")
    paused_at = num_computed(output)
    time.sleep(2)
    still_paused_at = num_computed(output)
    studio.cluster.call(f"flow_runs/{flow_run_id}/resume", {})

    studio.wait_for(flow_run_id, "Completed")
    assert paused_at == still_paused_at < 10
    assert num_computed(output) == len(done_clips(output)) == 10
    wait_until(lambda: not process.is_running(), "the process that was paused has left the run to the one resumed", 30)


def test_a_run_whose_machine_died_before_it_began_is_started_again(studio, tmp_path):
    output = tmp_path / "out"

    flow_run_id = studio.start(write_clips(tmp_path, ["a dancer"] * 2), output, state="PENDING")  # taken, then nothing

    studio.wait_for(flow_run_id, "Completed")
    assert studio.states(flow_run_id)[:2] == ["Pending", "AwaitingRetry"]
    assert len(done_clips(output)) == 2


def test_a_killed_coordinator_is_started_again_and_goes_on_where_it_was(studio, tmp_path):
    output = tmp_path / "out"
    flow_run_id = studio.start(write_clips(tmp_path, [SLOW] * 8), output)
    wait_until(lambda: done_clips(output), "a clip is done")

    studio.process_of(flow_run_id).kill()

    studio.wait_for(flow_run_id, "Completed")
    assert "Crashed" in studio.states(flow_run_id)
    assert len(done_clips(output)) == 8
    assert num_computed(output) == 8  # what it left on the workers was waited for


def test_cancelling_the_inboxs_run_refuses_its_manifest_and_no_later_look_begins_it_again(studio, tmp_path):
    upload(studio, tmp_path, "unwanted.csv", "slow 2.5")
    flow_run_id = start_a_look(studio)
    wait_until(lambda: storage.list_files(f"{studio.root}/claims/unwanted.csv"), "a look has taken the upload", 60)
    wait_until(lambda: attempts_started(studio, "unwanted"), "its clip is under way", 60, every=0.3)

    studio.cluster.cancel(flow_run_id)

    studio.wait_for(flow_run_id, "Cancelled", 60)
    wait_until(lambda: storage.exists(f"{studio.root}/refused/unwanted.csv"), "the manifest is refused", 30)
    assert b"cancelled" in storage.read_bytes(f"{studio.root}/refused/unwanted.csv.errors.txt")
    assert not storage.exists(f"{studio.root}/inbox/unwanted.csv")
    assert not storage.list_files(f"{studio.root}/renders/unwanted/done")


def start_a_look(studio: Studio) -> str:
    path = f"deployments/{studio.deployments['watch-inbox']}/create_flow_run"
    return studio.cluster.call(path, {"state": {"type": "SCHEDULED"}})["id"]


def attempts_started(studio: Studio, name: str) -> list[str]:
    return storage.list_files(f"{studio.root}/renders/{name}/attempts")


def places_taken(studio: Studio) -> int:
    """Of the four looks into the inbox that may go on at once."""
    deployment = studio.cluster.call(f"deployments/{studio.deployments['watch-inbox']}")
    return deployment["global_concurrency_limit"]["active_slots"]


@pytest.fixture
def emulator() -> Iterator[PubSub | None]:
    """Pub/Sub, where its emulator is installed."""
    with suppress(pytest.skip.Exception), pubsub_emulator() as emulator:
        emulator.create(topic="uploads", subscription="inbox")
        yield emulator
        return
    yield None


@pytest.fixture(params=["http", "pubsub"])
def notify(request, studio, tmp_path, monkeypatch) -> Iterator[Callable[[str], None]]:
    """Tells `scail events` of an upload to the inbox, in one of its ways."""
    port, options, emulator = free_port(), [], None
    if request.param == "pubsub":
        emulator = request.getfixturevalue("emulator")
        if emulator is None:
            pytest.skip("Google's Pub/Sub emulator is not installed (apt: google-cloud-cli-pubsub-emulator)")
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
        options = ["--subscription", "projects/test/subscriptions/inbox"]
    studio.cluster._spawn("events", "flows.cli", "events", f"{studio.root}/inbox", "--port", port, *options)
    wait_until(lambda: answers(port), "`scail events` answers")

    def notify(name: str) -> None:
        key = f"{studio.root.partition(f'{BUCKET}/')[2]}/inbox/{name}"
        if emulator:
            emulator.publish("uploads", eventType="OBJECT_FINALIZE", bucketId=BUCKET, objectId=key)
        else:
            event = {
                "specversion": "1.0",
                "id": "1",
                "source": "test",
                "type": "google.cloud.storage.object.v1.finalized",
            }
            data = json.dumps(event | {"data": {"bucket": BUCKET, "name": key}}).encode()
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/", data), timeout=10).close()

    yield notify
    kill_tree(studio.cluster.processes.pop("events"))


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except OSError:
        return False
    return True


def upload(studio: Studio, folder: Path, name: str, *prompts: str) -> None:
    folder = folder / name.removesuffix(".csv")
    folder.mkdir()
    manifest = write_clips(folder, prompts)
    for file in (folder / "reference.png", folder / "pose.mp4"):
        storage.publish_file(file, f"{studio.root}/inbox/{file.name}")
    storage.publish_file(manifest, f"{studio.root}/inbox/{name}")


def test_an_event_has_an_upload_rendered_at_once(studio, notify, tmp_path, request):
    before = {run["id"] for run in watch_runs(studio)}

    def new_runs() -> list[dict[str, Any]]:
        return [run for run in watch_runs(studio) if run["id"] not in before]

    name = f"{request.node.callspec.id}.csv"
    upload(studio, tmp_path, name, name)

    notify(name)

    started = wait_until(
        lambda: [run for run in watch_runs(studio) if run["id"] not in before],
        "the automation started a look",
        15,
        every=0.5,
    )
    wait_until(lambda: storage.exists(f"{studio.root}/done/{name}"), "the manifest is done", 90)
    assert started[0]["created_by"]["type"] == "AUTOMATION"
    assert b"1 rendered" in storage.read_bytes(f"{studio.root}/done/{name}.txt")


def test_what_a_dead_machine_left_is_finished_its_place_is_free_and_the_inbox_is_looked_at_without_events(
    studio, tmp_path
):
    output = tmp_path / "out"
    upload(studio, tmp_path, "held.csv", *[f"{SLOWER} the-machine-is-gone"] * 12)
    look = start_a_look(studio)
    wait_until(lambda: attempts_started(studio, "held"), "a look renders what it found", 60, every=0.3)
    flow_run_id = studio.start(write_clips(tmp_path, [SLOW] * 12), output)
    wait_until(lambda: done_clips(output), "a clip is done")
    upload(studio, tmp_path, "polled.csv", "polled")

    before = places_taken(studio)
    kill_tree(studio.cluster.processes.pop("coordinator"))
    studio.cluster.let_go("the-machine-is-gone")
    since = time.monotonic()
    storage.delete(f"{studio.root}/inbox/held.csv")  # no other look is to take it and its place
    set_schedule(studio, on=True)
    studio.cluster.start_coordinator()

    wait_until(lambda: "Crashed" in studio.states(flow_run_id), "the run crashed", 2 * SILENCE_SECONDS, every=0.5)
    studio.wait_for(flow_run_id, "Completed")
    assert len(done_clips(output)) == num_computed(output) == 12
    wait_until(lambda: storage.list_files(f"{studio.root}/claims/polled.csv"), "the upload is taken", every=0.5)
    took = time.monotonic() - since
    set_schedule(studio, on=False)
    wait_until(lambda: storage.exists(f"{studio.root}/done/polled.csv"), "the manifest is done", every=0.5)
    wait_until(lambda: not places_taken(studio), "no place is taken", every=0.5)
    assert before == 1
    assert studio.states(look)[-1] == "Crashed"
    assert took < 60 + 60  # the minute, and a busy machine that starts two runs of Prefect's at the same time
    assert any(run["auto_scheduled"] and run["state_name"] == "Completed" for run in watch_runs(studio))
