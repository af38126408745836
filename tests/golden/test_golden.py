"""Ours against the official code, on every fixture of a folder: `pytest tests/golden --golden-dir DIR`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.golden.checks_model import check_safetensors, check_text_clean
from tests.golden.checks_pose import check_npz
from tests.golden.measure import Measured

BY_SUFFIX: dict[str, Callable[[Path], Iterable[Measured]]] = {
    ".safetensors": check_safetensors,
    ".json": check_text_clean,
    ".npz": check_npz,
}


def test_ours_equals_the_official_code(golden_file: Path, record_property: Callable[[str, object], None]):
    measured = list(BY_SUFFIX[golden_file.suffix](golden_file))

    for worst in largest_by_case(measured):
        record_property("golden", f"{golden_file.name:<40} {worst}")
    assert measured, f"{golden_file.name} has no case"
    assert not (failed := [str(entry) for entry in measured if not entry.passes]), "\n".join(failed)


def largest_by_case(measured: Iterable[Measured]) -> list[Measured]:
    """Of each case the measurement that comes closest to its limit, or passes it by most."""
    worst: dict[str, Measured] = {}
    for entry in measured:
        if entry.case not in worst or _strain(entry) > _strain(worst[entry.case]):
            worst[entry.case] = entry
    return list(worst.values())


def _strain(entry: Measured) -> float:
    return entry.error / entry.limit if entry.limit > 0 else entry.error - entry.limit


def test_a_fixture_of_an_unknown_kind_fails(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "new.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"meta": '{"kind": "something new", "cases": []}'})

    with pytest.raises(pytest.fail.Exception, match="something new"):
        list(check_safetensors(path))
