"""The ways in: what is registered with a real server, and what a real worker makes of a form that was filled in."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deployments import DEPLOYMENTS, RUN_ENVIRONMENT, TAGS, TIMEZONE, WORK_POOL, Deployment, deploy, find
from scail.probe import probe_video
from tasks.doctor import examine
from tests.chaos.harness import free_port, kill_tree, wait_until
from tests.flows.postgres import find_binaries, running_postgres

ROOT = Path(__file__).parents[2]
FOLDERS = {name: f"gs://studio/{name}" for name in ("inbox", "manifests", "output")}
RENDER, NIGHTLY = "render-manifest/render-manifest", "render-nightly/render-nightly"


@pytest.fixture(scope="module")
def sqlite_server(prefect_api) -> str:
    url = PREFECT_API_URL.value()
    assert url is not None
    return url


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory) -> Iterator[str]:
    home, port = tmp_path_factory.mktemp("server"), free_port()
    api_url = f"http://127.0.0.1:{port}/api"
    with running_postgres() as database:
        environment = own_environment(home, api_url) | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database}
        with process(["prefect", "server", "start", "--host", "127.0.0.1", "--port", port], environment, home / "log"):
            wait_until(lambda: answers(f"{api_url}/health"), "the Prefect server answers", 180)
            yield api_url


@pytest.fixture
def server(request) -> Iterator[str]:
    """The API's URL; this process talks to it as well. tests/chaos does the like on SQLite."""
    database = "postgres" if find_binaries() else "sqlite"
    url = request.getfixturevalue(f"{database}_server")
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


@contextmanager
def process(module_and_arguments: list[object], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        started = subprocess.Popen(
            [sys.executable, "-m", *map(str, module_and_arguments)], env=environment, cwd=ROOT, stdout=file, stderr=file
        )
    try:
        yield
    finally:
        kill_tree(started)


def own_environment(home: Path, api_url: str) -> dict[str, str]:
    return os.environ | {
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
        "SCAIL_SCRATCH_DIR": str(home / "scratch"),
    }


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return answer.status == 200
    return False


def submit(deployment: str, parameters: dict[str, Any]) -> FlowRun:
    """What the form's button does."""
    with get_client(sync_client=True) as client:
        found = find(client, deployment)
        assert found is not None
        return client.create_flow_run_from_deployment(found.id, parameters=parameters)


def ended(run: FlowRun) -> FlowRun | None:
    with get_client(sync_client=True) as client:
        now = client.read_flow_run(run.id)
        return now if now.state and now.state.is_final() else None


def test_a_form_that_was_filled_in_becomes_clips(server, write_manifest, tmp_path, checkpoint):
    manifest = write_manifest({"clip_id": "mira"}, {"clip_id": "nils", "pose": tmp_path / "gone.mp4"})
    parameters = {
        "manifest": str(manifest),
        "output": str(tmp_path / "out"),
        "options": {"profile": "exact", "only_status": [], "limit": None, "checkpoint": str(checkpoint)},
    }
    deploy(FOLDERS)

    run = submit(RENDER, parameters)
    with process(
        ["prefect", "worker", "start", "--pool", WORK_POOL], own_environment(tmp_path, server), tmp_path / "log"
    ):
        run = wait_until(lambda: ended(run), f"the run ends:\n{(tmp_path / 'log').read_text()[-3000:]}", 150)

    assert run.state.type is StateType.FAILED  # one row has no pose, and the state says so
    first, second = run.state.message.splitlines()
    assert first == f"1 rendered, 0 skipped, 1 failed → {tmp_path}/out/report.html"
    assert second.startswith("nils: line 3, column pose: ")
    assert run.name == "manifest.csv"
    assert probe_video(tmp_path / "out" / "clips" / "mira" / "video.mp4").num_frames == 5
    with get_client(sync_client=True) as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        assert [task_run.name for task_run in client.read_task_runs(flow_run_filter=of_run)] == ["mira"]
        artifacts = {
            artifact.key: artifact
            for artifact in client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
            )
        }
    assert artifacts["manifest-csv-progress"].data == 100.0
    assert "data:image/jpeg;base64," in artifacts["manifest-csv-summary"].data
    assert '"nils"' in artifacts["manifest-csv-results"].data


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"profile": "fastest"}, "fastest"), ({"limit": 0}, "0"), ({"only_status": ["rendered"]}, "rendered")],
)
def test_the_server_refuses_what_the_form_does_not_offer(sqlite_server, options, expected):
    deploy(FOLDERS)

    with pytest.raises(PrefectHTTPStatusError, match=expected):
        submit(RENDER, {"manifest": "m.csv", "output": "out", "options": options})


def test_what_is_registered_can_be_run_by_any_worker_with_the_package(sqlite_server):
    registered = deploy(FOLDERS)

    assert [item.name for item in registered] == [item.name for item in DEPLOYMENTS]
    for name in ("silent runs crash", "crashed runs go on", "unstarted runs come back", "uploads are seen"):
        assert Automation.read(name=f"scail: {name}").enabled
    with get_client(sync_client=True) as client:
        for item in registered:
            found = find(client, f"{item.name}/{item.name}")
            assert (found.work_pool_name, found.pull_steps or []) == (WORK_POOL, [])
            assert found.entrypoint.startswith("flows.")
            assert str(ROOT) not in found.model_dump_json()


def test_a_schedule_needs_its_folders_and_is_left_as_somebody_set_it(sqlite_server):
    def nightly_is_active() -> bool:
        with get_client(sync_client=True) as client:
            return find(client, NIGHTLY).schedules[0].active

    by_name = {item.name: item for item in deploy({"output": "gs://studio/output"})}
    assert by_name["render-nightly"].missing == ("manifests",)
    assert not nightly_is_active()

    deploy(FOLDERS)
    assert not nightly_is_active()  # paused until somebody switches it on

    with get_client(sync_client=True) as client:
        found = find(client, NIGHTLY)
        client.update_deployment_schedule(found.id, found.schedules[0].id, active=True)
    deploy(FOLDERS)
    assert nightly_is_active()


def in_prefects_words(deployment: Deployment) -> dict[str, Any]:
    """The entry of infra/prefect.yaml that a line of the table amounts to."""
    schedule: dict[str, Any] = {}
    if isinstance(deployment.schedule, int):
        schedule = {"interval": deployment.schedule}
    elif deployment.schedule:
        schedule = {"cron": deployment.schedule, "timezone": TIMEZONE}
    active = {} if deployment.is_active else {"active": False}
    entry = {
        "name": deployment.name,
        "entrypoint": deployment.entrypoint,
        "description": deployment.description,
        "tags": TAGS,
        "work_pool": {"name": WORK_POOL, "job_variables": {"env": RUN_ENVIRONMENT}},
        "parameters": {name: f"{{{{ $SCAIL_{name.upper()} }}}}" for name in deployment.folders},
        "schedules": [schedule | active] if schedule else [],
    }
    if deployment.limit:
        entry["concurrency_limit"] = {"limit": deployment.limit, "collision_strategy": deployment.on_collision}
    return entry


def test_the_yaml_file_and_the_command_register_the_same():
    document = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text(encoding="utf-8"))

    assert document["deployments"] == [in_prefects_words(item) for item in DEPLOYMENTS]
    assert document["pull"] == []


def test_prefect_itself_takes_the_yaml_file(sqlite_server, tmp_path):
    def seen() -> dict[str, Any]:
        """What the server has; whether a schedule is on is the operator's, who may have changed it."""
        kept = {"name", "entrypoint", "parameters", "tags", "description", "work_pool_name", "job_variables"}
        with get_client(sync_client=True) as client:
            found = {item.name: find(client, f"{item.name}/{item.name}") for item in DEPLOYMENTS}
        return {
            name: item.model_dump(include={*kept, "parameter_openapi_schema"})
            | {
                "on_collision": item.concurrency_options and item.concurrency_options.collision_strategy,
                "pull_steps": item.pull_steps or [],
                "limit": item.global_concurrency_limit and item.global_concurrency_limit.limit,
                "schedules": [entry.schedule.model_dump(exclude={"anchor_date"}) for entry in item.schedules],
            }
            for name, item in found.items()
        }

    deploy(FOLDERS)
    by_command = seen()
    environment = own_environment(tmp_path, sqlite_server) | {
        f"SCAIL_{name.upper()}": uri for name, uri in FOLDERS.items()
    }
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    command = [*prefect, "deploy", "--all", "--prefect-file", "infra/prefect.yaml"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert seen() == by_command


def test_without_a_server_nothing_is_registered():
    from tests.flows.test_cli import scail

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = scail("deploy")

    assert result.exit_code == 2
    assert "PREFECT_API_URL" in result.stderr


def test_the_doctor_says_where_a_server_keeps_its_leases(sqlite_server, monkeypatch, tmp_path):
    def of_prefect():
        return next(finding.message for finding in examine(str(tmp_path)) if finding.what == "Prefect API")

    in_memory = of_prefect()  # Prefect's own choice
    in_files = {"server": {"concurrency": {"lease_storage": "prefect.server.concurrency.lease_storage.filesystem"}}}
    monkeypatch.setattr(SyncPrefectClient, "request", lambda *_: httpx.Response(200, json=in_files))

    assert in_memory == (
        f"{sqlite_server} answers; it keeps leases in memory: restarted, it ends runs that are under a limit "
        "(docs/inbox.md)"
    )
    assert of_prefect() == f"{sqlite_server} answers"


def test_a_server_that_does_not_show_its_settings_is_no_trouble(sqlite_server, monkeypatch, tmp_path):
    def refuse(*_):
        request = httpx.Request("GET", f"{sqlite_server}/admin/settings")
        raise PrefectHTTPStatusError("404", request=request, response=httpx.Response(404, request=request))

    monkeypatch.setattr(SyncPrefectClient, "request", refuse)

    assert any(finding.ok and finding.message == f"{sqlite_server} answers" for finding in examine(str(tmp_path)))
