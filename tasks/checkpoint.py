"""Which checkpoint a run uses, known before a GPU is: its place, its name and the fingerprint in every clip's key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scail.fingerprint import check_folder, checkpoint_fingerprint, read_model_config, read_notice
from tasks.errors import RefusedError

MINIATURE = Path(__file__).parent.parent / "scail" / "mini" / "checkpoint"


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint folder as planning sees it.

    Attributes:
        path: The folder.
        name: Of the model, from its index.
        fingerprint: Of its files.
        notice: What a viewer of the clips must know, such as that the weights are random; else empty.
    """

    path: str
    name: str
    fingerprint: str
    notice: str


def inspect_checkpoint(path: str) -> CheckpointInfo:
    """Look at a checkpoint folder without loading it.

    Raises:
        RefusedError: With one line for each thing that is wrong with it.
    """
    folder = Path(path)
    if problems := check_folder(folder):
        raise RefusedError(f"checkpoint {path} cannot be used", problems)
    name = read_model_config(folder).name
    return CheckpointInfo(str(folder), name, checkpoint_fingerprint(folder), read_notice(folder))


def miniature() -> Path | None:
    """The trained checkpoint that comes with the program, if it does."""
    return None if check_folder(MINIATURE) else MINIATURE


def write_demo_checkpoint(folder: Path) -> None:
    """SCAIL_TINY with random weights in the real layout, if the folder does not hold it yet."""
    from scail.checkpoint import write_random_checkpoint
    from scail.config import SCAIL_TINY

    if check_folder(folder):
        write_random_checkpoint(folder, SCAIL_TINY, seed=0)
