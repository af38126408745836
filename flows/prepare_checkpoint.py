"""Original weight files → our checkpoint folder, once for each machine or shared volume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scail.errors import CheckpointError
from tasks.checkpoint import inspect_checkpoint
from tasks.errors import RefusedError


def prepare_checkpoint(source: Path, dest: Path, *, say: Callable[[str], None]) -> None:
    """Convert, then look at the result as a run would.

    Raises:
        RefusedError: If the source is incomplete, damaged or of another model; `dest` is then not there.
    """
    from scail.conversion import convert

    try:
        convert(source, dest, on_progress=say)
    except CheckpointError as error:
        raise RefusedError(str(error)) from error
    model = inspect_checkpoint(str(dest))
    say(f"{model.name}, fingerprint {model.fingerprint}")
