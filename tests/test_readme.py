"""The README says what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tree_in_the_readme_names_every_source_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {f"{name}/" for name in ("kernels", "pose", "mini")}  # described as a whole

    missing = [
        str(path.relative_to(ROOT))
        for top in ("flows", "tasks", "scail")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py" and f"{path.parent.name}/" not in folders and path.name not in tree
    ]

    assert not missing


def test_every_file_that_the_documents_link_to_is_there():
    for document in [
        ROOT / "README.md",
        ROOT / "manifests" / "README.md",
        ROOT / "infra" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_test_is_run_by_one_of_two_commands_and_both_are_in_ci():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    marked = [path for path in (ROOT / "tests").rglob("*.py") if "mark." + "chaos" in path.read_text(encoding="utf-8")]
    selections = dict(re.findall(r"^(\w+): setup\n\t\S+ -m pytest .*-m (\S.*)$", makefile, re.MULTILINE))

    assert selections == {"test": '"not chaos"', "chaos": "chaos"}
    assert re.search(r"pytest tests/chaos .*-m chaos", makefile)
    assert not [path for path in marked if path.parent != ROOT / "tests" / "chaos"]
    assert re.findall(r"^make (\w+)", ci, re.MULTILINE) == ["lint", "test", "chaos", "demo"]
