import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail.config import SamplingParams
from scail.errors import InvalidInputError
from scail.video import MediaLimits, encode_video, read_video
from tasks import storage
from tasks.inputs import DEFAULT_LIMITS, InputPaths, decode_inputs, fetch_inputs
from tasks.jobs import ClipJob, ClipRequest
from tests.tasks.hostile_media import Case, build_cases

MIB = 2**20


def make_job(reference, pose, **request):
    request = {"row": 7, "clip_id": "clip", "reference": str(reference), "pose": str(pose)} | request
    return ClipJob(request=ClipRequest(**request), key="0" * 32, params=SamplingParams(), checkpoint_fingerprint="none")


def decode(reference, pose, scratch_dir, *, limits=DEFAULT_LIMITS, ffmpeg=None, **request):
    job = make_job(reference, pose, **request)
    return decode_inputs(fetch_inputs(job, scratch_dir), job, limits, ffmpeg=ffmpeg)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with every hostile file."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def cases(media):
    return build_cases(media)


@pytest.fixture(scope="module")
def outcomes(cases, media, tmp_path_factory):
    """What came of every case: the shape of its pixels or the message. Two rows at a time, as a worker prefetches."""
    scratch_dir = tmp_path_factory.mktemp("scratch")

    def outcome(row: list[Case]):
        files = {"reference": media / "small.jpg", "pose": media / "base.mp4"} | {
            case.column: case.path for case in row
        }
        request = {"width": 64, "height": 64} | {name: case.request[name] for case in row for name in case.request}
        try:
            inputs = decode(**files, scratch_dir=scratch_dir, **request)
        except InvalidInputError as error:
            return {case.name: str(error) for case in row}
        return {case.name: getattr(inputs, case.column).shape[:-1] for case in row}

    Image.new("RGB", (64, 64)).save(media / "small.jpg")
    before, found = _resources(), {}
    with ThreadPoolExecutor(2) as pool:
        for some in pool.map(outcome, _rows(cases)):
            found |= some
    return found, before, _resources(), sorted(scratch_dir.iterdir())


def _rows(cases: list[Case]) -> list[list[Case]]:
    """Two readable files share a row, which saves decoding; a file that must fail has a row of its own."""
    references = [case for case in cases if case.shape and case.column == "reference"]
    poses = [case for case in cases if case.shape and case.column == "pose"]
    failing = [[case] for case in cases if not case.shape]
    return failing + [[case for case in row if case] for row in zip_longest(references, poses)]


def _resources():
    """Resident memory, open descriptors and children of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = [task.read_text() for task in Path("/proc/self/task").glob("*/children")]
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir())), "".join(children).split()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_every_hostile_file_has_its_expected_outcome(cases, outcomes):
    found, *_ = outcomes

    wrong = [
        f"{case.name}: {found[case.name]!r}, expected {case.shape or case.message!r}"
        for case in cases
        if found[case.name] != case.shape
        and not (
            case.message and re.search(rf"^line 7, column {case.column}: .*({case.message})", str(found[case.name]))
        )
    ]

    assert len(cases) >= 100
    assert not wrong, "\n".join(wrong)


def test_hostile_files_leave_memory_descriptors_processes_and_scratch_as_they_were(outcomes):
    _, (memory, num_descriptors, children), (memory_after, num_descriptors_after, children_after), left = outcomes

    assert memory_after - memory < 30 * MIB
    assert num_descriptors_after <= num_descriptors
    assert set(children_after) <= set(children)  # a server that other tests share may be among them
    assert left == []


@pytest.fixture
def files(tmp_path):
    """A portrait reference and a matching pose of 9 frames."""
    rng = np.random.default_rng(0)
    reference, pose = tmp_path / "reference.png", tmp_path / "pose.mp4"
    Image.fromarray(rng.integers(0, 256, (96, 64, 3), dtype=np.uint8)).save(reference)
    encode_video(pose, rng.integers(0, 256, (9, 96, 64, 3), dtype=np.uint8), fps=12.5, metadata={})
    return reference, pose


def test_pixels_come_back_from_quarantine_unchanged(files, tmp_path):
    reference, pose = files

    inputs = decode(reference, pose, tmp_path / "scratch")

    np.testing.assert_array_equal(inputs.reference, np.asarray(Image.open(reference)))
    np.testing.assert_array_equal(inputs.pose, read_video(pose))
    assert inputs.fps == 12.5
    assert inputs.reference_size == (96, 64)
    assert inputs.pose_info.num_frames == 9


def test_max_frames_cuts_the_pose_and_fps_of_the_row_wins(files, tmp_path):
    inputs = decode(*files, tmp_path / "scratch", max_frames=5, fps=24.0)

    assert len(inputs.pose) == 5
    assert inputs.pose_info.num_frames == 9
    assert inputs.fps == 24.0


def test_a_landscape_pose_for_a_portrait_reference_says_which_orientation_is_expected(files, tmp_path):
    reference, _ = files
    pose = tmp_path / "landscape.mp4"
    encode_video(pose, np.zeros((5, 512, 896, 3), np.uint8), fps=16, metadata={})

    with pytest.raises(InvalidInputError) as error:
        decode(reference, pose, tmp_path / "scratch")

    assert str(error.value) == (
        "line 7, column pose: the picture is landscape (896 x 512) and the clip is portrait (512 x 896): "
        "the centre crop would keep 33% of it; expected a portrait picture, or width and height in the row."
    )


def test_the_share_of_the_pose_that_the_crop_keeps_is_reported(files, tmp_path):
    inputs = decode(*files, tmp_path / "scratch", width=64, height=64)

    assert inputs.pose_kept_share == pytest.approx(2 / 3)


def test_a_decoder_that_hangs_is_stopped_with_everything_below_it(files, tmp_path):
    pid_file = tmp_path / "pid"
    ffmpeg = _fake_ffprobe(tmp_path, f"echo $$ > {pid_file}; exec sleep 300")
    start = time.monotonic()

    with pytest.raises(InvalidInputError, match=r"line 7, column pose: .* the decoder was stopped after 1\.5 s"):
        decode(*files, tmp_path / "scratch", limits=replace(DEFAULT_LIMITS, seconds=1.5), ffmpeg=ffmpeg)

    assert time.monotonic() - start < 10
    assert not _is_running(int(pid_file.read_text()))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_decoder_that_crashes_is_the_files_fault_and_leaves_the_worker_alive(files, tmp_path):
    ffmpeg = _fake_ffprobe(tmp_path, "kill -SEGV $PPID; exec sleep 300")

    with pytest.raises(InvalidInputError, match=r"line 7, column pose: .* ended with signal 11 \(SIGSEGV\)"):
        decode(*files, tmp_path / "scratch", ffmpeg=ffmpeg)

    assert decode(*files, tmp_path / "scratch").pose.shape == (9, 96, 64, 3)


def test_a_decoder_that_swells_is_refused_its_memory(files, tmp_path):
    _, pose = files
    reference = tmp_path / "large.png"
    Image.new("RGB", (7000, 7000)).save(reference, compress_level=1)

    with pytest.raises(InvalidInputError, match=r"line 7, column reference: .* more than 0\.3 GiB of memory"):
        decode(reference, pose, tmp_path / "scratch", limits=replace(DEFAULT_LIMITS, memory_bytes=300 * MIB))


def test_a_broken_installation_is_not_the_files_fault(files, tmp_path):
    ffmpeg = tmp_path / "no_such_folder" / "ffmpeg"

    with pytest.raises(RuntimeError, match=r"ffmpeg was configured as .*no_such_folder"):
        decode(*files, tmp_path / "scratch", ffmpeg=ffmpeg)


def test_the_decoder_sees_no_credentials(files, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    seen = tmp_path / "environment"
    ffmpeg = _fake_ffprobe(tmp_path, f"env > {seen}; exit 1")

    with pytest.raises(InvalidInputError):
        decode(*files, tmp_path / "scratch", ffmpeg=ffmpeg)

    assert "PATH=" in seen.read_text()
    assert "AWS_SECRET_ACCESS_KEY" not in seen.read_text()


def _fake_ffprobe(folder: Path, script: str) -> Path:
    """An ffmpeg whose ffprobe does what the script says; the path of the ffmpeg."""
    binaries = folder / "binaries"
    binaries.mkdir()
    for name in ("ffmpeg", "ffprobe"):
        (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
        (binaries / name).chmod(0o755)
    return binaries / "ffmpeg"


def test_limits_of_a_file_are_the_callers(files, tmp_path):
    limits = replace(DEFAULT_LIMITS, media=MediaLimits(max_bytes=100))

    with pytest.raises(InvalidInputError, match=r"line 7, column reference: .* bytes; at most 100 are read"):
        decode(*files, tmp_path / "scratch", limits=limits)


def test_a_local_file_is_used_where_it_is(files, tmp_path):
    reference, pose = files

    paths = fetch_inputs(make_job(reference, pose.as_uri()), tmp_path / "scratch")

    assert paths == InputPaths(reference=reference, pose=pose, scratch_dir=tmp_path / "scratch")


def test_a_remote_file_is_brought_to_scratch(files, tmp_path):
    reference, pose = files
    storage.publish_file(pose, "memory://inputs/pose.mp4")

    paths = fetch_inputs(make_job(reference, "memory://inputs/pose.mp4"), tmp_path / "scratch")

    assert paths.pose.parent == tmp_path / "scratch"
    assert paths.pose.read_bytes() == pose.read_bytes()


def test_a_missing_remote_file_names_row_column_and_uri(files, tmp_path):
    reference, _ = files

    with pytest.raises(InvalidInputError, match=r"^line 7, column pose: there is no file memory://inputs/none\.mp4"):
        fetch_inputs(make_job(reference, "memory://inputs/none.mp4"), tmp_path / "scratch")
