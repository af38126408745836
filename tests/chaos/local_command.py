"""`scail` with clips that obey tests/chaos/faults.py although they are rendered in its own process."""

from __future__ import annotations

from flows.cli import main
from tests.chaos.faults import patch_pipeline

if __name__ == "__main__":
    patch_pipeline()
    main()
