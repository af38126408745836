"""The process in which one foreign file is decoded: `python -m tasks.decoder ORDER`.

It may crash, hang or swell; `tasks/inputs.py` starts it, stops it and reads what it leaves. It imports neither torch
nor prefect nor any storage, and lowers its own limits before it opens the file.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scail.errors import InvalidInputError, ScailError
from scail.video import MediaLimits, probe_video, read_image, read_video

PIXELS, ANSWER = "pixels.npy", "answer.json"
ALARM_GRACE_SECONDS = 10  # the parent stops us before; the alarm is for the day when there is no parent


@dataclass(frozen=True)
class DecodeOrder:
    """One file to decode; `pixels.npy` and `answer.json` go to `output_dir`."""

    kind: Literal["image", "video"]
    path: str
    output_dir: str
    seconds: float
    memory_bytes: int
    media: MediaLimits
    max_frames: int | None = None
    ffmpeg: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DecodeOrder:
        fields = json.loads(text)
        return cls(**(fields | {"media": MediaLimits(**fields["media"])}))


def main() -> None:
    """Decode, and answer with the error in words or with what the file is.

    That there is no answer means that the fault is not the file's: a missing library, a full disk.
    """
    order = DecodeOrder.from_json(sys.argv[1])
    output_dir = Path(order.output_dir)
    _restrict(order)
    answer: dict[str, Any]
    try:
        pixels, info = _decode(order)
    except InvalidInputError as error:
        answer = {"error": str(error)}
    except (ImportError, ScailError):
        raise
    except MemoryError:
        answer = {"error": f"decoding needs more than {order.memory_bytes / 1024**3:.1f} GiB of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a hostile file makes a library raise is the file's fault
        answer = {"error": f"the decoder failed ({type(error).__name__}: {error})"}
    else:
        np.save(output_dir / PIXELS, pixels)
        answer = {"info": info}
    (output_dir / ANSWER).write_text(json.dumps(answer))


def _restrict(order: DecodeOrder) -> None:
    """Memory, processor time and file size end at the order's; ffmpeg, as our child, inherits that."""
    signal.alarm(int(order.seconds) + ALARM_GRACE_SECONDS)
    seconds = int(order.seconds) + 1
    for what, limit in (
        (resource.RLIMIT_AS, order.memory_bytes),
        (resource.RLIMIT_FSIZE, order.memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        lowered = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (lowered, lowered))
    os.nice(5)  # the worker's own threads come first


def _decode(order: DecodeOrder) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], dict[str, Any] | None]:
    if order.kind == "image":
        return read_image(order.path, limits=order.media), None
    info = probe_video(order.path, timeout=order.seconds, limits=order.media, ffmpeg=order.ffmpeg)
    frames = read_video(
        order.path,
        max_frames=order.max_frames,
        limits=order.media,
        timeout=order.seconds,
        ffmpeg=order.ffmpeg,
        info=info,
    )
    return frames, asdict(info)


if __name__ == "__main__":
    main()
