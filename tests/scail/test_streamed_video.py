from __future__ import annotations

import threading

import numpy as np
import pytest

from scail.errors import EncodeError, Interrupted, InvalidInputError
from scail.streamed_video import StreamedVideo
from scail.video import VideoWriter, encode_video, read_video

NUM_FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)


def test_frames_that_come_in_pieces_give_the_bytes_of_frames_that_come_at_once(frames, tmp_path):
    encode_video(tmp_path / "whole.mp4", frames, fps=24.0, metadata={"clip": "a"})

    with StreamedVideo(tmp_path / "pieces.mp4", fps=24.0, metadata={"clip": "a"}) as video:
        for start, stop in ((0, 1), (1, 5), (5, 9)):
            video.write(frames[start:stop])
        video.finish()

    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert len(read_video(tmp_path / "pieces.mp4")) == NUM_FRAMES


def test_whoever_computes_frames_does_not_wait_for_the_encoder(frames, tmp_path, monkeypatch):
    may_write, write = threading.Event(), VideoWriter.write

    def wait_and_write(writer, chunk):
        assert may_write.wait(20)
        write(writer, chunk)

    monkeypatch.setattr(VideoWriter, "write", wait_and_write)

    with StreamedVideo(tmp_path / "clip.mp4", fps=24.0, metadata={}) as video:
        for frame in frames:
            video.write(frame[None])
        assert not (tmp_path / "clip.mp4").exists()
        may_write.set()
        video.finish()

    assert len(read_video(tmp_path / "clip.mp4")) == NUM_FRAMES


def write(path, *pieces, error=None) -> None:
    with StreamedVideo(path, fps=24.0, metadata={}) as video:
        for piece in pieces:
            video.write(piece)
        if error is not None:
            raise error
        video.finish()


@pytest.mark.parametrize("num_written", [0, 4])
def test_a_render_that_fails_leaves_no_file(frames, tmp_path, num_written):
    with pytest.raises(Interrupted, match="a test said so"):
        write(tmp_path / "clip.mp4", *frames[:num_written, None], error=Interrupted("a test said so"))

    assert [*tmp_path.iterdir()] == []


def test_what_the_encoder_complains_of_is_raised_at_the_end(frames, tmp_path):
    with pytest.raises(InvalidInputError, match="both must be even"):
        write(tmp_path / "clip.mp4", frames[:, :-1], frames)

    assert [*tmp_path.iterdir()] == []


def test_a_clip_without_frames_is_an_error(tmp_path):
    with pytest.raises(EncodeError, match=r"no frames were given for clip\.mp4"):
        write(tmp_path / "clip.mp4")
