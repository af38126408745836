"""From files into memory that is there already: on the device, or on the host where layers wait to be streamed.

Several threads read at once, each in pieces: straight into the host's memory, or into locked memory of its own from
which the device fetches the piece while the thread reads the next. Nothing is held twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from scail.errors import CheckpointError
from scail.fingerprint import TensorHeader
from scail.weights import WeightChanges

PIECE_BYTES = 32 * 1024**2  # locked memory comes in powers of two
TASK_BYTES = 256 * 1024**2  # a larger tensor is read by several threads
NUM_THREADS = 12

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}


def fill(
    targets: Mapping[str, Tensor],
    files: Mapping[Path, Mapping[str, TensorHeader]],
    *,
    device: torch.device,
    changes: WeightChanges | None = None,
    num_threads: int = NUM_THREADS,
) -> None:
    """Read every tensor of `files` into its target.

    Args:
        targets: By name; contiguous, on `device` or on the host. What has another dtype than its file is converted.
        files: Headers by path; their names are the targets', but for what `changes` makes of them.
        device: Where tensors are converted and changed.
        changes: Applied to tensors on their way.
        num_threads: That read at once.

    Raises:
        CheckpointError: If a file cannot be read or ends too early.
    """
    changes = changes or WeightChanges()
    readers = threading.local()
    all_readers: list[_Reader] = []

    def run(task: Callable[[_Reader], None]) -> None:
        if not hasattr(readers, "own"):
            readers.own = _Reader(device)
            all_readers.append(readers.own)
        with torch.no_grad():
            task(readers.own)

    tasks = [task for path, headers in files.items() for task in _tasks(path, headers, targets, device, changes)]
    tasks.sort(key=lambda task: -task.num_bytes)
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(run, [task.run for task in tasks]):
            pass
    for reader in all_readers:
        reader.finish()


@dataclass(frozen=True)
class _Task:
    num_bytes: int
    run: Callable[[_Reader], None]


def _tasks(
    path: Path,
    headers: Mapping[str, TensorHeader],
    targets: Mapping[str, Tensor],
    device: torch.device,
    changes: WeightChanges,
) -> list[_Task]:
    tasks = []
    for key, header in headers.items():
        if changes.touch(key) or DTYPES.get(header.dtype) != targets[key].dtype:
            run = partial(_read_changed, path, key, header, targets, device, changes)
            tasks.append(_Task(header.num_bytes, run))
            continue
        target = as_bytes(targets[key])
        for start in range(0, header.num_bytes, TASK_BYTES):
            part = target[start : start + TASK_BYTES]
            tasks.append(_Task(len(part), partial(_read_bytes, path, header.offset + start, part)))
    return tasks


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def _read_bytes(path: Path, offset: int, target: Tensor, reader: _Reader) -> None:
    reader.read(path, offset, target)


def _read_changed(
    path: Path,
    key: str,
    header: TensorHeader,
    targets: Mapping[str, Tensor],
    device: torch.device,
    changes: WeightChanges,
    reader: _Reader,
) -> None:
    if header.dtype not in DTYPES:
        raise CheckpointError(f"{path}: {key} is {header.dtype}; expected one of {', '.join(DTYPES)}.")
    raw = torch.empty(header.shape, dtype=DTYPES[header.dtype], device=device)
    reader.read(path, header.offset, as_bytes(raw))
    reader.finish()
    for name, tensor in changes.apply(key, raw).items():
        targets[name].copy_(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # before `raw` is given back to the allocator, which knows one stream only


class _Reader:
    """What one thread reads with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._pieces = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._fetched = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def read(self, path: Path, offset: int, target: Tensor) -> None:
        """Fill a tensor of bytes; on the device it is whole after `finish`."""
        try:
            with path.open("rb", buffering=0) as file:
                if target.device.type == "cpu":
                    _read_exactly(file, offset, target)
                else:
                    self._read_to_device(file, offset, target)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _read_to_device(self, file: BinaryIO, offset: int, target: Tensor) -> None:
        assert self._stream is not None
        for number, start in enumerate(range(0, len(target), PIECE_BYTES)):
            part = target[start : start + PIECE_BYTES]
            piece, fetched = self._pieces[number % 2][: len(part)], self._fetched[number % 2]
            fetched.synchronize()
            _read_exactly(file, offset + start, piece)
            with torch.cuda.stream(self._stream):
                part.copy_(piece, non_blocking=True)
                fetched.record(self._stream)
        self.finish()  # the next target begins with the first piece again

    def finish(self) -> None:
        if self._stream:
            self._stream.synchronize()


def _read_exactly(file: BinaryIO, offset: int, target: Tensor) -> None:
    view = target.numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file.name} ends at byte {offset + done}; {len(view) - done} more were expected.")
        done += count
