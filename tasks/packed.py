"""The results of a run while it goes on, small.

A result with its metrics is twelve kilobytes of Python objects, of which most say the same for every clip. The flow
keeps one per row until it writes them, for days perhaps; packed, and relative to the first one that has metrics, they
take a twenty-fifth, and looking at all of them one after the other holds one at a time.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection, Iterable, Iterator

from tasks.jobs import ClipResult


class PackedResults(Collection[ClipResult]):
    """Results in the order of their rows, whichever came first."""

    def __init__(self, results: Iterable[ClipResult] = ()) -> None:
        self._packed: list[tuple[int, bytes, bytes]] = []  # row, bytes, the pattern that they are relative to
        self._pattern = b""
        for result in results:
            self.append(result)

    def append(self, result: ClipResult) -> None:
        data = pickle.dumps(result)
        self._packed.append((result.row, _compress(data, self._pattern), self._pattern))
        if not self._pattern and result.metrics:
            self._pattern = data

    def __iter__(self) -> Iterator[ClipResult]:
        self._packed.sort(key=lambda entry: entry[0])
        return (pickle.loads(_decompress(data, pattern)) for _, data, pattern in tuple(self._packed))

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, result: object) -> bool:
        return any(result == own for own in self)


def _compress(data: bytes, pattern: bytes) -> bytes:
    compressor = zlib.compressobj(zdict=pattern)
    return compressor.compress(data) + compressor.flush()


def _decompress(data: bytes, pattern: bytes) -> bytes:
    return zlib.decompressobj(zdict=pattern).decompress(data)
