"""Checks Terraform files where Terraform itself cannot be run: syntax, references, formatting.

    python infra/terraform/check.py infra/terraform

Not checked are types and what the provider knows; `terraform validate` and `terraform plan` need the provider.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2

FORMATTER = Path(__file__).parent / "fmt"
REFERENCE = re.compile(r"(?<![\w.\"-])(var|local|data\.google_\w+|google_\w+)\.([a-z_][\w]*)")
DECLARED_BY = {"variable": "var", "resource": "", "data": "data."}


def check(folder: Path) -> list[str]:
    """What is wrong, one line each."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.tf"))}
    problems, declared = [], set[str]()
    for path, text in texts.items():
        try:
            declared |= set(declarations(hcl2.loads(text)))
        except Exception as error:  # noqa: BLE001  the parser raises whatever its own library does
            problems.append(f"{path}: {' '.join(str(error).split())}")
    for path, text in texts.items():
        problems += [f"{path}: {name} is declared nowhere" for name in sorted(references(text) - declared)]
    return problems


def declarations(document: dict[str, Any]) -> Iterator[str]:
    """Every name that a file declares, as others refer to it."""
    for block in document.get("locals", []):
        yield from (f"local.{name}" for name in block if not name.startswith("__"))
    for block in document.get("variable", []):
        yield from (f"var.{bare(name)}" for name in block)
    for kind in ("resource", "data"):
        for block in document.get(kind, []):
            yield from (f"{DECLARED_BY[kind]}{bare(type_)}.{bare(name)}" for type_ in block for name in block[type_])


def bare(name: str) -> str:
    return name.strip('"')


def references(text: str) -> set[str]:
    """Every name that a file refers to."""
    without_comments = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    return {".".join(match) for match in REFERENCE.findall(without_comments)}


def format_problems(folder: Path) -> str | None:
    """What terraform's formatter, or the library inside it, would change; None if neither is there."""
    if terraform := shutil.which("terraform") or shutil.which("tofu"):
        command = [terraform, "fmt", "-check", "-recursive", str(folder)]
    elif (node := shutil.which("node")) and (npm := shutil.which("npm")):
        if not (FORMATTER / "node_modules").exists():
            subprocess.run([npm, "ci", "--silent", "--no-audit", "--no-fund"], cwd=FORMATTER, check=True)
        files = [str(path) for pattern in ("*.tf", "*.tfvars") for path in sorted(folder.glob(pattern))]
        command = [node, str(FORMATTER / "format.js"), "--check", *files]
    else:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip() if done.returncode else ""


def main(folder: Path) -> int:
    problems = check(folder)
    formatting = format_problems(folder)
    lines = problems + (formatting.splitlines() if formatting else [])
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if formatting is None:
        sys.stdout.write("formatting was not checked: neither terraform nor node is on this machine\n")
    sys.stdout.write(f"{folder}: {len(lines)} problems; `terraform validate` and `plan` are not run here\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
