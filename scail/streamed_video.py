"""An mp4 that a thread of its own writes while its later frames are still being computed."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

from scail.errors import EncodeError, Interrupted
from scail.video import Frames, VideoWriter


class StreamedVideo:
    """Writes what `write` is given, in the background; as with `VideoWriter`, the mp4 is complete or not there.

    Frames wait in memory, so that whoever computes them never waits for the encoder. `finish` waits for the file; a
    `with` that is left without it, or by an error, leaves no file.

    Args:
        path: The mp4 to write.
        fps: Frames per second.
        metadata: Where the clip comes from; anything JSON can hold.
        ffmpeg: The configured ffmpeg.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        fps: float | Fraction,
        metadata: Mapping[str, object],
        ffmpeg: Path | str | None = None,
    ) -> None:
        self._path, self._fps, self._metadata, self._ffmpeg = Path(path), fps, metadata, ffmpeg
        self._waiting: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
        self._is_whole = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode-mp4")

    def __enter__(self) -> Self:
        self._written = self._thread.submit(self._write_all)
        return self

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 (n, H, W, 3), RGB, which nobody may change afterwards; returns at once."""
        self._waiting.put(frames)

    def finish(self) -> None:
        """Wait until the file is there.

        Raises:
            InvalidInputError: If the frames have an odd size or different ones.
            EncodeError: If there were no frames, or ffmpeg fails.
        """
        self._is_whole = True
        self._waiting.put(None)
        self._written.result()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.shutdown()

    def _write_all(self) -> None:
        chunks = self._chunks()
        first = next(chunks, None)
        if first is None:
            raise EncodeError(f"no frames were given for {self._path.name}.")
        height, width = first.shape[1:3]
        with VideoWriter(
            self._path, width=width, height=height, fps=self._fps, metadata=self._metadata, ffmpeg=self._ffmpeg
        ) as writer:
            writer.write(first)
            for frames in chunks:
                writer.write(frames)

    def _chunks(self) -> Iterator[Frames]:
        while (frames := self._waiting.get()) is not None:
            yield frames
        if not self._is_whole:
            raise Interrupted(f"{self._path.name} was given up before its last frame.")
