"""Options and fixtures that more than one folder of tests uses, and how `make test` shares the tests out."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Tests that share what takes long to start, a cluster or a Prefect server, stay in one process. There are three
# clusters, and two servers: tests that wait for something to die or to come back may do so beside one another.
SHARING = {
    "chaos/test_faults.py": "the first cluster",
    "chaos/test_unattended.py": "the second cluster",
    "chaos": "the third cluster",
    "flows/test_deployments.py": "the second server",
    "flows/test_watch_inbox.py": "the second server",
    "flows": "the first server",
}
COMPUTING_NICENESS = 10
BESIDE_CHAOS = pytest.StashKey[bool]()  # whether this run kills real processes, too

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; as `scail` does, and for its reason
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are more processes than cores
    gc.set_threshold(20_000)  # what is imported stays; see tasks/thrift.py
    # Hundreds of processes import the program, and each of xdist's every test: they are compiled once.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=TESTS / "golden",
        help="Folder with fixtures recorded from the official code. [default: tests/golden]",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """`pytest -n 4`: tests of a file stay together, and those that share a cluster or a Prefect server do."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class BySharedFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0].removeprefix("tests/")
            return SHARING.get(path) or SHARING.get(path.partition("/")[0]) or path

    return BySharedFixtures(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.stash[BESIDE_CHAOS] = any(item.get_closest_marker("chaos") for item in session.items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Of many processes on few cores those that measure how soon others react go before those that compute."""
    is_shared = "PYTEST_XDIST_WORKER" in os.environ and item.session.stash[BESIDE_CHAOS]
    if is_shared and not item.get_closest_marker("chaos"):
        os.nice(max(0, COMPUTING_NICENESS - os.nice(0)))


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database that has Prefect's tables: making them takes five seconds of a core, copying them none."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home = shared / "prefect-tables"
    with (shared / "prefect-tables.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whichever process comes first makes it
        if not home.exists():
            environment = os.environ | {"PREFECT_HOME": str(home.with_suffix(".part")), "DO_NOT_TRACK": "1"}
            upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            subprocess.run(upgrade, env=environment, check=True, capture_output=True, timeout=120)
            home.with_suffix(".part").rename(home)
    return home / "prefect.db"
