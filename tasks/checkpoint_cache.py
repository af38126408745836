"""Checkpoints in a bucket: planned from their records, fetched once to this machine.

`files.json` of a checkpoint folder names every file with its size, time and SHA-256. Planning reads that and the
configurations, a few kilobytes; a worker fetches the rest, several files at once, each checked against its hash, and
keeps them. Whoever loads need not wait for all: a network is loaded while the next one's files arrive. When the folder
in the bucket has changed, what changed is fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from scail.errors import CheckpointError
from scail.fingerprint import HASHES, LOADING_ORDER
from tasks import storage
from tasks.storage import DamagedError, NotFoundError, StorageError, StoragePolicy
from tasks.uris import scheme_of

logger = logging.getLogger(__name__)

NUM_THREADS = 8
_LOOK_SECONDS = 0.2  # while another process fetches
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
    with _writing(folder):  # beside whoever has the lock: each file comes whole, from whomever
        _fetch(uri, folder, small, policy)
    return folder, record


class Arrival:
    """A checkpoint on its way to this machine: what has come can be used while the rest is fetched. Use it in a `with`.

    Inside, everything but the weights is there. A failure inside lets the files that were begun come to their end and
    begins no other; what has come stays for the next time.

    Attributes:
        folder: On this machine.
        record: Of the files, as the folder's `files.json` has it.
    """

    def __init__(self, uri: str, cache_dir: Path, *, policy: StoragePolicy) -> None:
        """Ask for the record.

        Raises:
            CheckpointError: If the folder is not a checkpoint, or was written before such records were.
            StorageError: If storage cannot be asked.
        """
        self.folder, self.record = _local_folder(uri, cache_dir), _read_record(uri, policy)
        self._uri, self._policy = uri, policy
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch-checkpoint")
        self._changed = threading.Condition()
        self._here: set[str] = set()
        self._stop = threading.Event()

    def wait_for(self, folder: str) -> None:
        """Return when the files below a folder of the checkpoint are there.

        Raises:
            StorageError: If one of them cannot be fetched, or is not what its record says.
        """
        self._wait({name for name in self.record if PurePosixPath(name).is_relative_to(folder)})

    def __enter__(self) -> Self:
        self._fetching = self._pool.submit(self._fetch_all)
        self._fetching.add_done_callback(lambda _: self._announce())
        self._wait({name for name in self.record if not _is_weights(name)})
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure:
            self._stop.set()
        self._pool.shutdown()
        if not failure:
            self._fetching.result()

    def _wait(self, names: set[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: names <= self._here or self._fetching.done())
        if not names <= self._here:
            self._fetching.result()

    def _announce(self, name: str | None = None) -> None:
        with self._changed:
            self._here |= {name} if name else set()
            self._changed.notify_all()

    def _look(self) -> None:
        """What another process of this machine has brought."""
        if self._stop.is_set():
            raise CheckpointError(f"{storage.redact(self._uri)} is not waited for any longer.")
        for name in self.record.keys() - self._here:
            if _is_here(self.folder / name, self.record[name]):
                self._announce(name)

    def _fetch_all(self) -> None:
        start = time.perf_counter()
        with _locked(self.folder, meanwhile=self._look):
            num_bytes = _fetch(self._uri, self.folder, self.record, self._policy, self._announce, self._stop)
            if not self._stop.is_set():
                (self.folder / HASHES).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
        if num_bytes:
            seconds = time.perf_counter() - start
            logger.info("fetched %.1f GB of %s in %.0f s", num_bytes / 1e9, storage.redact(self._uri), seconds)


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


def _fetch(
    uri: str,
    folder: Path,
    record: Record,
    policy: StoragePolicy,
    announce: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Bring the files that are not here as recorded, in the order in which they are loaded.

    Args:
        uri: Where they are.
        folder: Where they go.
        record: Of those that are wanted.
        policy: What storage may be asked for.
        announce: Told of each file that is here.
        stop: Once it is set, no other file is begun.

    Returns:
        How many bytes had to be fetched.
    """
    policy = replace(policy, max_download_bytes=_MAX_FILE_BYTES)

    def fetch(item: tuple[str, dict[str, Any]]) -> int:
        name, entry = item
        path = folder / name
        if stop and stop.is_set():
            return 0
        is_here = _is_here(path, entry)
        if not is_here:
            _fetch_file(uri, name, path, entry, policy)
        if announce:
            announce(name)
        return 0 if is_here else int(entry["size"])

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return sum(pool.map(fetch, sorted(record.items(), key=lambda item: (_turn(item[0]), -int(item[1]["size"])))))


def _fetch_file(uri: str, name: str, path: Path, entry: dict[str, Any], policy: StoragePolicy) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.download(storage.join(uri, name), path, policy=policy)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry["sha256"]:
        path.unlink()
        raise DamagedError(f"{storage.redact(uri)}/{name} is not the file that {HASHES} describes")
    os.utime(path, ns=(entry["mtime_ns"], entry["mtime_ns"]))  # so that nobody has to hash it again


def _turn(name: str) -> int:
    """When a file is fetched: descriptions first, then the weights as they are loaded."""
    folders = [component.folder for component in LOADING_ORDER]
    top = PurePosixPath(name).parts[0]
    return 1 + folders.index(top) if _is_weights(name) and top in folders else 0


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _is_here(path: Path, entry: dict[str, Any]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"])


@contextmanager
def _locked(folder: Path, *, meanwhile: Callable[[], None]) -> Iterator[None]:
    """One process of this machine at a time fetches a checkpoint; the others look for its files, or find it done."""
    with _writing(folder), (folder / ".lock").open("w") as file:
        while not _is_mine(file):
            meanwhile()
            time.sleep(_LOOK_SECONDS)
        yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error


def _is_mine(lock: IO[str]) -> bool:
    """Whether the lock could be taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
