import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from scail import video
from scail.errors import EncodeError, InvalidInputError, ScailError
from scail.ffmpeg_process import find_ffmpeg, find_ffprobe, passthrough_option
from scail.video import (
    VideoWriter,
    encode_video,
    frame_rate,
    probe_video,
    read_image,
    read_video,
    write_poster,
)
from tests.tasks.hostile_media import turned

BAR_COLOURS = np.array(
    [
        [255, 255, 255],
        [255, 255, 0],
        [0, 255, 255],
        [0, 255, 0],
        [255, 0, 255],
        [255, 0, 0],
        [0, 0, 255],
        [0, 0, 0],
    ],
    np.uint8,
)


def bars(num_frames=5, height=96):
    """Colour bars, 32 columns each."""
    row = np.repeat(BAR_COLOURS, 32, axis=0)
    return np.broadcast_to(row, (num_frames, height, len(row), 3)).copy()


def moving_gradient(num_frames=10, height=96, width=160):
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([x + 3 * f, y + 2 * f, (x + y) // 2 + f], axis=-1) for f in range(num_frames)]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def psnr(left, right):
    return 10 * np.log10(255**2 / np.mean((left.astype(float) - right) ** 2))


def atoms(path: Path) -> list[bytes]:
    """Names of an mp4's top-level atoms, in order."""
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        size, name = struct.unpack(">I4s", data[position : position + 8])
        names.append(name)
        position += size
    return names


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    encode_video(path, moving_gradient(), fps=16, metadata={"clip": "001", "prompt": 'a "quoted" = ünï\n\0code'})
    return path


def test_frames_survive_the_round_trip(clip):
    frames = read_video(clip)

    assert frames.shape == (10, 96, 160, 3)
    assert frames.dtype == np.uint8
    assert psnr(frames, moving_gradient()) > 40  # crf 17 of a smooth picture; a shift by one frame gives 38


def test_colours_of_bars_survive_the_round_trip_within_two_levels(tmp_path):
    path = tmp_path / "bars.mp4"
    encode_video(path, bars(), fps=16, metadata={})

    middles = read_video(path)[:, 48, 16::32].astype(int)

    assert np.abs(middles - BAR_COLOURS).max() <= 2


def test_a_clip_is_tagged_with_the_matrix_it_was_converted_by(clip):
    with av.open(str(clip)) as container:
        context = container.streams.video[0].codec_context

        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert context.profile == "High"
        assert context.pix_fmt == "yuv420p"


def test_the_provenance_is_read_back_from_the_comment(clip):
    with av.open(str(clip)) as container:
        comment = container.metadata["comment"]

    assert json.loads(comment) == {"clip": "001", "prompt": 'a "quoted" = ünï\n\0code'}


def test_the_index_is_in_front_and_the_first_frame_is_at_zero_without_reordering(clip):
    with av.open(str(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]

    assert atoms(clip).index(b"moov") < atoms(clip).index(b"mdat")
    assert packets[0].pts == 0
    assert all(packet.pts == packet.dts for packet in packets)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (16, Fraction(16)),
        (16.0, Fraction(16)),
        (12.5, Fraction(25, 2)),
        (29.97, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (Fraction(2997, 100), Fraction(2997, 100)),
        (24.5, Fraction(49, 2)),
    ],
)
def test_the_frame_rate_of_the_file_is_exactly_the_one_that_is_meant(tmp_path, fps, expected):
    path = tmp_path / "clip.mp4"
    encode_video(path, moving_gradient(5, 32, 32), fps=fps, metadata={})

    with av.open(str(path)) as container:
        assert frame_rate(fps) == expected
        assert container.streams.video[0].average_rate == expected
    assert probe_video(path).fps == float(expected)


def test_the_same_frames_give_the_same_bytes(tmp_path):
    digests = set()
    for name in ("first.mp4", "second.mp4"):
        encode_video(tmp_path / name, moving_gradient(), fps=16, metadata={"b": 1, "a": 2})
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())

    assert len(digests) == 1


def test_frames_written_in_parts_equal_frames_written_at_once(tmp_path, clip):
    frames = moving_gradient()
    with VideoWriter(tmp_path / "parts.mp4", width=160, height=96, fps=16, metadata={}) as writer:
        writer.write(frames[:1])
        writer.write(frames[1:7])
        writer.write(frames[7:, ::-1, :, :][:, ::-1])  # not contiguous

    np.testing.assert_array_equal(read_video(tmp_path / "parts.mp4"), read_video(clip))


@pytest.mark.parametrize(("width", "height"), [(97, 64), (96, 65), (0, 64)])
def test_odd_sizes_are_refused(tmp_path, width, height):
    with pytest.raises(InvalidInputError, match="both must be even"):
        VideoWriter(tmp_path / "odd.mp4", width=width, height=height, fps=16, metadata={})


def test_frames_of_another_size_are_refused_and_leave_no_file(tmp_path):
    writer = VideoWriter(tmp_path / "clip.mp4", width=64, height=32, fps=16, metadata={})
    wrong = np.zeros((1, 64, 32, 3), np.uint8)

    with pytest.raises(InvalidInputError, match=r"uint8 \(1, 64, 32, 3\); expected uint8 \(n, 32, 64, 3\)"), writer:
        writer.write(wrong)

    assert list(tmp_path.iterdir()) == []


def test_a_killed_ffmpeg_is_an_encode_error_and_leaves_what_was_there_before(clip):
    before = clip.read_bytes()
    frames = np.random.default_rng(0).integers(0, 256, (20, 256, 256, 3), dtype=np.uint8)

    with (  # noqa: PT012 - the error comes at whichever write first meets the closed pipe
        pytest.raises(EncodeError, match="ffmpeg ended with code -9"),
        VideoWriter(clip, width=256, height=256, fps=16, metadata={}) as writer,
    ):
        writer.write(frames)
        os.kill(writer._process.pid, signal.SIGKILL)
        writer.write(frames)

    assert clip.read_bytes() == before
    assert list(clip.parent.iterdir()) == [clip]


def test_an_exception_between_two_writes_kills_ffmpeg_and_leaves_no_file(tmp_path):
    writer = VideoWriter(tmp_path / "clip.mp4", width=64, height=32, fps=16, metadata={})

    with pytest.raises(KeyboardInterrupt), writer:  # noqa: PT012
        writer.write(np.zeros((3, 32, 64, 3), np.uint8))
        raise KeyboardInterrupt

    assert writer._process.returncode is not None
    assert list(tmp_path.iterdir()) == []


def test_a_clip_without_frames_is_an_encode_error(tmp_path):
    with (
        pytest.raises(EncodeError, match=r"no frames were given for clip\.mp4"),
        VideoWriter(tmp_path / "clip.mp4", width=64, height=32, fps=16, metadata={}),
    ):
        pass

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_encode_error_with_ffmpegs_reason(tmp_path):
    with pytest.raises(EncodeError, match="No such file or directory"):
        encode_video(tmp_path / "none" / "clip.mp4", moving_gradient(), fps=16, metadata={})


def test_a_full_disk_is_an_encode_error_and_leaves_no_file(tmp_path):
    full = tmp_path / "bin" / "ffmpeg"
    full.parent.mkdir()
    full.write_text(f'#!/bin/sh\nulimit -f 8\nexec {find_ffmpeg()} "$@"\n')  # no file beyond 4 KiB
    full.chmod(0o755)
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)

    with pytest.raises(EncodeError, match="ffmpeg ended with code"):
        encode_video(tmp_path / "clip.mp4", noise, fps=16, metadata={}, ffmpeg=full)

    assert list(tmp_path.iterdir()) == [full.parent]


def test_a_frame_lost_by_ffmpeg_is_noticed(tmp_path):
    lossy = tmp_path / "bin" / "ffmpeg"
    lossy.parent.mkdir()
    lossy.write_text(
        "#!/bin/sh\nfor argument; do shift\n"
        'case $argument in *.tmp) set -- "$@" -frames:v 4 ;; esac\nset -- "$@" "$argument"\n'
        f'done\nexec {find_ffmpeg()} "$@"\n'
    )
    lossy.chmod(0o755)

    with pytest.raises(EncodeError, match=r"clip\.mp4 has 4 frames; 10 were written"):
        encode_video(tmp_path / "clip.mp4", moving_gradient(10, 32, 32), fps=16, metadata={}, ffmpeg=lossy)


def test_a_talkative_ffmpeg_does_not_stop_the_writer(tmp_path):
    loud = tmp_path / "bin" / "ffmpeg"
    loud.parent.mkdir()
    loud.write_text(f'#!/bin/sh\nhead -c 1000000 /dev/zero >&2\nexec {find_ffmpeg()} "$@"\n')
    loud.chmod(0o755)

    encode_video(tmp_path / "clip.mp4", moving_gradient(), fps=16, metadata={}, ffmpeg=loud)

    assert probe_video(tmp_path / "clip.mp4").num_frames == 10


def test_a_stopped_ffmpeg_is_killed_and_does_not_stop_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "WRITE_SECONDS", 0.5)
    start = time.monotonic()

    with (  # noqa: PT012
        pytest.raises(EncodeError, match="ffmpeg ended with code -9"),
        VideoWriter(tmp_path / "clip.mp4", width=256, height=256, fps=16, metadata={}) as writer,
    ):
        os.kill(writer._process.pid, signal.SIGSTOP)
        writer.write(np.zeros((20, 256, 256, 3), np.uint8))

    assert time.monotonic() - start < 10


def test_writing_and_reading_leave_no_process_thread_or_descriptor(tmp_path):
    encode_video(tmp_path / "clip.mp4", moving_gradient(), fps=16, metadata={})
    read_video(tmp_path / "clip.mp4")
    num_descriptors, num_threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    children = child_processes()

    for _ in range(3):
        encode_video(tmp_path / "clip.mp4", moving_gradient(), fps=16, metadata={})
        read_video(tmp_path / "clip.mp4")

    time.sleep(0.1)  # a cancelled timer's thread ends by itself
    assert len(list(Path("/proc/self/fd").iterdir())) <= num_descriptors
    assert threading.active_count() <= num_threads
    assert child_processes() <= children  # a server that other tests share may be among them


def child_processes() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_decord_and_ffmpeg_read_the_same_pixels(clip):
    info = probe_video(clip)

    by_decord = video._read_with_decord(clip, info, 10)
    by_ffmpeg = video._read_with_ffmpeg(clip, info, 10, find_ffmpeg(), 60)

    np.testing.assert_array_equal(by_decord, by_ffmpeg)


@pytest.mark.parametrize("num_frames", [1, 5, 10, 99])
def test_no_more_than_max_frames_are_read(clip, num_frames):
    frames = read_video(clip, max_frames=num_frames)

    np.testing.assert_array_equal(frames, read_video(clip)[:num_frames])


def test_a_rotated_clip_is_read_upright(clip, tmp_path):
    rotated = tmp_path / "rotated.mp4"
    rotated.write_bytes(turned(clip.read_bytes(), 90))

    frames = read_video(rotated)

    assert (probe_video(rotated).height, probe_video(rotated).width) == (160, 96)
    assert psnr(frames, np.rot90(moving_gradient(), axes=(1, 2))) > 38


def test_hidden_frames_of_a_cut_clip_are_neither_counted_nor_read(tmp_path):
    path, cut = tmp_path / "clip.mp4", tmp_path / "cut.mp4"
    frames = np.stack([np.full((32, 32, 3), 10 * f, np.uint8) for f in range(20)])
    encode_video(path, frames, fps=10, metadata={})
    subprocess.run([find_ffmpeg(), "-v", "error", "-ss", "0.8", "-i", path, "-c", "copy", cut], check=True)

    levels = read_video(cut).mean(axis=(1, 2, 3))

    assert probe_video(cut).num_hidden_frames == 8
    assert np.abs(levels - np.arange(80, 200, 10)).max() < 3


def test_one_flipped_byte_is_noticed_where_decord_alone_would_not(tmp_path):
    path = tmp_path / "clip.mp4"
    rng = np.random.default_rng(0)
    encode_video(path, rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8), fps=16, metadata={})
    data = bytearray(path.read_bytes())
    data[-3000] ^= 0xFF
    path.write_bytes(data)

    with pytest.raises(InvalidInputError, match="the video is damaged"):
        read_video(path)

    assert video._read_with_decord(path, probe_video(path), 5) is not None


def test_a_decoder_that_hangs_is_stopped(clip, tmp_path):
    slow = tmp_path / "bin" / "ffmpeg"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exec {find_ffmpeg()} -version\nexec sleep 60\n')
    slow.chmod(0o755)

    with pytest.raises(InvalidInputError, match="could not be decoded within 1 s"):
        read_video(clip, ffmpeg=slow, timeout=1.0)


def test_a_probe_tells_what_the_file_holds(clip):
    info = probe_video(clip)

    assert (info.width, info.height, info.num_frames, info.fps) == (160, 96, 10, 16.0)
    assert (info.codec, info.pixel_format, info.rotation, info.has_audio) == ("h264", "yuv420p", 0, False)
    assert "mp4" in info.container
    assert info.duration_seconds == pytest.approx(10 / 16)
    assert info.start_seconds == 0


@pytest.mark.skipif(find_ffprobe() is None, reason="there is no ffprobe on this machine")
def test_ffprobe_and_pyav_tell_the_same(clip, tmp_path, monkeypatch):
    cut = tmp_path / "cut.mp4"
    subprocess.run([find_ffmpeg(), "-v", "error", "-ss", "0.3", "-i", clip, "-c", "copy", cut], check=True)
    by_ffprobe = [probe_video(path) for path in (clip, cut)]
    monkeypatch.setattr("scail.probe.find_ffprobe", lambda _ffmpeg: None)

    by_pyav = [probe_video(path) for path in (clip, cut)]

    for one, other in zip(by_pyav, by_ffprobe, strict=True):
        assert one == replace(other, duration_seconds=one.duration_seconds)
        assert one.duration_seconds == pytest.approx(other.duration_seconds, abs=0.5 / one.fps)


def test_a_playlist_cannot_make_ffmpeg_open_another_file(clip, tmp_path):
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n")

    with pytest.raises(InvalidInputError, match="the file is a playlist"):
        probe_video(playlist)


def test_the_configured_ffmpeg_is_taken_and_must_exist(tmp_path):
    assert find_ffmpeg(find_ffmpeg()) == find_ffmpeg()
    with pytest.raises(ScailError, match="ffmpeg was configured as"):
        find_ffmpeg(tmp_path / "none")


def test_without_ffmpeg_on_the_path_the_one_of_imageio_is_taken(monkeypatch, tmp_path):
    from scail import ffmpeg_process

    monkeypatch.setenv("PATH", str(tmp_path))
    ffmpeg_process._default_ffmpeg.cache_clear()
    try:
        assert "imageio_ffmpeg" in str(find_ffmpeg())
    finally:
        ffmpeg_process._default_ffmpeg.cache_clear()


@pytest.mark.parametrize(
    ("version", "option"),
    [("4.4.2-0ubuntu0.22.04.1", "vsync"), ("5.1.9-0+deb12u1", "fps_mode"), ("n9.0.2-17-g2a", "fps_mode")],
)
def test_every_ffmpeg_is_told_in_its_own_words_to_pass_frames_through(tmp_path, version, option):
    ffmpeg = tmp_path / f"ffmpeg-{option}-{version[:1]}"
    ffmpeg.write_text(f"#!/bin/sh\necho ffmpeg version {version} Copyright\n")
    ffmpeg.chmod(0o755)

    assert passthrough_option(ffmpeg) == {option: "passthrough"}


def test_exif_orientation_is_honoured(tmp_path):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)

    image = read_image(tmp_path / "turned.png")

    np.testing.assert_array_equal(image, np.rot90(picture, k=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(tmp_path, mode):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16, :, 3] = 255
    picture = Image.fromarray(pixels)
    (picture.quantize(4) if mode == "P" else picture.convert(mode)).save(tmp_path / "picture.png")

    image = read_image(tmp_path / "picture.png")

    assert image.shape == (32, 32, 3)
    assert (image[:16] == 0).all()
    assert (image[16:] == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    levels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(levels).save(tmp_path / "grey.png")

    image = read_image(tmp_path / "grey.png")

    np.testing.assert_array_equal(image, np.repeat((levels >> 8)[..., None], 3, axis=-1))


def test_an_opaque_image_is_read_bit_by_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")

    np.testing.assert_array_equal(read_image(tmp_path / "picture.png"), pixels)


def test_a_poster_is_a_jpeg_of_the_frame_and_nothing_else_is_left(tmp_path):
    frame = moving_gradient()[5]

    write_poster(tmp_path / "poster.jpg", frame)

    assert psnr(np.asarray(Image.open(tmp_path / "poster.jpg")), frame) > 35
    assert [path.name for path in tmp_path.iterdir()] == ["poster.jpg"]


def test_messages_carry_no_address_of_the_process(tmp_path):
    path = tmp_path / "clip.mp4"
    encode_video(path, moving_gradient(), fps=16, metadata={})
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(2000)
    path.write_bytes(data)

    with pytest.raises(InvalidInputError, match=r"\d of 10 frames") as error:
        read_video(path)

    assert not re.search("0x[0-9a-f]{4}", str(error.value))
