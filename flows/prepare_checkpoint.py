"""Original weight files → our checkpoint folder, once for each machine or shared volume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scail.errors import ScailError
from tasks.checkpoint import CheckpointInfo, inspect_checkpoint
from tasks.errors import RefusedError

GB = 1000**3


def prepare_checkpoint(
    source: Path,
    dest: Path,
    *,
    say: Callable[[str], None],
    transformer_heads: int | None = None,
    image_heads: int | None = None,
) -> CheckpointInfo:
    """Convert, then look at the result as a run would.

    Args:
        source: The official folder, the `wan` layout, Wan2GP's or ComfyUI's files.
        dest: The checkpoint folder; it must not exist or be empty.
        say: Takes a line for each file that was written, and which source file was taken for what.
        transformer_heads, image_heads: Of models of other sizes than SCAIL-14B's; no tensor's shape tells them.

    Raises:
        RefusedError: If the source is incomplete, damaged or of another model; `dest` is then not there.
    """
    from scail.conversion import Heads, convert

    def report(component: str, num_bytes: int, total_bytes: int) -> None:
        say(f"{component}: {num_bytes / GB:.1f} of {total_bytes / GB:.1f} GB")

    try:
        conversion = convert(source, dest, heads=Heads(transformer_heads, image_heads), on_progress=report)
    except ScailError as error:
        raise RefusedError(str(error)) from error
    for component, source_file in conversion.taken.items():
        say(f"{component} ← {source_file}")
    for path in conversion.unrecognised:
        say(f"not used: {path}")
    return inspect_checkpoint(str(dest))
