"""Files that a batch meets sooner or later, each with what must come of it.

`build_cases(folder)` writes them all. A case is decoded as one column of a row whose other column is harmless.
"""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import wave
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from scail.video import find_ffmpeg

NUM_FRAMES, WIDTH, HEIGHT = 24, 96, 64
SOURCE = f"testsrc2=size={WIDTH}x{HEIGHT}:rate=16"


@dataclass(frozen=True)
class Case:
    """A file, and either the shape of its pixels or a pattern that the message must match."""

    name: str
    path: Path
    column: Literal["reference", "pose"]
    shape: tuple[int, ...] | None = None  # (F, H, W) of a pose, (H, W) of a reference
    message: str | None = None
    request: dict[str, Any] = field(default_factory=dict)


class Cases:
    """Collects cases; `folder` holds their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Case] = []

    def pose(self, name: str, path: Path, expected: tuple[int, ...] | str, **request: Any) -> None:
        self._add("pose", name, path, expected, request)

    def reference(self, name: str, path: Path, expected: tuple[int, ...] | str, **request: Any) -> None:
        self._add("reference", name, path, expected, request)

    def _add(self, column, name, path, expected, request) -> None:
        if isinstance(expected, str):
            self.all.append(Case(name, path, column, message=expected, request=request))
        else:
            self.all.append(Case(name, path, column, shape=expected, request=request))

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def encode(self, name: str, *output: str, source: str = SOURCE, num_frames: int = NUM_FRAMES) -> Path:
        """A test picture of `num_frames` frames through ffmpeg; `output` are options of the output file."""
        path = self.folder / name
        run_ffmpeg("-f", "lavfi", "-i", source, "-frames:v", str(num_frames), *output, path)
        return path

    def change(self, source: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
        return self.write(name, change(source.read_bytes()))


def run_ffmpeg(*arguments: str | Path) -> None:
    environment = os.environ | {"SVT_LOG": "1"}
    subprocess.run(
        [find_ffmpeg(), "-nostdin", "-v", "error", "-y", *arguments], check=True, timeout=60, env=environment
    )


def build_cases(folder: Path) -> list[Case]:
    cases = Cases(folder)
    base = cases.encode("base.mp4", *H264, "-g", "8", "-bf", "0")
    _add_readable_videos(cases, base)
    _add_unusual_videos(cases, base)
    _add_cut_and_damaged_videos(cases, base)
    _add_files_that_are_no_video(cases)
    _add_oversized_videos(cases)
    _add_readable_images(cases)
    _add_unreadable_images(cases, base)
    return cases.all


WHOLE = (NUM_FRAMES, HEIGHT, WIDTH)
H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")


def _add_readable_videos(cases: Cases, base: Path) -> None:
    cases.pose("plain h264", base, WHOLE)
    for name, file, options in (
        ("B-frames", "b.mp4", ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "3", "-preset", "medium")),
        ("index in front", "front.mp4", (*H264, "-movflags", "+faststart")),
        ("fragmented mp4", "fragments.mp4", (*H264, "-g", "8", "-movflags", "frag_keyframe+empty_moov")),
        ("hevc", "hevc.mp4", ("-c:v", "libx265", "-x265-params", "log-level=none", "-preset", "ultrafast")),
        ("hevc 10 bit", "hevc10.mp4", ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le")),
        ("h264 10 bit", "10bit.mp4", (*H264[:2], "-pix_fmt", "yuv420p10le")),
        ("h264 4:4:4", "444.mp4", (*H264[:2], "-pix_fmt", "yuv444p")),
        ("h264 rgb", "rgb.mkv", ("-c:v", "libx264rgb")),
        ("full range", "full.mp4", (*H264[:2], "-pix_fmt", "yuvj420p")),
        ("grey", "grey.mkv", ("-c:v", "ffv1", "-pix_fmt", "gray")),
        ("vp9", "vp9.webm", VP9),
        ("vp9 with alpha", "alpha.webm", (*VP9, "-pix_fmt", "yuva420p")),
        ("webm without duration", "live.webm", (*VP9, "-live", "1")),
        ("av1", "av1.mp4", ("-c:v", "libsvtav1", "-preset", "12")),
        ("mpeg-ts", "stream.ts", H264),
        ("gif", "clip.gif", ()),
        ("mjpeg avi", "mjpeg.avi", ("-c:v", "mjpeg")),
        ("mpeg4 avi with B-frames", "mpeg4.avi", ("-c:v", "mpeg4", "-bf", "2")),
        ("prores mov", "prores.mov", ("-c:v", "prores_ks")),
        ("29.97 fps", "ntsc.mp4", (*H264, "-r", "30000/1001")),
        ("late start", "late.mp4", (*H264, "-output_ts_offset", "5")),
        ("late start mkv", "late.mkv", (*H264, "-output_ts_offset", "5")),
    ):
        cases.pose(name, cases.encode(file, *options), WHOLE)


def _add_unusual_videos(cases: Cases, base: Path) -> None:
    for degrees, shape in ((90, (NUM_FRAMES, WIDTH, HEIGHT)), (180, WHOLE), (270, (NUM_FRAMES, WIDTH, HEIGHT))):
        path = cases.write(f"rotated{degrees}.mp4", turned(base.read_bytes(), degrees))
        cases.pose(f"rotated by {degrees} degrees", path, shape)
    path = cases.folder / "edit_list.mp4"
    run_ffmpeg("-ss", "0.7", "-i", base, "-c", "copy", path)
    cases.pose("edit list that hides a pre-roll", path, (12, HEIGHT, WIDTH))
    path = cases.folder / "cover.mp4"
    cover = cases.encode("cover.png", num_frames=1)
    run_ffmpeg(
        "-i", base, "-i", cover, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:1", "attached_pic", path
    )
    cases.pose("cover picture beside the video", path, WHOLE)
    path = cases.folder / "sound.mp4"
    tone = ("-f", "lavfi", "-i", "sine=duration=4")
    run_ffmpeg(*tone, "-i", base, "-map", "0", "-map", "1", "-c:v", "copy", "-c:a", "aac", path)
    cases.pose("longer sound, first in the file", path, WHOLE)
    path = cases.folder / "two.mkv"
    run_ffmpeg("-i", base, "-map", "0:v", "-map", "0:v", "-c", "copy", path)
    cases.pose("two video streams", path, "2 video streams; expected one")
    vfr = ("-vf", r"select='lt(n\,8)+not(mod(n\,3))'", *_passthrough())
    cases.pose("variable frame rate", cases.encode("vfr.mp4", *H264, *vfr, num_frames=14), (14, HEIGHT, WIDTH))
    for pixel_format in ("yuv420p", "yuv444p"):
        odd = ("-c:v", "ffv1", "-vf", f"format=rgb24,scale=97:65,format={pixel_format}")
        cases.pose(f"odd size {pixel_format}", cases.encode(f"odd_{pixel_format}.mkv", *odd), (NUM_FRAMES, 65, 97))
    for file in ("wrong.jpg", "no_extension", "-50%d.mp4", "ü: x.mp4"):
        cases.pose(f"mp4 named {file}", cases.change(base, file, bytes), WHOLE)
    tkhd_size = struct.pack(">II", WIDTH << 16, HEIGHT << 16)
    lie = cases.change(base, "lie.mp4", lambda data: data.replace(tkhd_size, b"\xff\xff\0\0\xff\xff\0\0"))
    cases.pose("track header of 65535 x 65535", lie, WHOLE)
    for num_frames in (1, 4):
        path = cases.encode(f"{num_frames}.mp4", *H264, num_frames=num_frames)
        cases.pose(f"{num_frames} frames", path, f"has {num_frames} frames?; expected at least 5")
    cases.pose("5 frames", cases.encode("5.mp4", *H264, num_frames=5), (5, HEIGHT, WIDTH))
    long = cases.encode("90.mp4", *H264, num_frames=90)
    cases.pose("90 frames", long, "has 90 frames; clips beyond 81 frames are not supported yet; set max_frames to 81")
    cases.pose("90 frames with max_frames 85", long, "has 90 frames", max_frames=85)
    cases.pose("90 frames cut to 81", long, (81, HEIGHT, WIDTH), max_frames=81)
    cases.pose("90 frames cut to 9", long, (9, HEIGHT, WIDTH), max_frames=9)
    fast = cases.encode("fast.mp4", *H264, source=SOURCE.replace("rate=16", "rate=480"))
    cases.pose("480 fps", fast, "480 frames per second; expected at most 240; set fps")
    cases.pose("480 fps with fps set", fast, WHOLE, fps=16)


def turned(mp4: bytes, degrees: int) -> bytes:
    """The same mp4 with a display matrix that turns the picture counter-clockwise."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [value << 16 for value in (cosine, -sine, 0, sine, cosine, 0, 0, 0)] + [1 << 30]
    start = mp4.index(b"tkhd") + 44
    return mp4[:start] + struct.pack(">9i", *matrix) + mp4[start + 36 :]


def _passthrough() -> tuple[str, str]:
    from scail.ffmpeg_process import passthrough_option

    [(name, value)] = passthrough_option(find_ffmpeg()).items()
    return f"-{name}", value


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


def _add_cut_and_damaged_videos(cases: Cases, base: Path) -> None:
    front, folder = cases.folder / "front.mp4", cases.folder
    index_lost = "an mp4 or mov whose index cannot be read: the file is cut short or damaged"
    cases.pose("mp4 cut after 10 bytes", cases.change(base, "cut10.mp4", lambda data: data[:10]), index_lost)
    cases.pose("mp4 cut before its index", cases.change(base, "cut50.mp4", _cut(0.5)), index_lost)
    cases.pose(
        "mp4 without index", cases.change(base, "nomoov.mp4", lambda data: data.replace(b"moov", b"junk")), index_lost
    )
    for percent in (15, 60, 97):
        path = cases.change(front, f"front{percent}.mp4", _cut(percent / 100))
        cases.pose(f"index in front, cut at {percent} %", path, "(cut short: it has|damaged|cannot be read)")
    for file in ("rgb.mkv", "vp9.webm"):
        path = cases.change(folder / file, f"cut_{file}", _cut(0.6))
        cases.pose(f"{file} cut at 60 %", path, r"cut short: it has 1\d of the 24 frames")
    cases.pose("avi cut at 60 %", cases.change(folder / "mpeg4.avi", "cut.avi", _cut(0.6)), "damaged")
    cases.pose("ts cut at 60 %", cases.change(folder / "stream.ts", "cut.ts", _cut(0.6)), "damaged")
    cases.pose(
        "avi that promises 999 frames",
        cases.change(folder / "mjpeg.avi", "promise.avi", _promise_999),
        "cut short: it has 24 of the 999 frames",
    )
    cases.pose("flipped bytes in the pictures", cases.change(base, "flipped.mp4", _flip_pictures), "damaged")
    cases.pose("zeroed pictures", cases.change(base, "zeroed.mp4", _zero_pictures), "damaged")
    cases.pose("random index", cases.change(base, "index.mp4", _scramble_index), "(damaged|cannot be|0 frames)")


def _promise_999(data: bytes) -> bytes:
    """Raise dwTotalFrames of the avi's main header and dwLength of its stream header."""
    main, stream = data.index(b"avih") + 8, data.index(b"strh") + 8
    count = struct.pack("<I", 999)
    data = data[: main + 16] + count + data[main + 20 :]
    return data[: stream + 32] + count + data[stream + 36 :]


def _media(data: bytes) -> tuple[int, int]:
    start = data.index(b"mdat") + 4
    (size,) = struct.unpack(">I", data[start - 8 : start - 4])
    return start, start - 8 + size


def _flip_pictures(data: bytes) -> bytes:
    start, end = _media(data)
    flipped = bytearray(data)
    for position in random.Random(0).sample(range(start + 900, end), 60):
        flipped[position] ^= 0xFF
    return bytes(flipped)


def _zero_pictures(data: bytes) -> bytes:
    start, end = _media(data)
    middle = (start + end) // 2
    return data[:middle] + bytes(end - middle) + data[end:]


def _scramble_index(data: bytes) -> bytes:
    start = data.index(b"stbl")
    return data[: start + 4] + random.Random(1).randbytes(400) + data[start + 404 :]


def _add_files_that_are_no_video(cases: Cases) -> None:
    picture = Image.effect_noise((WIDTH, HEIGHT), 50)
    picture.save(cases.folder / "picture.jpg")
    picture.save(cases.folder / "picture.png")
    rng = random.Random(2)
    for name, data, message in (
        ("nothing", b"", r"the file is empty \(0 bytes\); expected a video"),
        ("html", b"<!DOCTYPE html><html><body>Sign in</body></html>", "the file is an HTML page; expected a video"),
        ("text", b"404: not found\n", "the file is text; expected a video"),
        ("random bytes", rng.randbytes(50_000), "the file is of no known kind"),
        ("jpeg", (cases.folder / "picture.jpg").read_bytes(), "the file is a JPEG image; expected a video"),
        ("png", (cases.folder / "picture.png").read_bytes(), "the file is a PNG image; expected a video"),
        ("pdf", b"%PDF-1.7\n" + rng.randbytes(900), "the file is a PDF"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        ("playlist", _playlist(cases.folder / "base.mp4"), "the file is a playlist"),
        ("concat script", f"ffconcat version 1.0\nfile '{cases.folder / 'base.mp4'}'\n".encode(), "the file is text"),
    ):
        cases.pose(f"{name} named mp4", cases.write(f"{name}.mp4", data), message)
    cases.pose("audio only", _write_wave(cases.folder / "tone.wav"), "expected a video")
    run_ffmpeg("-i", cases.folder / "tone.wav", "-c:a", "aac", cases.folder / "tone.mp4")
    cases.pose("audio only mp4", cases.folder / "tone.mp4", "audio but no video; expected a video")
    path = cases.folder / "tone_with_cover.m4a"
    cover = ("-i", cases.folder / "cover.png", "-map", "0", "-map", "1", "-disposition:v:0", "attached_pic")
    run_ffmpeg("-i", cases.folder / "tone.mp4", *cover, "-c", "copy", path)
    cases.pose("audio with a cover picture", path, "audio but no video; expected a video")
    cases.pose("a folder", cases.folder, "not a regular file")
    os.mkfifo(cases.folder / "fifo.mp4")
    cases.pose("a pipe that nobody writes to", cases.folder / "fifo.mp4", "not a regular file")
    cases.pose("a device", Path("/dev/zero"), "not a regular file")
    cases.pose("a missing file", cases.folder / "missing.mp4", "there is no file .*missing.mp4")


def _playlist(target: Path) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n".encode()


def _write_wave(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(random.Random(3).randbytes(16_000))
    return path


def _add_oversized_videos(cases: Cases) -> None:
    large = cases.encode("4k.mp4", *H264, source="color=red:size=3840x2160:rate=16", num_frames=5)
    cases.pose("4K", large, (5, 2160, 3840))
    larger = cases.encode("8k.mp4", *H264, source="color=red:size=7680x4320:rate=16", num_frames=2)
    cases.pose("8K", larger, r"a frame has 7680 x 4320 pixels; expected 1 to 9,437,184")
    screen = struct.pack("<HH", 65535, 65535)
    gif = cases.change(cases.folder / "clip.gif", "screen.gif", lambda data: data[:6] + screen + data[10:])
    cases.pose("gif of 65535 x 65535", gif, r"a frame has \d+ x \d+ pixels; expected")
    slow = ("-vf", "setpts=N*1000/TB", *_passthrough())
    cases.pose("two and a half hours in 9 frames", cases.encode("slow.mkv", *H264, *slow, num_frames=9), r"lasts \d+ s")
    many = cases.encode("many.mkv", *H264, source="color=red:size=32x32:rate=200", num_frames=20_050)
    cases.pose("20,050 frames", many, "more than 20000 frames", max_frames=81)


def _add_readable_images(cases: Cases) -> None:
    size = (HEIGHT, WIDTH)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    grey16 = Image.fromarray(noise.view(np.uint16)[..., 0])
    upright, turned = Image.Exif(), Image.Exif()
    upright[0x0112], turned[0x0112] = 3, 6
    for name, picture, options, shape in (
        ("jpeg.jpg", rgb, {}, size),
        ("progressive.jpg", rgb, {"progressive": True}, size),
        ("cmyk.jpg", rgb.convert("CMYK"), {}, size),
        ("turned.jpg", rgb, {"exif": turned}, (WIDTH, HEIGHT)),
        ("upside_down.jpg", rgb, {"exif": upright}, size),
        ("transparent.png", rgba, {}, size),
        ("palette.png", rgba.quantize(16), {}, size),
        ("palette_key.png", rgb.quantize(16), {"transparency": 3}, size),
        ("grey_alpha.png", rgba.convert("LA"), {}, size),
        ("grey16.png", grey16, {}, size),
        ("bilevel.png", rgb.convert("1"), {}, size),
        ("picture.webp", rgba, {}, size),
        ("picture.bmp", rgb, {}, size),
        ("picture.tiff", rgb, {}, size),
        ("grey16.tiff", grey16, {}, size),
        ("animation.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}, size),
        ("animation.webp", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}, size),
    ):
        picture.save(cases.folder / name, **options)
        cases.reference(name, cases.folder / name, shape)
    cases.reference("jpeg named png", cases.change(cases.folder / "jpeg.jpg", "jpeg.png", bytes), size)


def _add_unreadable_images(cases: Cases, base: Path) -> None:
    jpeg, png = cases.folder / "jpeg.jpg", cases.folder / "transparent.png"
    for name, path, message in (
        ("empty", cases.write("empty.jpg", b""), r"the file is empty \(0 bytes\); expected an image"),
        ("html", cases.write("login.jpg", b"\n <html><body>Sign in</body></html>"), "an HTML page; expected an image"),
        ("video", base, "the file is an mp4 or mov; expected an image"),
        ("postscript", cases.write("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is text"),
        ("random bytes", cases.write("random.jpg", random.Random(4).randbytes(9000)), "of no known kind"),
        ("jpeg cut at 60 %", cases.change(jpeg, "cut.jpg", _cut(0.6)), "damaged or cut short"),
        (
            "jpeg header alone",
            cases.write("header.jpg", b"\xff\xd8\xff\xe0"),
            "a JPEG image that is damaged or cut short",
        ),
        ("png cut at 60 %", cases.change(png, "cut.png", _cut(0.6)), "damaged or cut short"),
        ("png with flipped bytes", cases.change(png, "flipped.png", _flip_png), "damaged or cut short"),
        ("webp cut at 60 %", cases.change(cases.folder / "picture.webp", "cut.webp", _cut(0.6)), "(damaged|WebP)"),
        ("tiff cut at 60 %", cases.change(cases.folder / "picture.tiff", "cut.tiff", _cut(0.6)), "damaged|TIFF"),
        ("png of 60000 x 60000", cases.write("bomb.png", _png(60_000, 60_000, b"")), "too large|60000 x 60000 pixels"),
        ("png of 9000 x 9000", cases.write("large.png", _png(9000, 9000, bytes(9000))), "9000 x 9000 pixels; expected"),
        ("png with a text bomb", cases.write("text.png", _text_bomb()), "damaged or cut short"),
        ("a folder", cases.folder, "not a regular file"),
        ("a missing file", cases.folder / "missing.png", "there is no file .*missing.png"),
        ("floating-point tiff", _save_tiff(cases.folder / "float.tiff"), "floating-point pixels"),
        ("too small", _save_blank(cases.folder / "small.png", (40, 20)), "40 x 20 pixels; expected at least 32"),
        ("too wide", _save_blank(cases.folder / "wide.png", (400, 64)), r"would keep 16% of it"),
    ):
        cases.reference(f"{name} as reference", path, message)


def _flip_png(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, pixels: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    )


def _text_bomb() -> bytes:
    """A small picture with a comment that unpacks to 256 MiB."""
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    text = b"".join(packer.compress(block) for _ in range(256)) + packer.flush()
    return _png(WIDTH, HEIGHT, bytes((WIDTH + 1) * HEIGHT), _chunk(b"zTXt", b"Comment\0\0" + text))


def _save_tiff(path: Path) -> Path:
    Image.fromarray(np.linspace(0, 1, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)).save(path)
    return path


def _save_blank(path: Path, size: tuple[int, int]) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())
    return path
