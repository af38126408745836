"""Options and fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHARING_FOLDERS = {"chaos", "flows"}  # with fixtures of the whole session that take long to start

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; as `scail` does, and for its reason


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=TESTS / "golden",
        help="Folder with fixtures recorded from the official code. [default: tests/golden]",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """`pytest -n 2`: tests of a file stay together, and those that share a cluster or a Prefect server do."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class BySharedFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return next((folder for folder in SHARING_FOLDERS if folder in path.split("/")), path)

    return BySharedFixtures(config, log)
