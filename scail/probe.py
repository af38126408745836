"""What a video file holds, found out without decoding it, and refused early if it cannot be a clip's input.

Frames are counted by reading every packet: a header may promise more than the file has. Packets that an edit list
hides (the pre-roll of a cut made without re-encoding) are counted apart, since they are decoded but never shown.

Only the demuxers of `CONTAINERS` are let loose on a file, so that a playlist or a subtitle script named .mp4 cannot
make ffmpeg open other files or addresses.
"""

from __future__ import annotations

import json
import stat
import subprocess
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from scail.errors import InvalidInputError
from scail.ffmpeg_process import find_ffprobe

CONTAINERS = "mov,matroska,avi,mpegts,gif"  # ffmpeg's names; mov is mp4 too and matroska is webm too
INPUT_GUARD = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file,pipe"}
EXPECTED_VIDEO = "expected a video: mp4, mov, mkv, webm, avi, ts or gif"
PROBE_SECONDS = 30.0
MISSING_FRAMES = 1.5  # a stream that ends this many frames before its declared end was cut short

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"BM", "a BMP image"),
    (0, b"GIF8", "a GIF"),
    (4, b"ftyp", "an mp4 or mov"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM file"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (0, b"#EXTM3U", "a playlist"),
)


@dataclass(frozen=True)
class MediaLimits:
    """What an input file may ask of this machine."""

    max_bytes: int = 2 * 1024**3
    max_pixels: int = 4096 * 2304  # of one frame
    max_image_pixels: int = 64_000_000
    max_frames: int = 20_000  # in the file, however few of them are read
    max_seconds: float = 3600.0


@dataclass(frozen=True)
class VideoInfo:
    """A video stream as a player would show it.

    Attributes:
        width: Columns of a frame as shown, that is after `rotation`. Non-square pixels are not stretched.
        height: Rows of a frame as shown.
        num_frames: Frames that are shown, counted.
        fps: Average frame rate.
        codec: ffmpeg's name of it, such as `h264`.
        container: ffmpeg's name of it, such as `mov,mp4,m4a,3gp,3g2,mj2`.
        duration_seconds: From the first frame shown to the end of the last.
        start_seconds: Timestamp of the earliest packet; negative where an edit list hides a pre-roll.
        rotation: Degrees counter-clockwise that a player turns the stored picture by.
        has_audio: Whether there is an audio stream as well.
        pixel_format: ffmpeg's name of it, such as `yuv420p`.
        num_hidden_frames: Frames in the file that an edit list hides.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    codec: str
    container: str
    duration_seconds: float
    start_seconds: float
    rotation: int
    has_audio: bool
    pixel_format: str
    num_hidden_frames: int = 0


@dataclass(frozen=True)
class _Packet:
    start: float | None
    duration: float
    is_hidden: bool


@dataclass(frozen=True)
class _Scan:
    """What ffprobe and PyAV both tell; `width` and `height` are as stored."""

    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    rotation: int
    average_fps: Fraction | None
    declared_seconds: float | None
    num_video_streams: int
    num_audio_streams: int
    packets: list[_Packet]


def probe_video(
    path: Path | str,
    *,
    timeout: float = PROBE_SECONDS,
    limits: MediaLimits | None = None,
    ffmpeg: Path | str | None = None,
) -> VideoInfo:
    """Read a video's headers and count its packets, with ffprobe, or with PyAV where there is none.

    Args:
        path: A local file.
        timeout: Seconds after which the file counts as unreadable.
        limits: What the file may hold at most.
        ffmpeg: The configured ffmpeg; the ffprobe beside it is used.

    Raises:
        InvalidInputError: If the file is no video, is damaged or cut short, or exceeds the limits.
    """
    path, limits = Path(path), limits or MediaLimits()
    check_file(path, limits.max_bytes, expected=EXPECTED_VIDEO)
    ffprobe = find_ffprobe(ffmpeg)
    max_packets = limits.max_frames + 1
    if ffprobe is None:
        scan = _scan_with_pyav(path, max_packets, timeout)
    else:
        scan = _scan_with_ffprobe(path, ffprobe, max_packets, timeout)
    return _checked_info(scan, limits)


def check_file(path: Path, max_bytes: int, *, expected: str) -> None:
    """Refuse what need not be opened by a decoder to see that it is wrong.

    Raises:
        InvalidInputError: If it is missing, no regular file, empty or larger than `max_bytes`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidInputError(f"the file cannot be opened ({error.strerror}); {expected}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInputError(f"not a regular file; {expected}.")
    if status.st_size == 0:
        raise InvalidInputError(f"the file is empty (0 bytes); {expected}.")
    if status.st_size > max_bytes:
        raise InvalidInputError(f"the file has {status.st_size:,} bytes; at most {max_bytes:,} are read.")


def describe_content(path: Path) -> str:
    """What a file is by its first bytes, whatever its name says: `a JPEG image`, `an HTML page`, `text`."""
    with path.open("rb") as file:
        head = file.read(512)
    for offset, signature, name in SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    is_text = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
    return "text" if is_text and _is_utf8(head) else "of no known kind"


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # the cut went through a character
    return True


def _unreadable(path: Path) -> InvalidInputError:
    content = describe_content(path)
    if content in ("an mp4 or mov", "a Matroska or WebM file"):
        return InvalidInputError(f"{content} whose index cannot be read: the file is cut short or damaged.")
    return InvalidInputError(f"the file is {content}; {EXPECTED_VIDEO}.")


def _scan_with_ffprobe(path: Path, ffprobe: Path, max_packets: int, timeout: float) -> _Scan:
    deadline = time.monotonic() + timeout
    headers = _ffprobe(
        path,
        ffprobe,
        "format=format_name,duration:stream=codec_type,codec_name,pix_fmt,width,height,avg_frame_rate,duration,index"
        ":stream_disposition=attached_pic:stream_side_data=rotation",
        timeout=timeout,
    )
    streams: list[dict[str, Any]] = headers.get("streams", [])
    videos = [
        stream
        for stream in streams
        if stream.get("codec_type") == "video" and not stream.get("disposition", {}).get("attached_pic")
    ]
    audios = [stream for stream in streams if stream.get("codec_type") == "audio"]
    _check_has_one_video(len(videos), len(audios))
    video = videos[0]
    packets = _ffprobe(
        path,
        ffprobe,
        "packet=pts_time,dts_time,duration_time,flags",
        *("-select_streams", str(video["index"]), "-read_intervals", f"%+#{max_packets}"),
        timeout=deadline - time.monotonic(),
    ).get("packets", [])
    rotations = [data["rotation"] for data in video.get("side_data_list", []) if "rotation" in data]
    container_seconds = headers["format"].get("duration") if len(streams) == 1 else None
    declared = video.get("duration", container_seconds)
    return _Scan(
        container=headers["format"]["format_name"],
        codec=video.get("codec_name", "unknown"),
        pixel_format=video.get("pix_fmt", "unknown"),
        width=video.get("width", 0),
        height=video.get("height", 0),
        rotation=int(rotations[0]) if rotations else 0,
        average_fps=_fraction(video.get("avg_frame_rate", "0/0")),
        declared_seconds=float(declared) if declared is not None else None,
        num_video_streams=len(videos),
        num_audio_streams=len(audios),
        packets=[_ffprobe_packet(packet) for packet in packets],
    )


def _ffprobe(path: Path, ffprobe: Path, entries: str, *options: str, timeout: float) -> dict[str, Any]:
    guard = [part for name, value in INPUT_GUARD.items() for part in (f"-{name}", value)]
    command = [str(ffprobe), "-v", "error", *guard, *options, "-show_entries", entries, "-of", "json", f"file:{path}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=max(timeout, 0.1), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidInputError(f"the video could not be probed within {timeout:.0f} s.") from error
    if done.returncode != 0:
        raise _unreadable(path)
    answer: dict[str, Any] = json.loads(done.stdout.decode(errors="replace"))
    return answer


def _ffprobe_packet(packet: dict[str, str]) -> _Packet:
    start = packet.get("pts_time", packet.get("dts_time"))
    return _Packet(
        start=float(start) if start is not None else None,
        duration=float(packet.get("duration_time", 0.0)),
        is_hidden="D" in packet.get("flags", ""),
    )


def _fraction(text: str) -> Fraction | None:
    numerator, _, denominator = text.partition("/")
    if int(denominator or 1) == 0 or int(numerator) == 0:
        return None
    return Fraction(int(numerator), int(denominator or 1))


def _scan_with_pyav(path: Path, max_packets: int, timeout: float) -> _Scan:
    import av
    from av.stream import Disposition

    deadline = time.monotonic() + timeout
    try:
        container = av.open(f"file:{path}", options=dict(INPUT_GUARD))
    except (av.FFmpegError, ValueError) as error:
        raise _unreadable(path) from error
    with container:
        videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        _check_has_one_video(len(videos), len(container.streams.audio))
        stream = videos[0]
        if stream.codec_context is None:
            raise InvalidInputError("the video is of a codec that cannot be decoded.")
        packets: list[_Packet] = []
        try:
            for packet in container.demux(stream):
                if packet.size == 0:  # asks the decoder to flush
                    continue
                packets.append(_pyav_packet(packet))
                if len(packets) >= max_packets:
                    break
                if time.monotonic() > deadline:
                    raise InvalidInputError(f"the video could not be probed within {timeout:.0f} s.")
        except av.FFmpegError as error:
            raise InvalidInputError(f"the video is damaged after {len(packets)} frames ({error.strerror}).") from error
        declared = stream.duration * stream.time_base if stream.duration and stream.time_base else None
        if declared is None and container.duration and len(container.streams) == 1:
            declared = Fraction(container.duration, av.time_base)
        return _Scan(
            container=container.format.name,
            codec=stream.codec_context.name,
            pixel_format=stream.codec_context.pix_fmt or "unknown",
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            rotation=_pyav_rotation(path),
            average_fps=stream.average_rate or None,
            declared_seconds=float(declared) if declared is not None else None,
            num_video_streams=len(videos),
            num_audio_streams=len(container.streams.audio),
            packets=packets,
        )


def _pyav_packet(packet: Any) -> _Packet:
    start = packet.pts if packet.pts is not None else packet.dts
    return _Packet(
        start=float(start * packet.time_base) if start is not None else None,
        duration=float((packet.duration or 0) * packet.time_base),
        is_hidden=bool(packet.is_discard),
    )


def _pyav_rotation(path: Path) -> int:
    """PyAV shows the display matrix on decoded frames only; a frame that cannot be decoded fails when it is read."""
    import av

    with av.open(f"file:{path}", options=dict(INPUT_GUARD)) as container:
        try:
            return int(next(container.decode(video=0)).rotation)
        except (av.FFmpegError, StopIteration):
            return 0


def _check_has_one_video(num_video_streams: int, num_audio_streams: int) -> None:
    if num_video_streams == 0:
        what = "audio but no video" if num_audio_streams else "no video stream"
        raise InvalidInputError(f"the file has {what}; {EXPECTED_VIDEO}.")
    if num_video_streams > 1:
        raise InvalidInputError(f"the file has {num_video_streams} video streams; expected one.")


def _checked_info(scan: _Scan, limits: MediaLimits) -> VideoInfo:
    """Turn a scan into what a player shows, and refuse what is empty, too large or cut short."""
    shown = [packet for packet in scan.packets if not packet.is_hidden]
    if not shown:
        raise InvalidInputError("the video has 0 frames.")
    if scan.width * scan.height > limits.max_pixels or scan.width * scan.height == 0:
        raise InvalidInputError(
            f"a frame has {scan.width} x {scan.height} pixels; expected 1 to {limits.max_pixels:,} in all."
        )
    if len(scan.packets) > limits.max_frames:
        raise InvalidInputError(f"the video has more than {limits.max_frames} frames; cut it.")
    starts = [packet.start for packet in shown if packet.start is not None]
    ends = [packet.start + packet.duration for packet in shown if packet.start is not None]
    fps = _frame_rate(scan, starts)
    first, last_end = min(starts, default=0.0), max(ends, default=len(shown) / fps)
    last_end = max(last_end, max(starts, default=0.0) + 1 / fps)  # some containers give a packet no duration
    if last_end - first > limits.max_seconds:
        raise InvalidInputError(f"the video lasts {last_end - first:.0f} s; at most {limits.max_seconds:.0f} s.")
    declared = scan.declared_seconds or 0.0
    if (declared - max(last_end, last_end - first)) * fps > MISSING_FRAMES:
        raise InvalidInputError(
            f"the video is cut short: it has {len(shown)} of the {round(declared * fps)} frames that it declares."
        )
    is_sideways = scan.rotation % 180 != 0
    return VideoInfo(
        width=scan.height if is_sideways else scan.width,
        height=scan.width if is_sideways else scan.height,
        num_frames=len(shown),
        fps=fps,
        codec=scan.codec,
        container=scan.container,
        duration_seconds=last_end - first,
        start_seconds=min((packet.start for packet in scan.packets if packet.start is not None), default=0.0),
        rotation=scan.rotation,
        has_audio=scan.num_audio_streams > 0,
        pixel_format=scan.pixel_format,
        num_hidden_frames=len(scan.packets) - len(shown),
    )


def _frame_rate(scan: _Scan, starts: list[float]) -> float:
    if scan.average_fps is not None:
        return float(scan.average_fps)
    span = max(starts, default=0.0) - min(starts, default=0.0)
    if span <= 0.0:
        raise InvalidInputError(f"the video has {len(starts)} timed frames and states no frame rate.")
    return (len(starts) - 1) / span
