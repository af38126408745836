"""Pictures in and out: a video or an image file becomes uint8 RGB, frames become an mp4.

Frames are uint8 (F, H, W, 3), RGB, turned upright. Pixels are what ffmpeg's default conversion gives: a file that
names no colour matrix counts as BT.601, as the official code's decoder has it. Colour profiles are not applied.

Decoding foreign files belongs in a process that may die: a broken decoder takes its process with it.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import ffmpeg as ffmpeg_python
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from scail.errors import EncodeError, InvalidInputError
from scail.ffmpeg_process import find_ffmpeg, find_ffprobe, killed_after, passthrough_option, started, tail
from scail.probe import INPUT_GUARD, MediaLimits, VideoInfo, check_file, describe_content, probe_video

__all__ = [
    "Frames",
    "MediaLimits",
    "VideoInfo",
    "VideoWriter",
    "encode_video",
    "find_ffmpeg",
    "find_ffprobe",
    "frame_rate",
    "probe_video",
    "read_image",
    "read_video",
    "write_poster",
]

Frames = NDArray[np.uint8]

READ_SECONDS = 60.0
WRITE_SECONDS = 120.0  # for one call of `write`, and for the end of the file
FRAMES_PER_CHUNK = 16

# decord 0.6 equals ffmpeg bit by bit on these; on the rest it was seen to fail, to show hidden frames or to differ.
DECORD_CODECS = frozenset({"h264", "hevc", "vp9", "mjpeg", "mpeg4"})
DECORD_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"})
DECORD_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv444p"})

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
BACKGROUND = (255, 255, 255)  # shows through the transparent parts of a reference
EXPECTED_IMAGE = "expected an image: JPEG, PNG, WebP, TIFF, BMP or GIF"
MAX_COMMENT_BYTES = 100_000  # Linux takes 128 KiB for one argument


def read_video(
    path: Path | str,
    *,
    max_frames: int | None = None,
    limits: MediaLimits | None = None,
    timeout: float = READ_SECONDS,
    ffmpeg: Path | str | None = None,
    info: VideoInfo | None = None,
) -> Frames:
    """The frames of a video as a player shows them, upright.

    decord reads what it is known to read right, ffmpeg the rest and what decord fails on.

    Args:
        path: A local file.
        max_frames: Read no more than the first so many.
        limits: What the file may hold at most.
        timeout: Seconds for ffmpeg; decord runs in this process and has no limit of its own.
        ffmpeg: The configured ffmpeg.
        info: What `probe_video` said of the file, if it was asked already.

    Returns:
        uint8 (F, H, W, 3), RGB.

    Raises:
        InvalidInputError: If the file is no video, is damaged, exceeds the limits or has fewer frames than it says.
    """
    path = Path(path)
    info = info or probe_video(path, limits=limits, ffmpeg=ffmpeg)
    num_frames = info.num_frames if max_frames is None else min(info.num_frames, max_frames)
    binary = find_ffmpeg(ffmpeg)
    frames = None
    if _suits_decord(info):
        _check_with_ffmpeg(path, num_frames, binary, timeout)
        frames = _read_with_decord(path, info, num_frames)
    if frames is None:
        frames = _read_with_ffmpeg(path, info, num_frames, binary, timeout)
    return frames


def _suits_decord(info: VideoInfo) -> bool:
    return (
        info.codec in DECORD_CODECS
        and info.container in DECORD_CONTAINERS
        and info.pixel_format in DECORD_PIXEL_FORMATS
        and info.rotation == 0
        and info.start_seconds >= 0
        and info.num_hidden_frames == 0
        and info.width % 2 == 0
        and info.height % 2 == 0
    )


def _read_with_decord(path: Path, info: VideoInfo, num_frames: int) -> Frames | None:
    """None if decord fails or sees another video than the probe did."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    frames = np.empty((num_frames, info.height, info.width, 3), np.uint8)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != info.num_frames:
            return None
        for start in range(0, num_frames, FRAMES_PER_CHUNK):
            batch = reader.get_batch(range(start, min(start + FRAMES_PER_CHUNK, num_frames))).asnumpy()
            if batch.shape[1:] != frames.shape[1:]:
                return None
            frames[start : start + len(batch)] = batch
    except (decord.DECORDError, RuntimeError):  # it raises either, by no rule
        return None
    return frames


def _check_with_ffmpeg(path: Path, num_frames: int, ffmpeg: Path, timeout: float) -> None:
    """Decode to nowhere, since decord hides damage that its decoder could conceal.

    With one byte of an H.264 stream flipped, decord gave wrong frames and no error in 29 of 30 trials; ffmpeg told
    26 of the 30. It costs about 0.1 s for a clip of 65 frames.
    """

    def count(pipe: IO[bytes]) -> int:
        return sum(not line.startswith(b"#") for line in pipe)

    _decode_with_ffmpeg(path, num_frames, ffmpeg, timeout, output={"format": "framecrc"}, receive=count)


def _read_with_ffmpeg(path: Path, info: VideoInfo, num_frames: int, ffmpeg: Path, timeout: float) -> Frames:
    frames = np.empty((num_frames, info.height, info.width, 3), np.uint8)

    def fill(pipe: IO[bytes]) -> int:
        buffer, size = frames.reshape(-1).data, 0
        while size < len(buffer) and (chunk := pipe.readinto(buffer[size:])):  # type: ignore[attr-defined]
            size += chunk
        return size // frames[0].nbytes

    output = {"format": "rawvideo", "pix_fmt": "rgb24"}
    _decode_with_ffmpeg(path, num_frames, ffmpeg, timeout, output=output, receive=fill)
    return frames


def _decode_with_ffmpeg(
    path: Path,
    num_frames: int,
    ffmpeg: Path,
    timeout: float,
    *,
    output: dict[str, str],
    receive: Callable[[IO[bytes]], int],
) -> None:
    """Decode the first frames, any damage being an error; `receive` takes what comes and counts the frames."""
    command = (
        ffmpeg_python.input(f"file:{path.absolute()}", threads=1, **INPUT_GUARD)
        .output("pipe:1", map="0:V:0", vframes=num_frames, **output, **passthrough_option(ffmpeg))
        .global_args("-nostdin", "-hide_banner", "-loglevel", "error", "-xerror")
        .compile(cmd=str(ffmpeg))
    )
    with started(command, stdout=subprocess.PIPE) as (process, log), killed_after(process, timeout) as is_late:
        assert process.stdout is not None
        num_received = receive(process.stdout)
        process.stdout.close()
        return_code = process.wait()
        reason = tail(log)
    if is_late.is_set():
        raise InvalidInputError(f"the video could not be decoded within {timeout:.0f} s.")
    if return_code != 0 or num_received < num_frames:
        reason = reason.partition("\n")[0].removeprefix(f"file:{path.absolute()}: ") or "ffmpeg gave no reason"
        reason = re.sub(r" @ 0x[0-9a-f]+", "", reason)
        raise InvalidInputError(
            f"the video is damaged: {num_received} of {num_frames} frames could be decoded ({reason})."
        )


def read_image(path: Path | str, *, limits: MediaLimits | None = None) -> NDArray[np.uint8]:
    """An image as a viewer shows it: turned by its EXIF orientation, its transparent parts over white.

    Of an animation, the first picture is taken. 16-bit pictures keep their upper 8 bits.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        InvalidInputError: If the file is no image, is damaged or has more pixels than the limits allow.
    """
    path, limits = Path(path), limits or MediaLimits()
    check_file(path, limits.max_bytes, expected=EXPECTED_IMAGE)
    with _image_errors(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > limits.max_image_pixels:
            raise InvalidInputError(
                f"the image has {image.width} x {image.height} pixels; expected at most {limits.max_image_pixels:,}."
            )
        image.load()
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))


@contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        content = describe_content(path)
        hint = " that is damaged or cut short" if content.endswith(" image") else f"; {EXPECTED_IMAGE}"
        raise InvalidInputError(f"the file is {content}{hint}.") from error
    except Image.DecompressionBombError as error:
        raise InvalidInputError(f"the image is far too large: {error}") from error
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, EOFError, struct.error, zlib.error) as error:
        # Pillow's parsers let all of these through when a file is damaged.
        raise InvalidInputError(f"the image is damaged or cut short ({error}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InvalidInputError("the image has floating-point pixels; expected 8 or 16 bits per channel.")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255 instead of scaling
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise InvalidInputError("the image has 32-bit pixels; expected 8 or 16 bits per channel.")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        background = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, picture).convert("RGB")
    return image.convert("RGB")


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate that is meant: 29.97 and its like are 30000/1001, other rates what they say."""
    if isinstance(fps, Fraction):
        return fps
    ntsc = Fraction(round(fps) * 1000, 1001)
    is_ntsc = abs(fps - ntsc) < 0.005 and fps != round(fps)
    return ntsc if is_ntsc else Fraction(fps).limit_denominator(1001)


class VideoWriter:
    """Writes frames to an mp4 that is either complete or not there.

    H.264 High without B-frames, so that the first frame is at time 0 without an edit list; 4:2:0, converted to and
    tagged as BT.709; the index in front, so that a browser starts to play at once. `metadata` goes as JSON into the
    `comment` tag. The same frames, threads and ffmpeg give the same bytes.

    Args:
        path: The mp4 to write; what was there before is replaced at the end.
        width: Columns of a frame; even.
        height: Rows of a frame; even.
        fps: Frames per second; 29.97 and its like are understood as 30000/1001.
        metadata: Where the clip comes from; anything JSON can hold.
        crf: x264's quality, 0 (lossless) to 51.
        preset: x264's preset.
        threads: x264's threads; another number gives other bytes.
        ffmpeg: The configured ffmpeg.

    Raises:
        InvalidInputError: If the size is odd, or the frames given to `write` do not have it.
        EncodeError: If ffmpeg fails or the file has not as many frames as were written.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        width: int,
        height: int,
        fps: float | Fraction,
        metadata: Mapping[str, object],
        crf: int = 17,
        preset: str = "medium",
        threads: int = 4,
        ffmpeg: Path | str | None = None,
    ) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise InvalidInputError(f"a clip of {width} x {height} pixels cannot be written; both must be even.")
        if not 0 < fps <= 1000:
            raise InvalidInputError(f"a clip with {fps} frames per second cannot be written; expected 0 to 1000.")
        comment = json.dumps(metadata, sort_keys=True, ensure_ascii=False)
        if len(comment.encode()) > MAX_COMMENT_BYTES:
            raise InvalidInputError(f"the clip's metadata are longer than {MAX_COMMENT_BYTES} bytes.")
        self.path = Path(path)
        self.num_frames = 0
        self._shape = (height, width, 3)
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        self._ffmpeg = ffmpeg
        self._stack = ExitStack()
        self._command: list[str] = (
            ffmpeg_python.input(
                "pipe:0", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=str(frame_rate(fps))
            )
            .filter("scale", out_color_matrix="bt709", out_range="tv", flags="bicubic+accurate_rnd+full_chroma_int")
            .filter("format", "yuv420p")
            .filter("setparams", colorspace="bt709", color_primaries="bt709", color_trc="bt709", range="tv")
            .output(
                str(self._temporary.absolute()),
                format="mp4",
                movflags="+faststart",
                **{"c:v": "libx264", "profile:v": "high"},
                **{"crf": crf, "preset": preset, "threads": threads, "bf": 0},
                metadata=f"comment={comment}",
            )
            .global_args("-hide_banner", "-loglevel", "error", "-y")
            .compile(cmd=str(find_ffmpeg(ffmpeg)))
        )

    def __enter__(self) -> Self:
        self._process, self._log = self._stack.enter_context(started(self._command, stdin=subprocess.PIPE))
        return self

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 (n, H, W, 3), RGB."""
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise InvalidInputError(
                f"frames are {frames.dtype} {frames.shape}; expected uint8 (n, {', '.join(map(str, self._shape))})."
            )
        assert self._process.stdin is not None
        try:
            with killed_after(self._process, WRITE_SECONDS):
                self._process.stdin.write(np.ascontiguousarray(frames).data)
        except BrokenPipeError as error:
            raise self._failure() from error
        self.num_frames += len(frames)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._stack:
                if error is None:
                    self._finish()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.num_frames == 0:
            raise EncodeError(f"no frames were given for {self.path.name}.")
        assert self._process.stdin is not None
        with killed_after(self._process, WRITE_SECONDS):
            try:
                self._process.stdin.close()
            except BrokenPipeError as error:
                raise self._failure() from error
            if self._process.wait() != 0:
                raise self._failure()
        num_written = probe_video(self._temporary, ffmpeg=self._ffmpeg).num_frames
        if num_written != self.num_frames:
            raise EncodeError(f"{self.path.name} has {num_written} frames; {self.num_frames} were written to it.")
        self._temporary.replace(self.path)

    def _failure(self) -> EncodeError:
        return_code = self._process.wait()
        reason = tail(self._log) or "it gave no reason"
        return EncodeError(f"ffmpeg ended with code {return_code} while writing {self.path.name}: {reason}")


def encode_video(
    path: Path | str,
    frames: Frames,
    *,
    fps: float | Fraction,
    metadata: Mapping[str, object],
    ffmpeg: Path | str | None = None,
) -> None:
    """Write a whole clip, uint8 (F, H, W, 3), as `VideoWriter` does."""
    height, width = frames.shape[1:3]
    with VideoWriter(path, width=width, height=height, fps=fps, metadata=metadata, ffmpeg=ffmpeg) as writer:
        writer.write(frames)


def write_poster(path: Path | str, frame: NDArray[np.uint8], *, quality: int = 88) -> None:
    """Write one frame, uint8 (H, W, 3), as a JPEG that is either complete or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        Image.fromarray(frame).save(temporary, format="JPEG", quality=quality, optimize=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
