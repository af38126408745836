import csv
import time
from collections import Counter
from itertools import pairwise

import pytest

from tasks import plan, storage
from tasks.checkpoint import CheckpointInfo
from tasks.errors import RefusedError
from tasks.jobs import ClipRequest, ClipStatus, DoneRecord
from tasks.plan import LISTING_PAYS_FROM, find_done, forecast_plan, forecast_rows, plan_clips, read_rows
from tasks.settings import Settings
from tasks.storage import DEFAULT_POLICY
from tests.tasks.test_results import metrics_of

FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for kind, suffix in (("ref", "png"), ("pose", "mp4")):
        for number in range(3):
            (folder / f"{kind}{number}.{suffix}").write_bytes(f"{kind} {number}".encode())
    return folder


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


@pytest.fixture
def request_of(inputs):
    def build(row, reference=0, pose=0, **changes):
        names = {"reference": f"{inputs}/ref{reference}.png", "pose": f"{inputs}/pose{pose}.mp4"}
        return ClipRequest(**{"row": row, "clip_id": f"c{row}", **names} | changes)

    return build


def planned(requests, output):
    return plan_clips(
        requests,
        output_uri=output,
        checkpoint_fingerprint=FINGERPRINT,
        default_profile="quality",
        policy=DEFAULT_POLICY,
        threads=4,
    )


def publish(job, output, *, video=b"video", **changes):
    """Leave what a worker leaves of a clip."""
    folder = f"clips/{job.clip_id}"
    record = DoneRecord(
        key=job.key,
        clip_id=job.clip_id,
        video=f"{folder}/video.mp4",
        poster=f"{folder}/poster.jpg",
        metrics=f"{folder}/metrics.json",
        video_size=len(video),
        video_md5="",
    )
    metrics = metrics_of(job.clip_id, key=job.key, checkpoint_fingerprint=FINGERPRINT, **changes)
    storage.publish_bytes(storage.join(output, record.video), video)
    storage.publish_bytes(storage.join(output, record.metrics), metrics.model_dump_json().encode())
    storage.publish_bytes(storage.join(output, "done", f"{job.key}.json"), record.model_dump_json().encode())


@pytest.fixture(params=["asked one by one", "listed"])
def lookup(request, monkeypatch):
    """Both ways to find done records."""
    monkeypatch.setattr(plan, "LISTING_PAYS_FROM", 0 if request.param == "listed" else LISTING_PAYS_FROM)


def test_a_file_that_many_rows_name_is_hashed_once(request_of, output, monkeypatch):
    content_md5, asked = storage.content_md5, Counter()
    monkeypatch.setattr(storage, "content_md5", lambda uri, **kw: asked.update([uri]) or content_md5(uri, **kw))

    found = planned([request_of(row, reference=row % 3, pose=row % 2, seed=row) for row in range(2, 62)], output)

    assert len(found.jobs) == 60
    assert len(asked) == 5
    assert set(asked.values()) == {1}


def test_a_done_clip_is_skipped_with_its_files(request_of, output, lookup):
    rows = [request_of(2), request_of(3, seed=1)]
    publish(planned(rows, output).jobs[0], output)

    again = planned(rows, output)

    assert [job.clip_id for job in again.jobs] == ["c3"]
    [skipped] = again.settled
    assert (skipped.status, skipped.row) == (ClipStatus.SKIPPED, 2)
    assert skipped.video == f"{output}/clips/c2/video.mp4"
    assert skipped.metrics.key == skipped.key


@pytest.mark.parametrize("damage", ["no video", "other size", "other key", "no metrics", "damaged record"])
def test_a_done_record_counts_only_while_what_it_names_is_there(damage, request_of, output, lookup):
    [job] = planned([request_of(2)], output).jobs
    publish(job, output)
    video, metrics = f"{output}/clips/c2/video.mp4", f"{output}/clips/c2/metrics.json"
    match damage:
        case "no video":
            storage.delete(video)
        case "other size":
            storage.publish_bytes(video, b"cut")
        case "other key":
            storage.publish_bytes(metrics, metrics_of("c2", key="another").model_dump_json().encode())
        case "no metrics":
            storage.delete(metrics)
        case "damaged record":
            storage.publish_bytes(f"{output}/done/{job.key}.json", b"{")

    again = planned([request_of(2)], output)

    assert [job.clip_id for job in again.jobs] == ["c2"]
    assert find_done(output, job.key, policy=DEFAULT_POLICY) is None


def test_rows_of_equal_content_are_looked_up_and_rendered_once(request_of, output, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "find_done", lambda _output, key, **_policy: asked.append(key))

    found = planned([request_of(2, seed=1), request_of(3, seed=1), request_of(4, seed=1)], output)

    [job] = found.jobs
    assert job.clip_id == "c2"
    assert [twin.clip_id for twin in found.twins[job.key]] == ["c3", "c4"]
    assert asked == [job.key]


def test_a_file_that_is_missing_fails_every_row_that_names_it_and_no_other(request_of, output, inputs):
    (inputs / "pose1.mp4").unlink()

    found = planned([request_of(2, pose=1), request_of(3), request_of(4, pose=1)], output)

    assert [job.clip_id for job in found.jobs] == ["c3"]
    assert [(result.row, result.status) for result in found.settled] == [(2, "failed"), (4, "failed")]
    assert "line 4, column pose" in found.settled[1].message
    assert found.settled[0].error_class == "NotFoundError"


def test_a_disabled_row_is_not_even_hashed(request_of, output, inputs):
    (inputs / "ref2.png").unlink()

    found = planned([request_of(2, reference=2, enabled=False), request_of(3)], output)

    assert [result.status for result in found.settled] == ["disabled"]


def test_a_grid_is_ordered_so_that_neighbours_share_their_pose_then_their_reference(request_of, output):
    cells = [(ref, pose, prompt) for prompt in "ab" for ref in (0, 1) for pose in (0, 1, 2)]
    rows = [request_of(row, ref, pose, prompt=prompt) for row, (ref, pose, prompt) in enumerate(cells, start=2)]

    jobs = planned(rows, output).jobs

    def changes(name):
        values = [getattr(job.request, name) for job in jobs]
        return sum(before != after for before, after in pairwise(values))

    assert changes("pose") == 2  # three poses: each is prepared once
    assert changes("reference") == 5  # two references under each pose
    assert len(jobs) == len(cells)


def test_priority_comes_before_sharing_and_rows_that_share_nothing_keep_their_order(request_of, output, inputs):
    for number in range(3, 9):
        (inputs / f"pose{number}.mp4").write_bytes(b"pose %d" % number)
        (inputs / f"ref{number}.png").write_bytes(b"ref %d" % number)
    apart = [request_of(row, row, row) for row in (8, 3, 6, 5)]
    shared = [
        request_of(20, 0, 0),
        request_of(21, 1, 1),
        request_of(22, 0, 0, seed=5),
        request_of(23, 2, 2, priority=1),
    ]

    assert [job.clip_id for job in planned(apart, output).jobs] == ["c8", "c3", "c6", "c5"]
    assert [job.clip_id for job in planned(shared, output).jobs] == ["c23", "c20", "c22", "c21"]


def test_without_the_right_to_list_each_record_is_asked_for(request_of, output, monkeypatch):
    [job] = planned([request_of(2)], output).jobs
    publish(job, output)
    monkeypatch.setattr(plan, "LISTING_PAYS_FROM", 0)

    def forbidden(uri, **_kwargs):
        raise storage.PermissionDeniedError(uri)

    monkeypatch.setattr(storage, "list_files", forbidden)

    assert [result.status for result in planned([request_of(2)], output).settled] == ["skipped"]


def test_done_records_that_cannot_be_listed_refuse_the_run(request_of, output, monkeypatch):
    monkeypatch.setattr(plan, "LISTING_PAYS_FROM", 0)

    def broken(uri, **_kwargs):
        raise storage.StorageError(f"{uri}: 503", transient=True)

    monkeypatch.setattr(storage, "list_files", broken)

    with pytest.raises(RefusedError, match="503"):
        planned([request_of(2)], output)


def test_the_forecast_of_a_plan_learns_from_the_clips_it_skips(request_of, output):
    rows = [request_of(row, seed=row) for row in range(2, 12)]
    for job in planned(rows, output).jobs[:6]:
        publish(job, output, pose_uri=job.request.pose)
    model = CheckpointInfo(path="", name="SCAIL_14B", fingerprint=FINGERPRINT, notice="")

    found = forecast_plan(
        planned(rows, output), output_uri=output, model=model, settings=Settings(price_per_gpu_hour=3600.0)
    )

    assert found.num_clips == 4
    assert found.gpu_seconds == pytest.approx(4 * 43.5, rel=0.01)  # what they took on the GPU
    assert found.cost == pytest.approx(found.gpu_seconds)
    assert "learned from 6 earlier clips" in found.basis


def test_the_forecast_of_bare_rows_knows_the_model_and_the_device(tmp_path):
    (tmp_path / "m.csv").write_text("reference,pose,enabled\na.png,a.mp4,\nb.png,b.mp4,no\n")
    rows = read_rows(str(tmp_path / "m.csv"), skip_invalid=False)

    def forecast(**settings):
        return forecast_rows(
            rows, checkpoint=str(tmp_path / "none"), default_profile="fast", settings=Settings(**settings)
        )

    assert forecast().num_clips == 1
    assert 4 * 5.93 < forecast().gpu_seconds < 4 * 5.93 + 5
    assert forecast(device="cpu").gpu_seconds is None


def test_ten_thousand_rows_are_planned_and_skipped_in_seconds(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.bin").write_bytes(b"input %d" % number)
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "reference", "pose", "prompt"])
        for number in range(10_000):
            names = f"in/{number % 100}.bin", f"in/{100 + number // 100}.bin"
            writer.writerow([f"c{number}", *names, f"prompt {number}"])
    output = str(tmp_path / "out")

    start = time.perf_counter()
    rows = read_rows(str(tmp_path / "m.csv"), skip_invalid=False)
    first = planned(rows.requests, output)
    seconds = time.perf_counter() - start
    for job in first.jobs[:200]:
        publish(job, output)
    start = time.perf_counter()
    again = planned(rows.requests, output)
    seconds_with_skips = time.perf_counter() - start

    assert len(first.jobs) == 10_000
    assert (len(again.jobs), len(again.settled)) == (9_800, 200)
    assert seconds < 20
    assert seconds_with_skips < 20


def test_a_profile_of_other_arithmetic_is_another_clip_with_the_same_seed(request_of, output):
    found = planned([request_of(2, profile="exact"), request_of(3, profile="quality")], output)

    exact, quality = found.jobs
    assert exact.key != quality.key
    assert exact.params == quality.params


def test_rows_of_one_arithmetic_come_together(request_of, output):
    profiles = {2: "exact", 3: "quality", 4: "exact", 5: "fast"}

    found = planned([request_of(row, row % 3, profile=profile) for row, profile in profiles.items()], output)

    assert [job.clip_id for job in found.jobs] == ["c2", "c4", "c5", "c3"]  # c5 shares its reference with c2


def test_a_profile_that_is_not_known_is_refused(request_of, output):
    with pytest.raises(RefusedError, match="profile is 'turbo'; expected one of exact, quality, fast"):
        plan_clips(
            [request_of(2)],
            output_uri=output,
            checkpoint_fingerprint=FINGERPRINT,
            default_profile="turbo",
            policy=DEFAULT_POLICY,
            threads=1,
        )


def test_a_row_that_wants_exact_products_of_rounded_weights_fails_while_planning(request_of, output):
    found = plan_clips(
        [request_of(2, profile="exact"), request_of(3, profile="quality")],
        output_uri=output,
        checkpoint_fingerprint=FINGERPRINT,
        default_profile="exact",
        stored_quantization="fp8",
        policy=DEFAULT_POLICY,
        threads=1,
    )

    [failed] = found.settled
    assert (failed.row, failed.status) == (2, ClipStatus.FAILED)
    assert "line 2: the checkpoint is quantised (fp8), profile exact needs the weights" in failed.message
    assert [job.clip_id for job in found.jobs] == ["c3"]
