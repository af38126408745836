"""Which checkpoint a run uses, known before a GPU is: its place, its name and the fingerprint in every clip's key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scail.config import LoraFile, Quantization
from scail.errors import CheckpointError
from scail.fingerprint import (
    check_folder,
    checkpoint_fingerprint,
    fingerprint_of,
    read_loras,
    read_model_config,
    read_notice,
    read_quantization,
)
from tasks.checkpoint_cache import Arrival, fetch_descriptions, is_remote
from tasks.errors import RefusedError
from tasks.settings import Settings
from tasks.storage import StorageError

MINIATURE = Path(__file__).parent.parent / "scail" / "mini" / "checkpoint"


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint folder as planning sees it.

    Attributes:
        path: The folder, or its URI.
        name: Of the model, from its index.
        fingerprint: Of its files.
        notice: What a viewer of the clips must know, such as that the weights are random; else empty.
        quantization: How the transformer's weights are stored.
        loras: That are in the weights, or are fused into them while they are loaded; each as name and strength.
    """

    path: str
    name: str
    fingerprint: str
    notice: str
    quantization: Quantization = "none"
    loras: tuple[str, ...] = ()


def inspect_checkpoint(path: str, loras: Sequence[LoraFile] | None = None) -> CheckpointInfo:
    """Look at a checkpoint folder, and at the LoRAs that are to be fused into it, without loading either.

    Args:
        path: The folder, or its URI: then only its records are read.
        loras: Those of the settings if absent.

    Raises:
        RefusedError: With one line for each thing that is wrong with it.
    """
    settings = Settings()
    loras = settings.loras() if loras is None else loras
    folder, record, problems = Path(path), None, []
    if is_remote(path):
        try:
            folder, record = fetch_descriptions(path, settings.cache_dir, policy=settings.storage_policy())
        except (CheckpointError, StorageError) as error:
            raise RefusedError(f"checkpoint {path} cannot be used: {error}") from error
    else:
        problems += check_folder(folder)
    problems += [f"LoRA {lora.path} is not a file" for lora in loras if not Path(lora.path).is_file()]
    if not problems and loras and (stored := read_quantization(folder)) != "none":
        problems.append(f"it is quantised ({stored}) and takes no LoRA; fuse it before: scail convert --lora")
    if problems:
        raise RefusedError(f"checkpoint {path} cannot be used", problems)
    fingerprint = checkpoint_fingerprint(folder) if record is None else fingerprint_of(record)
    return CheckpointInfo(
        path=path if is_remote(path) else str(folder),
        name=read_model_config(folder).name,
        fingerprint=with_loras(fingerprint, loras),
        notice=read_notice(folder),
        quantization=read_quantization(folder),
        loras=(*read_loras(folder), *(lora.name for lora in loras)),
    )


def model_fingerprint(folder: Path, loras: Sequence[LoraFile]) -> str:
    """The checkpoint's fingerprint, and another one for each way to fuse LoRAs into it.

    Raises:
        CheckpointError: If the folder is not a checkpoint or a LoRA is not there.
    """
    return with_loras(checkpoint_fingerprint(folder), loras)


def with_loras(fingerprint: str, loras: Sequence[LoraFile]) -> str:
    """A checkpoint's fingerprint once LoRAs are fused into it."""
    if not loras:
        return fingerprint
    lines = [f"{_file_hash(Path(lora.path))}:{lora.strength:g}" for lora in loras]
    return hashlib.sha256("\n".join((fingerprint, *lines)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that can be loaded.

    Attributes:
        folder: On this machine.
        fingerprint: Of its files and the LoRAs.
        wait_for: To be called with a component's folder before its weights are read.
    """

    folder: Path
    fingerprint: str
    wait_for: Callable[[str], None]


@contextmanager
def opened(path: str, loras: Sequence[LoraFile], settings: Settings) -> Iterator[OpenCheckpoint]:
    """A checkpoint that is here, or one in a bucket, which is fetched, once, while it is loaded.

    Raises:
        CheckpointError: If there is no checkpoint, or a LoRA is not there.
        StorageError: If it cannot be fetched.
    """
    if not is_remote(path):
        yield OpenCheckpoint(Path(path), model_fingerprint(Path(path), loras), lambda _folder: None)
        return
    with Arrival(path, settings.cache_dir, policy=settings.storage_policy()) as arrival:
        fingerprint = with_loras(fingerprint_of(arrival.record), loras)
        yield OpenCheckpoint(arrival.folder, fingerprint, arrival.wait_for)


def _file_hash(path: Path) -> str:
    try:
        stat = path.stat()
        return _hash_of_version(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"LoRA {path} cannot be read: {error}") from error


@cache
def _hash_of_version(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def miniature() -> Path | None:
    """The trained checkpoint that comes with the program, if it does."""
    return None if check_folder(MINIATURE) else MINIATURE
