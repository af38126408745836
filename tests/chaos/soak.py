"""`python -m tests.chaos.soak --clips 500`: a long batch under every fault, at random with a fixed seed.

After so many clips under faults, four tenths as many are rendered in peace by the same run: workers that are killed
every few seconds do not live long enough for their memory to be judged.

Prints a table: what was done to the run, what the run made of it, and how the memory of its processes went, each from
when a fifth of `--clips` was done in its presence to its end. Ends with 1 if a clip was lost, published twice or not
whole, if the results do not tell what happened, or if the coordinator, the scheduler or a worker grew by more than
2 %. Prefect's server is not ours; its memory is printed and not judged.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.harness import (
    Cluster,
    Run,
    attempts_of,
    computing,
    done_clips,
    metrics_of,
    new_mount_namespace,
    num_computed,
    stop_signal,
    wait_until,
    write_clips,
)
from tests.chaos.memory import MemoryLog, worker_processes

JUDGED = ("coordinator", "scheduler", "worker")
CALM_SHARE, WARM_UP_SHARE = 0.4, 0.2  # of the clips that are rendered under faults
MISBEHAVING = ("poison", "cuda-once", "memory-once", "nan-once", "hang-once")
SHARE_MISBEHAVING = 0.05
CALM = "slow 0.1"


@dataclass
class Soak:
    """One long batch and what is done to it."""

    cluster: Cluster
    manifest: Path
    output: Path
    rng: random.Random
    num_under_faults: int
    memory: MemoryLog
    done: Counter[str] = field(default_factory=Counter)
    runs: list[Run] = field(default_factory=list)

    def go(self, pause_seconds: float) -> Run:
        """Render the manifest to its end; while clips under faults are left, with one every `pause_seconds` or so."""
        self.start_run()
        faults: list[tuple[Callable[[], None], int]] = [
            (self.kill_worker, 6),
            (self.kill_worker_and_nanny, 3),
            (self.stop_worker, 2),
            (self.kill_scheduler, 1),
            (self.restart_server, 1),
            (self.kill_run, 2),
            *([(self.fill_disk, 1)] if new_mount_namespace() else []),
        ]
        next_fault = time.monotonic() + pause_seconds
        while self.runs[-1].process.poll() is None:
            time.sleep(1)
            num_done = self.num_done()
            self.note_memory(num_done)
            is_calm = num_done >= self.num_under_faults
            if not is_calm and time.monotonic() > next_fault and computing(self.output):
                [(fault, _)] = self.rng.choices(faults, [weight for _, weight in faults])
                self.done[fault.__name__.replace("_", " ")] += 1
                with suppress(psutil.NoSuchProcess):
                    fault()
                next_fault = time.monotonic() + self.rng.uniform(0.5, 1.5) * pause_seconds
        return self.runs[-1]

    def start_run(self) -> None:
        self.runs.append(self.cluster.render(self.manifest, self.output, name=f"run-{len(self.runs)}"))

    def busy_worker(self) -> psutil.Process:
        attempts = computing(self.output)
        if not attempts:
            raise psutil.NoSuchProcess(0)
        return psutil.Process(int(self.rng.choice(attempts).worker.rpartition(":")[2]))

    def kill_worker(self) -> None:
        self.busy_worker().kill()

    def kill_worker_and_nanny(self) -> None:
        worker = self.busy_worker()
        if (nanny := worker.parent()) and "dask_worker" in " ".join(nanny.cmdline()):
            nanny.kill()
        worker.kill()

    def stop_worker(self) -> None:
        stop_signal(self.busy_worker())

    def kill_scheduler(self) -> None:
        self.cluster.kill("scheduler")
        time.sleep(self.rng.uniform(0.5, 3))
        self.cluster.start_scheduler()

    def restart_server(self) -> None:
        self.cluster.kill("server")
        time.sleep(self.rng.uniform(1, 10))
        self.cluster.start_server()
        wait_until(self.cluster.server_answers, "the server answers again")

    def kill_run(self) -> None:
        self.runs[-1].process.kill()
        self.runs[-1].process.wait()
        self.start_run()

    def fill_disk(self) -> None:
        self.cluster.fill_disks()
        time.sleep(self.rng.uniform(1, 4))
        self.cluster.empty_disks()

    def num_done(self) -> int:
        folder = self.output / "done"
        return sum(1 for _ in folder.glob("*.json")) if folder.exists() else 0

    def note_memory(self, num_done: int) -> None:
        processes = {name: process.pid for name, process in self.cluster.processes.items()}
        self.memory.note("coordinator", self.runs[-1].process.pid, num_done)
        for name, pid in processes.items():
            if name in {"scheduler", "server"}:
                self.memory.note(name, pid, num_done)
            else:
                for worker in worker_processes(pid):
                    self.memory.note(name.replace("-", " "), worker, num_done)


def prompts(num_clips: int, rng: random.Random) -> list[str]:
    """Mostly clips of about half a second, and a few of every kind that misbehaves."""
    return [
        f"{rng.choice(MISBEHAVING)} {number}" if rng.random() < SHARE_MISBEHAVING else CALM
        for number in range(num_clips)
    ]


def table(soak: Soak, given: list[str], seconds: float) -> tuple[list[tuple[str, object]], bool]:
    """What happened, in lines, and whether it is what had to happen."""
    clips = done_clips(soak.output)
    rows = soak.runs[-1].rows()
    poison = {f"clip-{number}" for number, prompt in enumerate(given) if prompt.startswith("poison")}
    failed = {clip for clip, row in rows.items() if row["status"] == "failed"}
    attempts = [attempt for of_clip in attempts_of(soak.output).values() for attempt in of_clip]
    hits = Counter(hit for record in clips.values() for hit in metrics_of(soak.output, record).cache_hits)
    lines: list[tuple[str, object]] = [("clips", len(given)), ("seconds", round(seconds))]
    lines += [("fault: " + name, count) for name, count in sorted(soak.done.items())]
    lines += [
        ("runs of the manifest", len(soak.runs)),
        ("published once and whole", len(clips)),
        ("failed rows", len(failed)),
        ("of them poison", f"{len(failed & poison)} of {len(poison)}"),
        ("starts", len(attempts)),
        ("starts that came to a GPU", num_computed(soak.output)),
        ("renders per published clip", round(num_computed(soak.output) / max(1, len(clips)), 3)),
        ("starts without an end", sum(attempt.outcome is None for attempt in attempts)),
        ("model loads", soak.cluster.model_loads()),
        ("encodings reused", sum(hits.values())),
    ]
    lines += [
        (
            f"failed: {clip}, {given[int(clip.split('-')[1])]}",
            f"{rows[clip]['error_class']}: {rows[clip]['message']}",
        )
        for clip in sorted(failed)
    ]
    lines += [("outcome: " + name, count) for name, count in Counter(a.outcome or "none" for a in attempts).items()]
    growths = sorted(soak.memory.growths(), key=lambda growth: growth.role)
    judged = [growth for growth in growths if growth.role.split()[0] in JUDGED]
    lines += [(f"memory of {growth.role}", growth) for growth in growths]
    grown = ", ".join(growth.role for growth in judged if not growth.is_flat)
    lines.append(("memory, verdict", f"grew by more than 2 %: {grown}" if grown else f"{len(judged)} processes flat"))
    told = {clip for clip, row in rows.items() if row["status"] in {"rendered", "skipped"}} == set(clips)
    nothing_lost = told and len(rows) == len(given) and set(clips) | failed == set(rows)
    lines.append(("clips, verdict", "nothing lost" if nothing_lost else "SOMETHING IS WRONG"))
    return lines, nothing_lost and bool(judged) and not grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between two faults, on average")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    given = prompts(arguments.clips, rng) + [CALM] * round(CALM_SHARE * arguments.clips)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        root = Path(name)
        cluster = Cluster(root / "cluster")
        try:
            cluster.start()
            memory = MemoryLog(warm_up_clips=round(WARM_UP_SHARE * arguments.clips))
            soak = Soak(cluster, write_clips(root, given), root / "out", rng, arguments.clips, memory)
            start = time.monotonic()
            run = soak.go(arguments.pause)
            lines, good = table(soak, given, time.monotonic() - start)
            lines.append(("last line", run.last_line()))
        except BaseException:
            sys.stdout.write("\n".join(path.read_text()[-4000:] for path in root.glob("run-*.log")))
            raise
        finally:
            cluster.stop()
    width = max(len(name) for name, _ in lines)
    sys.stdout.write("\n".join(f"{name:<{width}}  {value}" for name, value in lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
