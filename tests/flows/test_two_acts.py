"""The whole program with the trained miniature: the published clips are those that the manifest asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from scail.mini.evaluate import Frames
from scail.video import encode_video, read_video
from tasks import storage
from tasks.checkpoint import MINIATURE
from tests.flows.test_cli import scail
from tests.scail.mini.two_acts import follows, is_dressed_as, two_acts

BUCKET = "memory://two-acts"
HEADER = "clip_id,reference,pose,prompt,width,height,num_inference_steps,guidance_scale,seed\n"
OWN = "own,first.png,first.mp4,,128,224,4,1,{seed}\n"
EXCHANGED = "exchanged,first.png,second.mp4,,128,224,4,1,1\n"


def upload(folder: Path) -> None:
    """References and poses of both acts."""
    acts = two_acts()
    for name, item in (("first", acts.first), ("second", acts.second)):
        Image.fromarray(item.reference).save(folder / f"{name}.png")
        encode_video(folder / f"{name}.mp4", item.pose, fps=16.0, metadata={})
    for path in folder.glob("*.*"):
        storage.publish_file(path, f"{BUCKET}/in/{path.name}")


def rendered(manifest: str, checkpoint: Path) -> str:
    """The last line of `scail render` of this manifest."""
    storage.publish_bytes(f"{BUCKET}/in/manifest.csv", (HEADER + manifest).encode())
    folders = (f"{BUCKET}/in/manifest.csv", "--output", f"{BUCKET}/out", "--checkpoint", checkpoint)
    result = scail("render", *folders)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


def published(clip_id: str, folder: Path) -> Frames:
    path = folder / f"{clip_id}.mp4"
    path.write_bytes(storage.read_bytes(f"{BUCKET}/out/clips/{clip_id}/video.mp4"))
    return read_video(path)


def test_published_clips_follow_their_poses_in_their_colours_and_so_does_a_row_with_another_seed(tmp_path):
    acts = two_acts()
    upload(tmp_path)
    checkpoint = Path(shutil.copytree(MINIATURE, tmp_path / "miniature"))  # a record of its files is written there

    first_run = rendered(OWN.format(seed=1) + EXCHANGED, checkpoint)
    own, exchanged = published("own", tmp_path), published("exchanged", tmp_path)
    second_run = rendered(OWN.format(seed=2) + EXCHANGED, checkpoint)
    again = published("own", tmp_path)

    assert first_run.startswith("2 rendered, 0 skipped, 0 failed")
    assert second_run.startswith("1 rendered, 1 skipped, 0 failed")
    for clip in (own, again):
        assert follows(clip, acts.first.truth, acts.exchanged)
        assert is_dressed_as(clip, acts.first.truth, acts.first.reference_film, acts.second.reference_film)
    assert (own != again).any()
    assert follows(exchanged, acts.exchanged, acts.first.truth)
    assert is_dressed_as(exchanged, acts.exchanged, acts.first.reference_film, acts.second.reference_film)
