"""`scail`, in a process that obeys the switches of tests/chaos/faults.py."""

from __future__ import annotations

from flows.cli import main
from tests.chaos.faults import patch_storage

if __name__ == "__main__":
    patch_storage()
    main()
