"""A Prefect server, a `scail scheduler` and two `scail worker` on this machine, to be killed at will; all over TLS."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from PIL import Image

from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY
from scail.probe import probe_video
from scail.video import encode_video
from tasks.attempts import read_attempts
from tasks.cluster import DASK_SETTINGS
from tasks.jobs import Attempt, AttemptStage, ClipMetrics, DoneRecord
from tasks.storage import DEFAULT_POLICY
from tasks.tls import NODE, client_security, write_certificates

if TYPE_CHECKING:
    from distributed import Client

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH, NUM_FRAMES = 32, 64, 5
NUM_WORKERS = 2
CLAIM_SECONDS, STAGE_LIMIT_SECONDS, WORKER_TTL_SECONDS = 4, 12, 15
DISK_MIB, MIN_FREE_BYTES = 32, 1_000_000


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 90.0, *, every: float = 0.05) -> Any:
    """The first true answer of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(every)
    raise AssertionError(f"in {seconds:.0f} s it did not come true that {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_tree(process: subprocess.Popen) -> None:
    """End a process that we started, and all below it."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


@cache
def new_mount_namespace() -> tuple[str, ...] | None:
    """A command that runs another one where it may mount, without being root if need be; None where nobody may."""
    for command in (("unshare", "-Urm"), ("unshare", "-m")):
        with suppress(OSError):
            attempt = subprocess.run([*command, *_ON_A_SMALL_DISK, "/mnt", "true"], check=False, capture_output=True)
            if attempt.returncode == 0:
                return command
    return None


_ON_A_SMALL_DISK = ("sh", "-c", f'mount -t tmpfs -o size={DISK_MIB}m tmpfs "$0" && exec "$@"')


@dataclass
class Run:
    """A `scail render` that goes on, or has ended."""

    process: subprocess.Popen
    manifest: Path
    output: Path
    log: Path

    def wait(self, seconds: float = 150.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_tree(self.process)
            raise AssertionError(f"the run did not end in {seconds:.0f} s:\n{self.tail()}") from None

    def interrupt(self) -> None:
        """What Ctrl-C does: the command and every process that it started get the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if "→" in line]
        return lines[-1] if lines else ""

    def rows(self) -> dict[str, dict[str, str]]:
        """results.csv of the newest run, by clip_id."""
        newest = max((self.output / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
        assert (newest / "_SUCCESS").exists()
        with (newest / "results.csv").open(newline="") as file:
            return {row["clip_id"]: row for row in csv.DictReader(file)}

    def statuses(self) -> list[str]:
        return [row["status"] for row in self.rows().values()]


@dataclass
class Cluster:
    """What a batch runs on."""

    root: Path
    ports: dict[str, int] = field(default_factory=lambda: {"server": free_port(), "scheduler": free_port()})
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    bucket_url: str = ""  # of a server for gs://, if there is one
    database: Path | None = None  # with Prefect's tables; the server makes its own if there is none
    commands: list[subprocess.Popen] = field(default_factory=list)  # of this test

    @property
    def address(self) -> str:
        return f"tls://127.0.0.1:{self.ports['scheduler']}"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['server']}/api"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def tls_dir(self) -> Path:
        return self.root / "certificates" / NODE

    @property
    def chaos_dir(self) -> Path:
        return self.root / "chaos"

    @property
    def scratch_dir(self) -> Path:
        return self.root / "scratch"

    @property
    def environment(self) -> dict[str, str]:
        preloads = ["tests.chaos.faults", "tasks.preload", "tasks.announce"]
        own = {
            "CHAOS_DIR": str(self.chaos_dir),
            "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{WORKER_TTL_SECONDS}s",
            "DASK_DISTRIBUTED__WORKER__PRELOAD": json.dumps(preloads),
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": str(self.root / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PYTHONPATH": str(ROOT),
            "SCAIL_CHECKPOINT": str(self.checkpoint),
            "SCAIL_CLAIM_SECONDS": str(CLAIM_SECONDS),
            "SCAIL_MIN_FREE_SCRATCH_BYTES": str(MIN_FREE_BYTES),
            "SCAIL_SCRATCH_DIR": str(self.scratch_dir),
            "SCAIL_STAGE_LIMIT_SECONDS": str(STAGE_LIMIT_SECONDS),
            "SCAIL_TLS_DIR": str(self.tls_dir),
            "SCAIL_WORKERS": self.address,
            **({"STORAGE_EMULATOR_HOST": self.bucket_url} if self.bucket_url else {}),
        }
        return os.environ | DASK_SETTINGS | own

    def start(self) -> None:
        self.chaos_dir.mkdir(parents=True, exist_ok=True)
        self.scratch_dir.mkdir()
        write_random_checkpoint(self.checkpoint, SCAIL_TINY, seed=0)
        write_certificates(self.tls_dir.parent, [])
        if self.database:
            (self.root / "prefect").mkdir()
            shutil.copy(self.database, self.root / "prefect")
        self.start_server()
        self.start_scheduler()
        for number in range(NUM_WORKERS):
            self.start_worker(number)
        wait_until(self.server_answers, "the Prefect server answers", 180)
        self.wait_for_workers()

    def stop(self) -> None:
        for process in self.processes.values():
            kill_tree(process)

    def start_server(self) -> None:
        self._spawn("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", self.ports["server"])

    def start_scheduler(self) -> None:
        self._spawn("scheduler", "flows.cli", "scheduler", "--port", self.ports["scheduler"])

    def start_worker(self, number: int) -> None:
        """Each with a scratch disk of its own, so small that it can be filled, where the machine lets us mount one."""
        disk = (*new_mount_namespace(), *_ON_A_SMALL_DISK, str(self.scratch_dir)) if new_mount_namespace() else ()
        self._spawn(f"worker-{number}", "flows.cli", "worker", self.address, prefix=disk)

    def start_coordinator(self) -> None:
        """A worker of Prefect's: it starts a process for each run of a deployment."""
        self._spawn("coordinator", "prefect", "worker", "start", "--pool", "scail", "--type", "process")

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def server_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait_for_workers(self, num_workers: int = NUM_WORKERS) -> None:
        what = f"{num_workers} workers are registered"
        wait_until(lambda: len(self.workers()) >= num_workers, what, 120, every=0.3)  # each look is a new connection

    def let_go(self, name: str) -> None:
        """Clips that are slow until this is said are slow no more."""
        (self.chaos_dir / f"let-go-{name}").touch()

    def num_waiting(self, priority: int) -> int:
        """Tasks of a priority that have come to the scheduler."""

        def count(dask_scheduler: Any) -> int:
            annotations = [task.annotations or {} for task in dask_scheduler.tasks.values()]
            return sum(each.get("priority") == priority for each in annotations)

        with self.connect() as client:
            return client.run_on_scheduler(count)

    def connect(self) -> Client:
        from distributed import Client

        return Client(self.address, set_as_default=False, timeout=5, security=client_security(self.tls_dir))

    def workers(self) -> list[int]:
        """Process ids of the workers that the scheduler knows."""
        try:
            with self.connect() as client:
                return list(client.run(os.getpid).values())
        except OSError:
            return []

    def model_loads(self) -> int:
        return len(self.gpu_of_each_load())

    def gpu_of_each_load(self) -> dict[int, str]:
        """Which GPU each process that has loaded the model was given, in the order in which they did."""
        loads = self.chaos_dir / "loads"
        lines = loads.read_text().splitlines() if loads.exists() else []
        return {int(pid): gpu for pid, _, gpu in (line.partition(" ") for line in lines)}

    def fill_disks(self) -> None:
        """Not one byte is left on any worker's scratch disk."""
        for filler in self._fillers():
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
            with suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(1))

    def empty_disks(self) -> None:
        for filler in self._fillers():
            filler.unlink(missing_ok=True)

    def _fillers(self) -> list[Path]:
        """A file on each worker's disk, which other processes see only through the worker's own."""
        pids = [process.pid for name, process in self.processes.items() if name.startswith("worker-")]
        return [Path(f"/proc/{pid}/root{self.scratch_dir}/filler") for pid in pids]

    def render(
        self,
        manifest: Path,
        output: Path | str,
        *options: object,
        name: str = "run",
        workers: str | None = None,
        checkpoint: Path | None = None,  # of workers that the command starts; the cluster's own have theirs
    ) -> Run:
        log = manifest.parent / f"{name}.log"
        arguments = ["render", manifest, "--output", output, "--checkpoint", checkpoint or self.checkpoint, *options]
        program = "tests.chaos.local_command" if workers == "local" else "flows.cli"
        command = [sys.executable, "-m", program, *map(str, arguments)]
        command += ["--workers", workers or self.address]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
        self.commands.append(process)
        return Run(process, manifest, output, log)

    def end_commands(self) -> None:
        """A test that failed half-way leaves no run behind."""
        while self.commands:
            process = self.commands.pop()
            if process.poll() is None:
                kill_tree(process)

    def flow_state(self, run: Run) -> str:
        """The state of the newest flow run of a manifest, as Prefect tells it."""
        return self.flow_run(run)["state"]["type"]

    def flow_run_id(self, run: Run) -> str:
        return self.flow_run(run)["id"]

    def cancel(self, flow_run_id: str) -> None:
        """What the button in Prefect's UI does."""
        self.call(f"flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def call(self, path: str, content: object = None) -> Any:
        """A POST to Prefect's API, a GET if there is no content; again while its SQLite is locked, as clients do."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.api_url}/{path}", data, {"Content-Type": "application/json"})
        for pause in (1, 2, 4, 0):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or not pause:
                    raise
                time.sleep(pause)
        return None

    def flow_run(self, run: Run) -> dict:
        query = {"flow_runs": {"name": {"any_": [run.manifest.name]}}, "sort": "START_TIME_DESC"}
        runs = self.call("flow_runs/filter", query)
        return next(found for found in runs if found["parameters"]["manifest"] == str(run.manifest))

    def _spawn(self, name: str, module: str, *arguments: object, prefix: tuple[str, ...] = ()) -> None:
        with (self.root / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, *map(str, arguments)],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )


def write_clips(folder: Path, prompts: Iterable[str], *, num_steps: int = 4) -> Path:
    """A manifest of tiny clips, clip-0, clip-1, …, with these prompts."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / "reference.png")
    frames = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, 8:24, 28:36] = (255, 85, 0)
    encode_video(folder / "pose.mp4", frames, fps=24.0, metadata={})
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "reference", "pose", "prompt", "width", "height", "num_inference_steps", "seed"])
        for number, prompt in enumerate(prompts):
            writer.writerow([f"clip-{number}", "reference.png", "pose.mp4", prompt, WIDTH, HEIGHT, num_steps, number])
    return path


def done_clips(output: Path) -> dict[str, DoneRecord]:
    """Every clip's done record, each checked to be whole and the only one."""
    records = [DoneRecord.model_validate_json(path.read_text()) for path in (output / "done").glob("*.json")]
    by_clip = {record.clip_id: record for record in records}
    assert len(by_clip) == len(records), "a clip was published under two keys"
    for record in records:
        video = output / record.video
        data = video.read_bytes()
        assert len(data) == record.video_size
        assert hashlib.md5(data).hexdigest() == record.video_md5
        assert probe_video(video).num_frames == NUM_FRAMES
        assert (output / record.poster).stat().st_size > 0
        assert metrics_of(output, record).key == record.key
    return by_clip


def assert_all_rendered(cluster: Cluster, run: Run, num_clips: int) -> None:
    assert run.wait() == 0, run.tail()
    assert set(done_clips(run.output)) == {f"clip-{number}" for number in range(num_clips)}
    assert Counter(run.statuses()) == {"rendered": num_clips}
    assert run.last_line().startswith(f"{num_clips} rendered, 0 skipped, 0 failed")
    assert cluster.flow_state(run) == "COMPLETED"


def metrics_of(output: Path, record: DoneRecord) -> ClipMetrics:
    return ClipMetrics.model_validate_json((output / record.metrics).read_text())


def attempts_of(output: Path) -> dict[str, list[Attempt]]:
    """Every start of every clip, by key."""
    folder = output / "attempts"
    keys = [path.name for path in folder.iterdir()] if folder.exists() else []
    return {key: read_attempts(str(output), key, policy=DEFAULT_POLICY) for key in keys}


def computing(output: Path) -> list[Attempt]:
    """Starts that are on a GPU now."""
    every = [attempt for attempts in attempts_of(output).values() for attempt in attempts[-1:]]
    return [attempt for attempt in every if attempt.stage is AttemptStage.COMPUTING and attempt.outcome is None]


def num_computed(output: Path) -> int:
    """Starts that came as far as a GPU, of all clips together."""
    every = [attempt for attempts in attempts_of(output).values() for attempt in attempts]
    return sum(attempt.stage is not AttemptStage.PREPARING for attempt in every)


def workers_with_a_neighbour(output: Path) -> set[str]:
    """Workers that have one clip on their GPU and another one in preparation or waiting for its turn."""
    last = [attempts[-1] for attempts in attempts_of(output).values() if attempts and attempts[-1].outcome is None]
    on_gpu, preparing = (
        {attempt.worker for attempt in last if attempt.stage is stage}
        for stage in (AttemptStage.COMPUTING, AttemptStage.PREPARING)
    )
    return on_gpu & preparing


def wait_for_computing(run: Run) -> psutil.Process:
    """A worker's process with a clip on its GPU."""

    def busy() -> list[Attempt]:
        assert run.process.poll() is None, f"the run ended before anything was rendered:\n{run.tail()}"
        return computing(run.output)

    attempts = wait_until(busy, "a clip is on a GPU")
    return psutil.Process(int(attempts[0].worker.rpartition(":")[2]))


def stop_signal(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)
