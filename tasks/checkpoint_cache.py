"""Checkpoints in a bucket: planned from their records, fetched once to this machine.

`files.json` of a checkpoint folder names every file with its size, time and SHA-256. Planning reads that and the
configurations, a few kilobytes; a worker fetches the rest, several files at once, each checked against its hash, and
keeps them. When the folder in the bucket has changed, what changed is fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from scail.errors import CheckpointError
from scail.fingerprint import HASHES
from tasks import storage
from tasks.storage import DamagedError, NotFoundError, StorageError, StoragePolicy
from tasks.uris import scheme_of

logger = logging.getLogger(__name__)

NUM_THREADS = 8
_MAX_FILE_BYTES = 1024**4  # not a clip's input: a text encoder's embedding alone has 2 GB

Record = dict[str, dict[str, Any]]


def is_remote(checkpoint: str) -> bool:
    """Whether a checkpoint is not on this machine."""
    return scheme_of(checkpoint) != "file"


def absolute(checkpoint: str) -> str:
    """The same checkpoint, named so that a process in another folder finds it."""
    return checkpoint if is_remote(checkpoint) else str(Path(checkpoint).absolute())


def fetch_descriptions(uri: str, cache_dir: Path, *, policy: StoragePolicy) -> tuple[Path, Record]:
    """What planning needs of a checkpoint: its configurations, without the weights.

    Args:
        uri: The checkpoint's folder.
        cache_dir: Where checkpoints are kept on this machine.
        policy: What storage may be asked for.

    Returns:
        The folder on this machine and the files' record.

    Raises:
        CheckpointError: If the folder is not a checkpoint, or was written before such records were.
        StorageError: If storage cannot be asked.
    """
    folder, record = _local_folder(uri, cache_dir), _read_record(uri, policy)
    small = {name: entry for name, entry in record.items() if name.endswith(".json")}
    with _locked(folder):
        _fetch(uri, folder, small, policy)
    return folder, record


def fetch_checkpoint(uri: str, cache_dir: Path, *, policy: StoragePolicy) -> Path:
    """The checkpoint's folder on this machine, whole; a second call asks for its record only.

    Args:
        uri: The checkpoint's folder.
        cache_dir: Where checkpoints are kept on this machine.
        policy: What storage may be asked for.

    Raises:
        CheckpointError: If the folder is not a checkpoint, or was written before such records were.
        StorageError: If storage cannot be asked, or a file is not what its record says.
    """
    folder, record = _local_folder(uri, cache_dir), _read_record(uri, policy)
    start = time.perf_counter()
    with _locked(folder):
        num_bytes = _fetch(uri, folder, record, policy)
        (folder / HASHES).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if num_bytes:
        seconds = time.perf_counter() - start
        logger.info("fetched %.1f GB of %s in %.0f s", num_bytes / 1e9, storage.redact(uri), seconds)
    return folder


def _local_folder(uri: str, cache_dir: Path) -> Path:
    digest = hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:12]
    return cache_dir / "checkpoints" / f"{storage.name(uri.rstrip('/'))}-{digest}"


def _read_record(uri: str, policy: StoragePolicy) -> Record:
    try:
        record = json.loads(storage.read_bytes(storage.join(uri, HASHES), policy=policy))
        for name, entry in record.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not {"size", "mtime_ns", "sha256"} <= entry.keys():
                raise CheckpointError(f"{storage.redact(uri)}: {HASHES} names {name!r}, which no checkpoint holds.")
    except NotFoundError as error:
        raise CheckpointError(
            f"{storage.redact(uri)} has no {HASHES}; expected a folder that `scail convert` wrote, all of it."
        ) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{storage.redact(uri)}: {HASHES} cannot be read: {error}") from error
    return dict(record)


def _fetch(uri: str, folder: Path, record: Record, policy: StoragePolicy) -> int:
    """Bring the files that are not here as recorded; returns how many bytes those were."""
    policy = replace(policy, max_download_bytes=_MAX_FILE_BYTES)
    wanted = [(name, entry) for name, entry in record.items() if not _is_here(folder / name, entry)]

    def fetch(item: tuple[str, dict[str, Any]]) -> None:
        name, entry = item
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.download(storage.join(uri, name), path, policy=policy)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry["sha256"]:
            path.unlink()
            raise DamagedError(f"{storage.redact(uri)}/{name} is not the file that {HASHES} describes")
        os.utime(path, ns=(entry["mtime_ns"], entry["mtime_ns"]))  # so that nobody has to hash it again

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in pool.map(fetch, sorted(wanted, key=lambda item: -int(item[1]["size"]))):
            pass
    return sum(int(entry["size"]) for _, entry in wanted)


def _is_here(path: Path, entry: dict[str, Any]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time fetches a checkpoint; the others find it done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error
