"""compose.yaml without containers: the same commands, environment, secrets, order and health checks, as processes.

What a container would give, its own host name and its own root folder, is put in place of the names in the file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tasks.tls import write_certificates
from tests.chaos.harness import free_port, kill_tree, wait_until

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PROGRAMS = {"scail": [sys.executable, "-m", "flows.cli"], "prefect": [sys.executable, "-m", "prefect"]}


def interpolated(value: Any, variables: dict[str, str]) -> Any:
    """Compose's `${NAME:-default}` and `${NAME:?message}`, which it looks for in what the YAML says."""
    if isinstance(value, dict):
        return {key: interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, variables) for each in value]
    return _interpolated(value, variables) if isinstance(value, str) else value


def _interpolated(text: str, variables: dict[str, str]) -> str:

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if variables.get(name):
            return variables[name]
        assert operator != ":?", f"{name}: {rest}"
        return rest or ""

    return re.sub(r"\$\{([A-Z_]+)(?:(:[-?])([^}]*))?\}", value, text)


@dataclass
class Stack:
    """The services of compose.yaml on this machine.

    Attributes:
        root: For secrets, certificates, logs and whatever containers would keep to themselves.
        variables: What .env would hold.
        database: Port, user and name of a PostgreSQL that stands for the service `postgres`.
        checkpoints: Folder that is mounted at /checkpoints.
    """

    root: Path
    variables: dict[str, str]
    database: tuple[int, str, str]
    checkpoints: Path
    ports: dict[str, int] = field(default_factory=lambda: {"4200": free_port(), "8786": free_port()})
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)  # by each service's last health check

    def __post_init__(self) -> None:
        document = yaml.safe_load((INFRA / "compose.yaml").read_text())
        self.services: dict[str, Any] = interpolated(document["services"], self.variables)
        (self.root / "secrets").mkdir()
        (self.root / "secrets" / "postgres_password").write_text("not asked for on loopback")
        (self.root / "secrets" / "prefect_auth").write_text("scail:secret")
        write_certificates(self.root / "certificates", ["scheduler"])

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['4200']}/api"

    def here(self, text: str) -> str:
        """What a container would call something, as this machine calls it."""
        for port, own in self.ports.items():
            text = re.sub(rf"(?<!\d){port}(?!\d)", str(own), text)
        text = re.sub(r"(?<=//)(server|scheduler)(?=:)|^0\.0\.0\.0$", "127.0.0.1", text)
        text = text.replace("/run/secrets", str(self.root / "secrets"))
        text = re.sub(r"^/certificates", str(self.root / "certificates" / "node"), text)
        return re.sub(r"^/checkpoints", str(self.checkpoints), text)

    def environment(self, name: str) -> dict[str, str]:
        given = {key: self.here(str(value)) for key, value in self.services[name].get("environment", {}).items()}
        if name == "server":
            port, user, database = self.database
            given |= {"PREFECT_SERVER_DATABASE_HOST": "127.0.0.1", "PREFECT_SERVER_DATABASE_PORT": str(port)}
            given |= {"PREFECT_SERVER_DATABASE_USER": user, "PREFECT_SERVER_DATABASE_NAME": database}
        image = {"SCAIL_CACHE_DIR": str(self.root / "cache"), "SCAIL_SCRATCH_DIR": str(self.root / "scratch")}
        image |= {"SCAIL_MIN_FREE_SCRATCH_BYTES": "1000000"}
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PREFECT_HOME": str(self.root / f"home-{name}")}
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "SCAIL_"))}
        return kept | image | own | quiet | given

    def command(self, words: list[str]) -> list[str]:
        program, *rest = (self.here(word) for word in words)
        return [*PROGRAMS[program], *rest]

    def start(self) -> None:
        """Every service after those that it waits for."""
        waiting = [name for name in self.services if name != "postgres" and "profiles" not in self.services[name]]
        ready = {"postgres"}
        while waiting:
            name = next(name for name in waiting if set(self.services[name].get("depends_on", {})) <= ready)
            for other, condition in self.services[name].get("depends_on", {}).items():
                self.wait_for(other, condition["condition"])
            self.start_one(name)
            waiting.remove(name)
            ready.add(name)
        for name in ("worker", "coordinator"):
            self.wait_for(name, "service_healthy")

    def start_one(self, name: str) -> None:
        command = ["sh", str(INFRA / "entrypoint.sh"), *self.command(self.services[name]["command"])]
        with (self.root / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment(name), cwd=self.root, stdout=log, stderr=log
            )

    def wait_for(self, name: str, condition: str) -> None:
        if name == "postgres":
            return
        if condition == "service_completed_successfully":
            assert self.processes[name].wait(120) == 0, self.log(name)
        else:
            try:
                wait_until(lambda: self.is_healthy(name), f"{name} is healthy", 150)
            except AssertionError as error:
                raise AssertionError(f"{error}: {self.said[name]}\n{self.log(name)}") from error

    def is_healthy(self, name: str) -> bool:
        assert self.processes[name].poll() is None, self.log(name)
        time.sleep(1)  # a check takes seconds of a core that what it asks about needs to start
        test = self.command(self.services[name]["healthcheck"]["test"][1:])
        done = subprocess.run(test, env=self.environment(name), check=False, capture_output=True, text=True)
        self.said[name] = done.stdout + done.stderr
        return done.returncode == 0

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()[-3000:]

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            kill_tree(process)


@contextmanager
def running_stack(
    root: Path, *, variables: dict[str, str], database: tuple[int, str, str], checkpoints: Path
) -> Iterator[Stack]:
    stack = Stack(root, variables, database, checkpoints)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
