"""Original weight files → our checkpoint folder, once for each machine or shared volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast, get_args

from scail.config import LoraFile, Quantization
from scail.errors import ScailError
from scail.fingerprint import is_checkpoint
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
    quantization: str = "none",
    loras: Sequence[LoraFile] = (),
) -> CheckpointInfo:
    """Convert, then look at the result as a run would.

    Args:
        source: The official folder, the `wan` layout, Wan2GP's or ComfyUI's files; or a folder of ours, of which
            another one is made.
        dest: The checkpoint folder; it must not exist or be empty.
        say: Takes a line for each file that was written, and which source file was taken for what.
        quantization: Of the transformer's matrix products: `none`, `fp8` or `int8`.
        loras: Fused into the transformer before that.
        transformer_heads, image_heads: Of models of other sizes than SCAIL-14B's; no tensor's shape tells them.

    Raises:
        RefusedError: If the source is incomplete, damaged or of another model, or cannot be quantised as asked; `dest`
            is then not there.
    """
    from scail.conversion import Heads, convert
    from scail.rewriting import rewrite

    if quantization not in get_args(Quantization):
        raise RefusedError(f"--quantize is {quantization!r}; expected one of {', '.join(get_args(Quantization))}")
    wanted = cast(Quantization, quantization)

    def report(component: str, num_bytes: int, total_bytes: int) -> None:
        say(f"{component}: {num_bytes / GB:.1f} of {total_bytes / GB:.1f} GB")

    try:
        if is_checkpoint(source):
            rewrite(source, dest, quantization=wanted, loras=loras, on_progress=report)
            return inspect_checkpoint(str(dest), loras=())
        conversion = convert(
            source,
            dest,
            heads=Heads(transformer_heads, image_heads),
            quantization=wanted,
            loras=loras,
            on_progress=report,
        )
    except ScailError as error:
        raise RefusedError(str(error)) from error
    for component, source_file in conversion.taken.items():
        say(f"{component} ← {source_file}")
    for path in conversion.unrecognised:
        say(f"not used: {path}")
    return inspect_checkpoint(str(dest), loras=())
