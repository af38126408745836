"""ffmpeg and ffprobe: where they are, and how a process of theirs is run so that it cannot hang or outlive us.

ffmpeg-python writes the command lines; the processes are ours, since `ffmpeg.probe` has no timeout and
`run_async(pipe_stderr=True)` stops for ever once the unread pipe is full. stderr goes to a file instead.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from scail.errors import ScailError

TAIL_BYTES = 2000


def find_ffmpeg(configured: Path | str | None = None) -> Path:
    """The ffmpeg to use: the configured one, the one on the search path, the one that imageio-ffmpeg brings.

    Raises:
        ScailError: If the configured one is not there, or there is none at all.
    """
    if configured is not None:
        found = shutil.which(configured)
        if found is None:
            raise ScailError(f"ffmpeg was configured as {configured}, which is not an executable file.")
        return Path(found)
    return _default_ffmpeg()


def find_ffprobe(ffmpeg: Path | str | None = None) -> Path | None:
    """The ffprobe beside the configured ffmpeg, else the one on the search path; imageio-ffmpeg brings none."""
    beside = shutil.which(Path(ffmpeg).parent / "ffprobe") if ffmpeg is not None else None
    found = beside or shutil.which("ffprobe")
    return Path(found) if found else None


@lru_cache(maxsize=1)
def _default_ffmpeg() -> Path:
    found = shutil.which("ffmpeg")
    if found is not None:
        return Path(found)
    import imageio_ffmpeg

    try:
        return Path(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise ScailError("no ffmpeg: install it, or set SCAIL_FFMPEG to its path.") from error


@lru_cache(maxsize=4)
def ffmpeg_version(ffmpeg: Path) -> str:
    """The version as ffmpeg states it, such as `5.1.9-0+deb12u1` or `n9.0.2-17-g2a571b6068`."""
    banner = subprocess.run([ffmpeg, "-version"], capture_output=True, check=True, timeout=30, text=True).stdout
    return banner.split()[2]


def passthrough_option(ffmpeg: Path) -> dict[str, str]:
    """How this ffmpeg is told to write every frame once, whatever its timestamp.

    `-fps_mode` came with 5.1 and `-vsync` is gone from 9.0 at the latest, so no one spelling serves all.
    """
    version = re.match(r"n?(\d+)\.(\d+)", ffmpeg_version(ffmpeg))
    is_old = version is not None and (int(version[1]), int(version[2])) < (5, 1)
    return {"vsync" if is_old else "fps_mode": "passthrough"}


@contextmanager
def killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill the process if the block takes longer, which ends any read or write that waits for it.

    Yields:
        An event that is set once the process was killed for being late.
    """
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


@contextmanager
def started(
    command: list[str], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A running process and the file that takes its stderr; on the way out the process is dead and reaped."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=log)
        try:
            yield process, log
        finally:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # what is still buffered can no longer be written
                        pipe.close()
            process.wait()


def tail(log: IO[bytes]) -> str:
    """The end of what a process wrote to stderr."""
    size = log.seek(0, 2)
    log.seek(max(0, size - TAIL_BYTES))
    return log.read().decode(errors="replace").strip()
