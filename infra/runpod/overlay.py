"""Makes an environment that has the runpod package and, below it, everything of the one that runs this.

    python infra/runpod/overlay.py DIR

The package brings fifty others, some of which change how every HTTP client of a process works (uvloop, aiodns). The
serverless image has them; the program's own tests should not, so they are kept apart and cost no second torch.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_overlay(folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    below = sysconfig.get_path("purelib")
    (own / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wanted = [
        "install",
        "--constraint",
        str(ROOT / "constraints.txt"),
        "runpod>=1.12",
        "setuptools>=77",
    ]  # torch wants it
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "check"], check=True)


if __name__ == "__main__":
    make_overlay(Path(sys.argv[1]).absolute())
