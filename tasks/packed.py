"""The results of a run while it goes on, small.

A result with its metrics is twelve kilobytes of Python objects, of which most say the same for every clip. The flow
keeps one per row until it writes them, for days perhaps; packed they take a fifteenth, and looking at all of them
one after the other holds one at a time.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection, Iterable, Iterator

from tasks.jobs import ClipResult


class PackedResults(Collection[ClipResult]):
    """Results in the order of their rows, whichever came first."""

    def __init__(self, results: Iterable[ClipResult] = ()) -> None:
        self._packed: list[tuple[int, bytes]] = []  # row, bytes
        for result in results:
            self.append(result)

    def append(self, result: ClipResult) -> None:
        self._packed.append((result.row, zlib.compress(pickle.dumps(result))))

    def __iter__(self) -> Iterator[ClipResult]:
        self._packed.sort(key=lambda entry: entry[0])
        return (pickle.loads(zlib.decompress(data)) for _, data in tuple(self._packed))

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, result: object) -> bool:
        return any(result == own for own in self)
