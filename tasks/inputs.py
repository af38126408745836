"""A row's files: brought to this machine, decoded in quarantine, checked as pictures of one clip.

Foreign files are decoded in a process of their own (`tasks/decoder.py`) with limits on time and memory. If it dies,
the row has bad input; the worker, its GPU and the other rows do not notice. The pixels come back through a file that
is mapped and already unlinked, so the worker's memory holds only the pages that it reads.

Every complaint is an InvalidInputError that names the row, the column, what came and what was expected.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scail.config import MAX_FRAMES, SIZE_MULTIPLE
from scail.errors import InvalidInputError
from scail.geometry import kept_share, target_size
from scail.video import MediaLimits, VideoInfo
from tasks import storage
from tasks.decoder import ANSWER, PIXELS, DecodeOrder
from tasks.jobs import ClipJob, ClipRequest
from tasks.storage import DEFAULT_POLICY, NotFoundError, RefusedUriError, StoragePolicy

Column = Literal["reference", "pose"]

MIN_FRAMES = 5  # one latent frame beyond the first
MAX_FPS = 240.0
MIN_KEPT_SHARE = 0.5  # a landscape pose for a portrait reference would keep a third
PACKAGE_ROOT = Path(__file__).resolve().parent.parent
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "IMAGEIO_FFMPEG_EXE")  # and none of our credentials


@dataclass(frozen=True)
class InputLimits:
    """What decoding one file may cost this machine."""

    seconds: float = 60.0
    memory_bytes: int = 6 * 1024**3  # address space of the decoder, and of ffmpeg below it
    media: MediaLimits = field(default_factory=MediaLimits)


DEFAULT_LIMITS = InputLimits()


@dataclass(frozen=True)
class InputPaths:
    """A row's files on this machine, and a folder in which their pixels may lie for a while."""

    reference: Path
    pose: Path
    scratch_dir: Path


@dataclass(frozen=True)
class ClipInputs:
    """A row's pictures, as they came: not yet cropped or resized.

    Attributes:
        reference: uint8 (H, W, 3), RGB.
        pose: uint8 (F, H, W, 3), RGB; no more frames than the row asks for.
        fps: The row's frame rate, or else the pose's own.
        reference_size: (height, width).
        pose_info: The pose video as a whole, before `max_frames` cut it.
        pose_kept_share: Share of the pose picture's area that the centre crop will keep, 0.5 to 1.
    """

    reference: NDArray[np.uint8]
    pose: NDArray[np.uint8]
    fps: float
    reference_size: tuple[int, int]
    pose_info: VideoInfo
    pose_kept_share: float


def fetch_inputs(job: ClipJob, scratch_dir: Path, *, policy: StoragePolicy = DEFAULT_POLICY) -> InputPaths:
    """Bring a row's files to this machine; those that are here already stay where they are.

    Raises:
        InvalidInputError: If there is no such file, or it may not be fetched.
        StorageError: If the store failed.
    """
    scratch_dir.mkdir(parents=True, exist_ok=True)
    return InputPaths(
        reference=_fetch(job.request, "reference", scratch_dir, policy),
        pose=_fetch(job.request, "pose", scratch_dir, policy),
        scratch_dir=scratch_dir,
    )


def _fetch(request: ClipRequest, column: Column, scratch_dir: Path, policy: StoragePolicy) -> Path:
    uri = request.reference if column == "reference" else request.pose
    with _naming(request, column):
        try:
            here = storage.local_path(uri)
            if here is not None:
                if not here.exists():
                    raise InvalidInputError(f"there is no file {here}.")
                return here
            path = scratch_dir / column
            storage.download(uri, path, policy=policy)
        except NotFoundError as error:
            raise InvalidInputError(f"there is no file {storage.redact(uri)}.") from error
        except RefusedUriError as error:
            raise InvalidInputError(str(error)) from error
        return path


def decode_inputs(
    paths: InputPaths, job: ClipJob, limits: InputLimits = DEFAULT_LIMITS, *, ffmpeg: Path | None = None
) -> ClipInputs:
    """Decode a row's files, each in a process of its own, and check that they make a clip.

    Args:
        paths: What `fetch_inputs` returned.
        job: The row.
        limits: What decoding one file may cost.
        ffmpeg: The configured ffmpeg.

    Raises:
        InvalidInputError: If a file cannot be decoded within the limits or does not suit the clip.
    """
    request = job.request
    with _naming(request, "reference"):
        reference, _ = _decode("image", paths.reference, paths.scratch_dir, limits)
        height, width = reference.shape[:2]
        target = request.size or target_size(height, width)
        _checked_share(height, width, target)
    with _naming(request, "pose"):
        pose, info = _decode(
            "video",
            paths.pose,
            paths.scratch_dir,
            limits,
            max_frames=min(request.max_frames or MAX_FRAMES, MAX_FRAMES),
            ffmpeg=ffmpeg,
        )
        assert info is not None
        _check_frames(info, request.max_frames)
        fps = request.fps or info.fps
        if fps > MAX_FPS:
            raise InvalidInputError(f"the video has {fps:g} frames per second; expected at most {MAX_FPS:g}; set fps.")
        pose_kept_share = _checked_share(info.height, info.width, target)
    return ClipInputs(reference, pose, fps, (height, width), info, pose_kept_share)


@contextmanager
def _naming(request: ClipRequest, column: Column) -> Iterator[None]:
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"line {request.row}, column {column}: {error}") from error


def _check_frames(info: VideoInfo, max_frames: int | None) -> None:
    if info.num_frames < MIN_FRAMES:
        frames = "frame" if info.num_frames == 1 else "frames"
        raise InvalidInputError(f"the video has {info.num_frames} {frames}; expected at least {MIN_FRAMES}.")
    if info.num_frames > MAX_FRAMES and (max_frames is None or max_frames > MAX_FRAMES):
        raise InvalidInputError(
            f"the video has {info.num_frames} frames; clips beyond {MAX_FRAMES} frames are not supported yet;"
            f" set max_frames to {MAX_FRAMES} or cut the video."
        )


def _checked_share(height: int, width: int, target: tuple[int, int]) -> float:
    """Share of the picture that the centre crop to the target (height, width) keeps, if it is enough to render."""
    if min(height, width) < SIZE_MULTIPLE:
        raise InvalidInputError(f"the picture has {width} x {height} pixels; expected at least {SIZE_MULTIPLE} a side.")
    share = min(1.0, kept_share(height, width, *target))
    if share < MIN_KEPT_SHARE:
        raise InvalidInputError(
            f"the picture is {_orientation(height, width)} ({width} x {height}) and the clip is"
            f" {_orientation(*target)} ({target[1]} x {target[0]}): the centre crop would keep {share:.0%} of it;"
            f" expected a {_orientation(*target)} picture, or width and height in the row."
        )
    return share


def _orientation(height: int, width: int) -> str:
    if height == width:
        return "square"
    return "landscape" if width > height else "portrait"


def _decode(
    kind: Literal["image", "video"],
    path: Path,
    scratch_dir: Path,
    limits: InputLimits,
    *,
    max_frames: int | None = None,
    ffmpeg: Path | None = None,
) -> tuple[NDArray[np.uint8], VideoInfo | None]:
    """Decode one file in a process of its own; a copy-on-write view of the pixels it left."""
    with tempfile.TemporaryDirectory(prefix="decode-", dir=scratch_dir) as folder:
        order = DecodeOrder(
            kind=kind,
            path=str(path.absolute()),
            output_dir=folder,
            seconds=limits.seconds,
            memory_bytes=limits.memory_bytes,
            media=limits.media,
            max_frames=max_frames,
            ffmpeg=str(ffmpeg) if ffmpeg else None,
        )
        answer = _run_decoder(order)
        if "error" in answer:
            raise InvalidInputError(answer["error"])
        pixels = np.load(Path(folder) / PIXELS, mmap_mode="c")
    info = VideoInfo(**answer["info"]) if answer["info"] is not None else None
    return np.asarray(pixels), info


def _run_decoder(order: DecodeOrder) -> dict[str, Any]:
    """The decoder's answer; a decoder that was stopped or died by a signal is the file's fault, else ours."""
    folder = Path(order.output_dir)
    environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    environment |= {"PYTHONPATH": str(PACKAGE_ROOT), "TMPDIR": str(folder), "OPENBLAS_NUM_THREADS": "1"}
    with (folder / "decoder.log").open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.decoder", order.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # so that its ffmpeg can be killed with it
        )
        try:
            return_code = process.wait(timeout=order.seconds)
        except subprocess.TimeoutExpired as error:
            raise InvalidInputError(
                f"could not be decoded: the decoder was stopped after {order.seconds:g} s."
            ) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if return_code < 0:
            raise InvalidInputError(
                f"could not be decoded: the decoder ended with signal {-return_code} ({_signal_name(-return_code)})."
            )
        if return_code > 0:
            log.seek(0)
            raise RuntimeError(f"the decoder process failed: {log.read()[-2000:].decode(errors='replace').strip()}")
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_text())
    return answer


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"
