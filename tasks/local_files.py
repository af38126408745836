"""Files on this machine's file systems: written whole or not at all, and claimed by exactly one.

What `tasks/storage.py` does with plain paths and `file://`; nobody else needs it. A file is written under a
temporary name in its own folder and then renamed, since only a rename within one file system is atomic. A writer
killed half-way leaves `.name.<32 hex>.tmp` behind, which no listing shows and `sweep` removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from tasks.uris import NotFoundError, local_path, refuse_if_larger, translated

Result = TypeVar("Result")

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_NO_FSYNC_OF_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}  # FUSE and network mounts
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A fresh name in the folder of `path`, made if need be; whatever still has that name at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:50]}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill a temporary file by `write`, bring it to the disk, then rename it to `path`.

    If `write` raises, `path` is as it was before.
    """
    with temporary_beside(path) as temporary:
        _write_to_disk(temporary, write)
        temporary.replace(path)
    _fsync_folder(path.parent)


def copy_atomically(source: Path, path: Path) -> str:
    """Hex md5 of what was copied."""
    digest = hashlib.md5(usedforsecurity=False)
    with source.open("rb") as stream:
        write_atomically(path, partial(_copy_hashed, stream, digest))
    return digest.hexdigest()


def _copy_hashed(stream: BinaryIO, digest: hashlib._Hash, file: BinaryIO) -> None:
    while block := stream.read(2**20):
        digest.update(block)
        file.write(block)


def create(path: Path, data: bytes) -> bool:
    """Make `path` with `data` if nobody has; true for the one caller who did.

    The link count tells our own link from another's even where its acknowledgement was lost, as NFS can do.
    """
    with temporary_beside(path) as temporary:
        _write_to_disk(temporary, lambda file: file.write(data))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_exclusively(path, data)
        _fsync_folder(path.parent)
        return True


def list_files(path: Path) -> list[Path]:
    """Every file below a folder; the file itself if `path` is one."""
    if path.is_file():
        return [path]
    return [found for found in _walk(path) if not _LEFTOVER.fullmatch(found.name)]


def sweep(folder: Path, older_than_seconds: float) -> int:
    """Remove what killed writers left below `folder`; younger files may belong to a writer still at work."""
    oldest_kept = time.time() - older_than_seconds
    num_removed = 0
    for leftover in filter(lambda found: _LEFTOVER.fullmatch(found.name), _walk(folder)):
        with suppress(FileNotFoundError):  # its writer finished, or another sweep was first
            if leftover.stat().st_mtime <= oldest_kept:
                leftover.unlink()
                num_removed += 1
    return num_removed


def md5(path: Path) -> str:
    """Hex md5 of a file, remembered for as long as it is the same file of the same size and time of change."""
    stat = path.stat()
    return _md5_of_version(path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)  # a manifest names the same reference picture in many rows
def _md5_of_version(path: Path, inode: int, size: int, mtime_ns: int) -> str:  # noqa: ARG001 the cache's key
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _write_to_disk(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _create_exclusively(path: Path, data: bytes) -> bool:
    """The claim where there are no hard links: one winner too, but a winner killed here leaves an empty claim."""
    try:
        _write_to_disk(path, lambda file: file.write(data))
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _fsync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC_OF_FOLDERS:
            raise


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. What cannot be read is an error: an empty list would mean that nothing is there."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for below, _, file_names in os.walk(folder, onerror=unless_gone):
        yield from (Path(below) / file_name for file_name in file_names)


class LocalStore:
    """`tasks.storage.Store` over this machine's files."""

    def read_bytes(self, uri: str) -> bytes:
        return _at_the_border(uri, lambda: self._file(uri).read_bytes())

    def exists(self, uri: str) -> bool:
        return _at_the_border(uri, self._path(uri).exists)

    def size(self, uri: str) -> int:
        return _at_the_border(uri, lambda: self._file(uri).stat().st_size)

    def list_files(self, uri: str) -> list[str]:
        paths = _at_the_border(uri, partial(list_files, self._path(uri)))
        return [path.absolute().as_uri() for path in paths] if "://" in uri else [str(path) for path in paths]

    def download(self, uri: str, path: Path, max_bytes: int) -> None:
        refuse_if_larger(uri, self.size(uri), max_bytes)
        _at_the_border(uri, partial(copy_atomically, self._path(uri), path))

    def content_md5(self, uri: str) -> str:
        return _at_the_border(uri, lambda: md5(self._file(uri)))

    def publish_bytes(self, uri: str, data: bytes, content_type: str) -> None:  # noqa: ARG002 files have no type
        _at_the_border(uri, partial(write_atomically, self._path(uri), lambda file: file.write(data)))

    def publish_file(self, path: Path, uri: str, content_type: str) -> str:  # noqa: ARG002
        return _at_the_border(uri, partial(copy_atomically, path, self._path(uri)))

    def create(self, uri: str, data: bytes, content_type: str) -> bool:  # noqa: ARG002
        return _at_the_border(uri, partial(create, self._path(uri), data))

    def delete(self, uri: str) -> None:
        _at_the_border(uri, partial(self._path(uri).unlink, missing_ok=True))

    def version(self, uri: str) -> str:
        stat = _at_the_border(uri, lambda: self._file(uri).stat())
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"

    def delete_version(self, uri: str, expected: str) -> bool:  # noqa: ARG002 compared by the caller
        self.delete(uri)
        return True

    def sweep(self, uri: str, older_than_seconds: float) -> int:
        return _at_the_border(uri, partial(sweep, self._path(uri), older_than_seconds))

    def _file(self, uri: str) -> Path:
        path = self._path(uri)
        if path.is_dir():
            raise NotFoundError(f"{uri} is a folder, not a file")
        return path

    def _path(self, uri: str) -> Path:
        path = local_path(uri)
        assert path is not None
        return path


def _at_the_border(uri: str, action: Callable[[], Result]) -> Result:
    try:
        return action()
    except OSError as error:
        raise translated(error, uri) from error
