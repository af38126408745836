"""Every fault, with real processes. After each: every clip is there once and whole, and the results say so."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

from scail.video import encode_video, read_video
from tasks import storage
from tasks.checkpoint import MINIATURE, inspect_checkpoint
from tasks.jobs import AttemptStage
from tasks.plan import plan_clips, read_rows
from tasks.storage import DEFAULT_POLICY
from tests.chaos.harness import (
    NUM_WORKERS,
    STAGE_LIMIT_SECONDS,
    assert_all_rendered,
    attempts_of,
    done_clips,
    metrics_of,
    new_mount_namespace,
    num_computed,
    stop_signal,
    wait_for_computing,
    wait_until,
    workers_with_a_neighbour,
    write_clips,
)
from tests.scail.mini.two_acts import follows, two_acts
from tests.tasks.emulators import BUCKET
from tests.tasks.fault_proxy import Fault

SLOW = "slow 0.3"  # per step; a clip is on the GPU for more than a second


def test_two_manifests_on_two_workers_load_the_model_twice(cluster, tmp_path):
    loads, workers = cluster.model_loads(), cluster.workers()

    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        run = cluster.render(write_clips(folder, ["hello"] * 3), folder / "out")
        assert_all_rendered(cluster, run, 3)

    assert cluster.workers() == workers
    assert (loads, cluster.model_loads()) == (NUM_WORKERS, NUM_WORKERS)


def test_processes_of_this_machine_have_a_gpu_each_prepare_beside_it_and_are_replaced(cluster, tmp_path, monkeypatch):
    before = cluster.gpu_of_each_load()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,GPU-9")  # neither is here: the clips are rendered on the CPU
    miniature = shutil.copytree(MINIATURE, tmp_path / "miniature")  # a record of its files is written there
    run = cluster.render(write_acts(tmp_path), tmp_path / "out", workers="2", checkpoint=miniature)
    killed = wait_for_computing(run)
    wait_until(partial(workers_with_a_neighbour, run.output), "one clip is on a GPU and the next one waits for it")
    killed.kill()

    assert_all_rendered(cluster, run, 4)
    assert num_computed(run.output) <= 5
    assert_clips_follow_their_poses(run.output)
    (first, first_gpu), (second, second_gpu), (_, gpu_of_new) = [
        load for load in cluster.gpu_of_each_load().items() if load[0] not in before
    ]
    assert sorted((first_gpu, second_gpu)) == ["GPU-7", "GPU-9"]
    assert gpu_of_new == {first: first_gpu, second: second_gpu}[killed.pid]


def write_acts(folder: Path) -> Path:
    """A manifest for the miniature: a character in its own act and in another's, and both with another seed."""
    acts = two_acts()
    Image.fromarray(acts.first.reference).save(folder / "reference.png")
    for name, item in (("own", acts.first), ("other", acts.second)):
        encode_video(folder / f"{name}.mp4", item.pose, fps=16.0, metadata={})
    rows = [
        f"clip-{number},reference.png,{pose}.mp4,{SLOW},128,224,4,1,{number}\n"
        for number, pose in enumerate(("own", "other", "own", "other"))
    ]
    path = folder / "manifest.csv"
    path.write_text(
        "clip_id,reference,pose,prompt,width,height,num_inference_steps,guidance_scale,seed\n" + "".join(rows)
    )
    return path


def assert_clips_follow_their_poses(output: Path) -> None:
    """Whichever worker rendered them, and whatever came between."""
    acts = two_acts()
    own, other = acts.first.truth, acts.exchanged
    for clip_id, record in done_clips(output).items():
        asked, not_asked = (own, other) if clip_id in {"clip-0", "clip-2"} else (other, own)
        assert follows(read_video(output / record.video), asked, not_asked), clip_id


def test_a_worker_killed_mid_clip_costs_one_clip(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [SLOW] * 4), tmp_path / "out")
    wait_for_computing(run).kill()

    assert_all_rendered(cluster, run, 4)
    assert num_computed(run.output) <= 5


def test_a_worker_killed_with_its_nanny_comes_back(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [SLOW] * 4), tmp_path / "out")
    worker = wait_for_computing(run)
    nanny = worker.parent()
    nanny.kill()
    worker.kill()

    assert_all_rendered(cluster, run, 4)
    assert num_computed(run.output) <= 5
    cluster.wait_for_workers()


def test_a_stopped_worker_loses_its_clip_to_another(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [SLOW] * 4), tmp_path / "out")
    worker = wait_for_computing(run)
    stop_signal(worker)

    assert_all_rendered(cluster, run, 4)
    assert num_computed(run.output) <= 5
    wait_until(lambda: not worker.is_running(), "the watchdog has ended the stopped process", 2 * STAGE_LIMIT_SECONDS)


def test_a_killed_scheduler_that_comes_back_loses_nothing(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, [SLOW] * 4), tmp_path / "out")
    wait_for_computing(run)
    cluster.kill("scheduler")
    time.sleep(1)
    cluster.start_scheduler()

    assert_all_rendered(cluster, run, 4)
    assert num_computed(run.output) <= 4 + NUM_WORKERS


def test_a_manifest_whose_run_was_killed_is_finished_by_the_next_run(cluster, tmp_path):
    manifest = write_clips(tmp_path, [SLOW] * 6)
    killed = cluster.render(manifest, tmp_path / "out", name="killed")
    wait_for_computing(killed)
    wait_until(lambda: done_clips(killed.output), "a clip is done")
    killed.process.kill()
    killed.process.wait()

    run = cluster.render(manifest, tmp_path / "out", name="again")

    assert run.wait() == 0, run.tail()
    assert len(done_clips(run.output)) == 6
    assert Counter(run.statuses())["skipped"] >= 1
    assert num_computed(run.output) <= 6 + NUM_WORKERS
    assert cluster.flow_state(run) == "COMPLETED"


def test_a_poison_clip_fails_after_three_workers_and_the_others_finish(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, ["hello", "poison", "hello", "hello"]), tmp_path / "out")

    assert run.wait() == 1, run.tail()
    rows = run.rows()
    assert set(done_clips(run.output)) == {"clip-0", "clip-2", "clip-3"}
    assert [rows[f"clip-{number}"]["status"] for number in range(4)] == ["rendered", "failed", "rendered", "rendered"]
    assert rows["clip-1"]["error_class"] == "TooManyStartsError"
    assert "3 workers in a row ended" in rows["clip-1"]["message"]
    assert cluster.flow_state(run) == "FAILED"


def test_a_hang_in_native_code_is_ended_and_the_clip_goes_elsewhere(cluster, tmp_path):
    run = cluster.render(write_clips(tmp_path, ["hang-once", "hello", "hello"]), tmp_path / "out")

    assert_all_rendered(cluster, run, 3)
    assert num_computed(run.output) == 4


def test_what_the_gpu_does_to_a_clip_is_tried_again_where_it_may_help(cluster, tmp_path):
    loads = cluster.model_loads()
    prompts = ["cuda-once", "memory-once", "nan-once", "hello"]

    run = cluster.render(write_clips(tmp_path, prompts), tmp_path / "out")

    assert_all_rendered(cluster, run, 4)
    log = {clip: metrics_of(run.output, record).attempt_log for clip, record in done_clips(run.output).items()}
    outcomes = {clip: [attempt.outcome for attempt in attempts] for clip, attempts in log.items()}
    assert outcomes["clip-0"][-2:] == ["DeviceFaultError", "published"]
    assert outcomes["clip-1"][-2:] == ["OutOfMemoryError", "published"]
    assert outcomes["clip-2"][-2:] == ["GenerationError", "published"]
    assert log["clip-0"][-2].worker != log["clip-0"][-1].worker
    assert log["clip-1"][-2].worker == log["clip-1"][-1].worker
    cluster.wait_for_workers()
    assert cluster.model_loads() == loads + 1


@pytest.mark.skipif(not new_mount_namespace(), reason="a disk small enough to be filled cannot be mounted here")
def test_a_full_disk_fails_rows_that_the_next_run_renders(cluster, tmp_path):
    manifest = write_clips(tmp_path, [SLOW] * 4)
    full = cluster.render(manifest, tmp_path / "out", name="full")
    wait_for_computing(full)
    cluster.fill_disks()
    try:
        assert full.wait() == 1, full.tail()
    finally:
        cluster.empty_disks()
    failed = [row for row in full.rows().values() if row["status"] == "failed"]
    attempts = [attempt for of_clip in attempts_of(full.output).values() for attempt in of_clip]
    state = cluster.flow_state(full)

    run = cluster.render(manifest, tmp_path / "out", name="again")

    assert {row["error_class"] for row in failed} == {"ScratchFullError"}
    assert any("No space left on device" in (attempt.message or "") for attempt in attempts), attempts
    assert state == "FAILED"
    assert run.wait() == 0, run.tail()
    assert len(done_clips(run.output)) == 4
    assert Counter(run.statuses())["rendered"] == len(failed)


def test_a_bucket_that_goes_read_only_ends_the_run_and_the_next_one_resumes(cluster, bucket, tmp_path):
    output = f"gs://{BUCKET}/out"
    manifest = write_clips(tmp_path, [SLOW] * 6)
    refused = cluster.render(manifest, output, name="refused")
    wait_until(lambda: storage.list_files(f"{output}/done"), "a clip is done")
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        bucket.always(Fault.FORBIDDEN, method=method)
    assert refused.wait() == 1, refused.tail()
    bucket.reset()
    before, state = download_all(output, tmp_path / "before"), cluster.flow_state(refused)

    run = replace(cluster.render(manifest, output, name="again"), output=tmp_path / "after")

    num_done = len(done_clips(before))
    assert 1 <= num_done < 6
    assert state == "FAILED"
    assert "403" in refused.tail() or "Forbidden" in refused.tail()
    assert not list((before / "runs").glob("*/_SUCCESS"))
    assert run.wait() == 0, run.tail()
    assert len(done_clips(download_all(output, run.output))) == 6
    assert Counter(run.statuses()) == {"skipped": num_done, "rendered": 6 - num_done}


def download_all(output: str, folder: Path) -> Path:
    """What is in a bucket's folder, as it would lie on a disk."""
    for uri in storage.list_files(output):
        storage.download(uri, folder / uri.removeprefix(f"{output}/"))
    return folder


def test_two_runs_of_one_manifest_render_each_clip_once(cluster, tmp_path):
    manifest = write_clips(tmp_path, [SLOW] * 6)

    runs = [cluster.render(manifest, tmp_path / "out", name=name) for name in ("one", "two")]

    for run in runs:
        assert run.wait() == 0, run.tail()
    assert cluster.flow_state(runs[0]) == "COMPLETED"  # the newest run of the manifest's name, whichever that is
    assert len(done_clips(tmp_path / "out")) == 6
    assert num_computed(tmp_path / "out") == 6
    assert sum(int(run.last_line().split()[0]) for run in runs) == 6  # each clip counts as rendered in one of them


def test_a_finished_clip_whose_worker_died_is_looked_up_and_not_rendered_again(cluster, tmp_path):
    from tasks.render import render_clip

    output = tmp_path / "out"
    [job] = plan_of(write_clips(tmp_path, ["hello"]), output, cluster.checkpoint)
    render = partial(render_clip.fn, output_uri=str(output), run_id="a-run")
    with cluster.connect() as client:
        future = client.submit(render, job, pure=False)  # kept alive, so Dask has to compute it again
        worker = future.result(timeout=60).metrics.attempt_log[-1].worker
        psutil.Process(int(worker.rpartition(":")[2])).kill()
        time.sleep(1)
        result = future.result(timeout=60)

    assert result.clip_id == "clip-0"
    assert len(done_clips(output)) == 1
    assert num_computed(output) == 1


def test_a_stopped_run_stops_its_clips_at_their_next_step(cluster, tmp_path):
    manifest = write_clips(tmp_path, ["slow 0.5"] * 4, num_steps=20)
    run = cluster.render(manifest, tmp_path / "out")
    wait_for_computing(run)
    run.process.terminate()

    assert run.wait() != 0
    ends = wait_until(partial(ends_of_all, run.output), "every start has an outcome", 30)
    assert ("RunCancelledError", AttemptStage.COMPUTING) in ends
    assert not done_clips(run.output)


def ends_of_all(output: Path) -> set[tuple[str, AttemptStage]] | None:
    """Outcome and stage of every clip's last start, once none goes on any more."""
    last = [attempts[-1] for attempts in attempts_of(output).values()]
    return {(attempt.outcome, attempt.stage) for attempt in last} if all(attempt.outcome for attempt in last) else None


def plan_of(manifest: Path, output: Path, checkpoint: Path):
    return plan_clips(
        read_rows(str(manifest), skip_invalid=False).requests,
        output_uri=str(output),
        checkpoint_fingerprint=inspect_checkpoint(str(checkpoint)).fingerprint,
        default_profile="quality",
        policy=DEFAULT_POLICY,
        threads=2,
    ).jobs
