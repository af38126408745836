"""The whole of compose.yaml, started by its own commands, renders the demo."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY
from tests.flows.postgres import find_binaries, running_postgres
from tests.infra.stack import ROOT, Stack, running_stack


def ask(stack: Stack, path: str, body: object | None = None, *, user: str = "scail:secret") -> dict:
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{stack.api_url}{path}", data, headers), timeout=30) as answer:
        return json.load(answer)


def finished(stack: Stack, flow_run: dict) -> dict:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        state = ask(stack, f"/flow_runs/{flow_run['id']}")["state"]
        if state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
            return state
        time.sleep(0.5)
    raise AssertionError(stack.log("coordinator"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_binaries() is None, reason="no PostgreSQL on this machine: apt-get install postgresql")
def test_the_compose_file_renders_the_demo(tmp_path):
    write_random_checkpoint(tmp_path / "checkpoints" / "SCAIL_TINY", SCAIL_TINY, seed=0)
    output = tmp_path / "out"
    variables = {
        "SCAIL_CHECKPOINTS": str(tmp_path / "checkpoints"),
        "SCAIL_CHECKPOINT": "/checkpoints/SCAIL_TINY",
        "SCAIL_OUTPUT": str(output),
    }
    (tmp_path / "stack").mkdir()

    with running_postgres() as url:
        address = urlsplit(url)
        database = (address.port, address.username, address.path.removeprefix("/"))
        with running_stack(
            tmp_path / "stack", variables=variables, database=database, checkpoints=tmp_path / "checkpoints"
        ) as stack:
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(stack, "/deployments/name/render-manifest/render-manifest", user="")
            deployment = ask(stack, "/deployments/name/render-manifest/render-manifest")
            parameters = {"manifest": str(ROOT / "manifests" / "demo.csv"), "output": str(output)}
            run = ask(stack, f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
            state = finished(stack, run)

    assert state["type"] == "COMPLETED", state
    assert "7 rendered, 0 skipped, 0 failed" in state["message"]
    assert len(list(output.glob("clips/*/video.mp4"))) == 7
    assert (output / "report.html").exists()
