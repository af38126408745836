"""Which module may import what: flows → tasks → scail, and a process that only plans starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scail

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "gcsfs"}
REMOTE_BYTES = {"fsspec", "gcsfs", "s3fs"}
ORCHESTRATION = {"prefect", "prefect_dask", "dask", "distributed"}
STORAGE_MODULES = frozenset(
    {"storage.py", "object_store.py", "google_store.py", "amazon_store.py", "local_files.py", "https_input.py"}
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module names, wherever in it: lazily, for types, by `import_module` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (ast.unparse(argument).strip("'\"").split(".")[0] for argument in node.args)


def offenders(package: str, banned: set[str], *, besides: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """What each module of a package imports of what it must not."""
    found = {
        str(path.relative_to(ROOT)): banned & set(imported_packages(ast.parse(path.read_text(encoding="utf-8"))))
        for path in sources(package)
        if path.name not in besides
    }
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "code",
    [
        "import fsspec",
        "import fsspec.core as c",
        "from fsspec.core import url_to_fs",
        "def f():\n    import fsspec",
        "if TYPE_CHECKING:\n    from fsspec import AbstractFileSystem",
        "importlib.import_module('fsspec.core')",
    ],
)
def test_an_import_is_seen_wherever_it_stands(code):
    assert "fsspec" in set(imported_packages(ast.parse(code)))


@pytest.mark.parametrize("package", ["scail", "tasks", "flows"])
def test_there_are_sources_to_look_at(package):
    assert len(sources(package)) > 3


def test_scail_knows_no_orchestration_no_storage_and_no_layer_above_it():
    assert offenders("scail", ORCHESTRATION | REMOTE_BYTES | {"tasks", "flows"}) == {}


def test_tasks_know_no_flow():
    assert offenders("tasks", {"flows"}) == {}


def test_flows_touch_neither_tensors_nor_remote_bytes():
    assert offenders("flows", REMOTE_BYTES | HEAVY) == {}


def test_remote_bytes_are_the_storages_alone():
    assert offenders("tasks", REMOTE_BYTES, besides=STORAGE_MODULES) == {}


@pytest.mark.parametrize(
    "module", ["scail", "scail.config", "scail.errors", "scail.types", "tasks.plan", "tasks.manifest", "flows.cli"]
)
def test_a_process_that_only_plans_starts_light(module):
    code = f"import sys, {module}; print(*(name for name in {sorted(HEAVY)} if name in sys.modules))"

    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )

    assert completed.stdout.split() == []


def test_the_pipeline_is_there_when_it_is_asked_for():
    from scail.pipeline import ScailPipeline

    assert scail.ScailPipeline is ScailPipeline


def test_every_public_name_exists():
    assert all(hasattr(scail, name) for name in scail.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ScialPipeline'"):
        _ = scail.ScialPipeline
