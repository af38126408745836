"""A PostgreSQL of Debian's on loopback, with its data in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.harness import free_port, wait_until

USER = "postgres"


def find_binaries() -> Path | None:
    """Debian keeps them out of the PATH, a folder for each version."""
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    return max((folder for folder in folders if (folder / "initdb").exists()), default=None, key=_version)


@contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of an empty database, as SQLAlchemy writes it; the server ends with the context."""
    binaries, port = find_binaries(), free_port()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="scail-postgres-"))
    user = USER if os.geteuid() == 0 else None  # it refuses to be run by root
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    try:
        initdb = [binaries / "initdb", "--pgdata", folder / "data", "--username", USER, "--auth", "trust", "--no-sync"]
        subprocess.run(initdb, user=user, cwd=folder, check=True, capture_output=True, timeout=120)
        command = [binaries / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen([*command, "-F"], user=user, cwd=folder, stdout=log, stderr=log)
        try:
            ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
            wait_until(lambda: _succeeds(ready), "PostgreSQL answers", 60)
            yield f"postgresql+asyncpg://{USER}@127.0.0.1:{port}/{USER}"
        finally:
            server.terminate()
            server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _succeeds(command: list[object]) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _version(folder: Path) -> float:
    return float(folder.parent.name)
