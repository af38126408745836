"""Collects one test for each fixture in the folder given by --golden-dir, and prints what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

PATTERNS = ("*.safetensors", "*.npz", "text_clean*.json")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" not in metafunc.fixturenames:
        return
    folder: Path = metafunc.config.getoption("--golden-dir")
    files = sorted(path for pattern in PATTERNS for path in folder.glob(pattern))
    if not files:
        raise pytest.UsageError(f"--golden-dir {folder} has no fixtures ({', '.join(PATTERNS)})")
    metafunc.parametrize("golden_file", files, ids=[path.name for path in files])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = {
        getattr(report, "nodeid", ""): [value for name, value in report.user_properties if name == "golden"]
        for report in reports
        if getattr(report, "when", "") == "call"
    }
    if any(lines.values()):
        terminalreporter.section("largest error of each golden case")
        for measured in lines.values():
            for line in measured:
                terminalreporter.line(line)
