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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share a cluster or a Prefect server stay in one process of `pytest -n 2 --dist loadgroup`."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            folder = item.path.relative_to(TESTS).parts[0]
            group = folder if folder in SHARING_FOLDERS else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
