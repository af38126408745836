"""The serverless handler: the same render as a manifest's row, its answers, and RunPod's own package around it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail import ScailPipeline
from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY
from scail.errors import OutOfMemoryError
from scail.video import encode_video
from tasks import serverless, storage
from tasks.errors import DeviceFaultError, RefusedError
from tasks.resident import load_pipeline
from tasks.serverless import answer, load_model
from tasks.settings import Settings
from tests.tasks.emulators import BUCKET, google_emulator

ROOT = Path(__file__).parents[2]
HANDLER = ROOT / "infra" / "runpod" / "handler.py"
RUNPOD = Path(sys.prefix) / "runpod" / "bin" / "python"  # made by `make setup`
HEIGHT, WIDTH = 64, 96

needs_runpod = pytest.mark.skipif(not RUNPOD.exists(), reason="no environment with runpod: make setup")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An emulated bucket with a reference and a pose in it."""
    with google_emulator() as server:
        yield server.url


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "SCAIL_TINY"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    return folder


@pytest.fixture
def settings(bucket, checkpoint, tmp_path, monkeypatch) -> Settings:
    monkeypatch.setenv("SCAIL_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("SCAIL_SCRATCH_DIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("SCAIL_MIN_FREE_SCRATCH_BYTES", "1000000")
    monkeypatch.setenv("SCAIL_OUTPUT", f"gs://{BUCKET}/{tmp_path.name}")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "reference.png")
    frames = np.zeros((5, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, 16:48, 32:40] = (255, 85, 0)
    encode_video(tmp_path / "pose.mp4", frames, fps=24.0, metadata={})
    for name in ("reference.png", "pose.mp4"):
        storage.publish_file(tmp_path / name, f"gs://{BUCKET}/inputs/{name}")
    return Settings()


def request(**changes) -> dict[str, object]:
    good = {
        "reference_url": f"gs://{BUCKET}/inputs/reference.png",
        "pose_url": f"gs://{BUCKET}/inputs/pose.mp4",
        "prompt": "a dancer",
        "width": WIDTH,
        "height": HEIGHT,
        "num_inference_steps": 2,
        "seed": 7,
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def test_a_request_is_rendered_once_and_known_the_second_time(settings):
    first = answer(request(clip_id="mira"), run_id="job-1", settings=settings)
    again = answer(request(clip_id="mira"), run_id="job-2", settings=settings)

    assert (first["status"], first["clip_id"]) == ("rendered", "mira")
    assert storage.size(first["video"]) > 0
    assert first["seconds"]["denoise"] > 0
    assert (again["status"], again["video"], again["key"]) == ("skipped", first["video"], first["key"])


def test_the_model_is_loaded_once(settings, monkeypatch):
    loads = []
    load = ScailPipeline.from_pretrained
    monkeypatch.setattr(ScailPipeline, "from_pretrained", lambda *args, **kw: loads.append(1) or load(*args, **kw))
    load_pipeline.cache_clear()

    load_model(settings)
    for seed in (1, 2):
        assert answer(request(seed=seed), run_id=f"job-{seed}", settings=settings)["status"] == "rendered"

    assert len(loads) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pose_url": None}, "`pose_url` is missing"),
        ({"promt": "a dancer"}, "`promt` is not known; expected some of "),
        ({"seed": -1}, "`seed`: "),
        ({"width": 100}, "`width`: "),
        ({"reference_url": "/etc/passwd"}, "`reference_url`: a manifest that does not lie on this machine"),
        ({"reference_url": "http://example.com/a.png"}, "`reference_url`: http:// is not encrypted"),
        ({"reference_url": f"gs://{BUCKET}/inputs/none.png"}, "column reference: "),
        ({"reference_url": f"gs://{BUCKET}/inputs/pose.mp4"}, "reference"),
        ({"prompt": {"text": "a dancer"}}, "prompt"),
    ],
)
def test_a_bad_request_is_answered_in_words(settings, changes, message):
    given = answer(request(**changes), run_id="job", settings=settings)

    assert message in given["error"]
    assert given["error_class"] in {"RefusedError", "NotFoundError", "InvalidInputError"}
    assert "Traceback" not in given["error"]
    json.dumps(given)


def test_what_is_no_object_is_refused(settings):
    for given in (None, "a dancer", [1]):
        assert "expected reference_url" in answer(given, run_id="job", settings=settings)["error"]


def test_a_failure_that_another_try_may_mend_is_tried_again(settings, monkeypatch):
    calls = []
    render = serverless.render_clip.fn

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OutOfMemoryError("the GPU was full")
        return render(*args, **kwargs)

    monkeypatch.setattr(serverless.render_clip, "fn", fails_once)
    monkeypatch.setattr(serverless, "RETRY_DELAYS_SECONDS", [0.0, 0.0])

    assert answer(request(seed=11), run_id="job", settings=settings)["status"] == "rendered"
    assert len(calls) == 2


def test_after_a_fault_of_the_gpu_the_worker_is_replaced(settings, monkeypatch):
    def faulty(*args, **kwargs):
        raise DeviceFaultError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(serverless.render_clip, "fn", faulty)

    given = answer(request(seed=12), run_id="job", settings=settings)

    assert given["refresh_worker"] is True
    assert "device-side assert" in given["error"]


def test_an_endpoint_that_does_not_know_where_clips_go_does_not_start(settings, monkeypatch):
    monkeypatch.delenv("SCAIL_OUTPUT")

    with pytest.raises(RefusedError, match="SCAIL_OUTPUT is not set"):
        load_model(Settings())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@needs_runpod
def test_runpods_local_server_answers_good_and_bad_jobs(settings, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(RUNPOD), str(HANDLER), "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=log, stderr=log)
    try:
        good = ask(server, port, {"input": request(seed=22)})
        bad = ask(server, port, {"input": request(seed="seven")})
    finally:
        server.kill()
        server.wait()

    assert (good["status"], good["output"]["status"]) == ("COMPLETED", "rendered")
    assert bad["status"] == "FAILED"
    assert "`seed`" in bad["error"]
    assert (tmp_path / "server.log").read_text().count("loaded ") == 1


def ask(server: subprocess.Popen, port: int, job: dict[str, object]) -> dict[str, object]:
    body = json.dumps(job).encode()
    url = f"http://127.0.0.1:{port}/runsync"
    deadline = time.monotonic() + 90
    while True:
        try:
            sent = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(sent, timeout=60) as response:
                return json.load(response)
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
