"""Numbers about clips: good ones pass, and each defect shows in its own number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scail.bench import random_pipeline
from scail.config import SCAIL_MINI
from scail.errors import GenerationError
from scail.identity import identity
from scail.mini.alarms import count_alarms, page
from scail.mini.data import PORTRAIT, draw_scenes
from scail.mini.defects import DEFECTS
from scail.mini.evaluate import ClipInput, clip_inputs, true_frames
from scail.mini.moving_camera import with_moving_background
from scail.preprocess import to_frames
from scail.quality import Finding, Limit, QualityLimits, QualityNumbers, Verdict, judge, measure

FPS = 16
LIMITS = QualityLimits()


@pytest.fixture(scope="module")
def items() -> list[ClipInput]:
    return clip_inputs(draw_scenes(7, 3, num_frames=17, size=PORTRAIT, held_out=True, device=torch.device("cpu")))


def numbers_of(item: ClipInput, frames: np.ndarray, **given) -> QualityNumbers:
    return measure(frames, item.reference, item.pose, fps=FPS, **given)


def noticed(numbers: QualityNumbers) -> set[str]:
    return {finding.name for finding in judge(numbers, LIMITS)[1]}


def test_good_clips_are_ok(items):
    for item in items:
        verdict, findings = judge(numbers_of(item, true_frames(item)), LIMITS)

        assert (verdict, findings) == (Verdict.OK, ())


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_shows_in_its_own_number_and_in_no_unrelated_one(items, defect):
    for item in items:
        found = noticed(numbers_of(item, defect.spoil(true_frames(item))))

        assert defect.shows_in in found
        assert found <= {defect.shows_in, *defect.related}


def test_a_jump_of_colour_is_seen_wherever_pieces_were_joined(items):
    frames = true_frames(items[0])
    jumps = {}
    for join in (2, 9, 15):
        joined = frames.copy()
        joined[join:] = (joined[join:] * 0.85).astype(np.uint8)
        jumps[join] = numbers_of(items[0], joined).join_jump

    assert min(jumps.values()) > LIMITS.join_jump.review
    assert numbers_of(items[0], frames).join_jump < 0.1


def test_a_light_that_turns_slowly_drifts_and_does_not_jump(items):
    fading = true_frames(items[0]) * np.linspace(1, 0.5, 17)[:, None, None, None]

    numbers = numbers_of(items[0], fading.astype(np.uint8))

    assert numbers.colour_drift > LIMITS.colour_drift.review
    assert numbers.join_jump < LIMITS.join_jump.review


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_clip_too_short_for_a_join_has_no_jump(items, num_frames):
    assert numbers_of(items[0], true_frames(items[0])[:num_frames]).join_jump is None


def test_another_clips_motion_does_not_agree(items):
    for n, item in enumerate(items):
        others = numbers_of(replace(item, pose=items[n - 1].pose), true_frames(item)).motion_agreement

        assert others < LIMITS.motion_agreement.review < numbers_of(item, true_frames(item)).motion_agreement


def test_the_later_a_clip_the_less_its_motion_agrees(items):
    for item in items:
        frames = true_frames(item)
        late = [np.concatenate((frames[:1].repeat(n, axis=0), frames[: 17 - n])) for n in (0, 2, 8)]

        agreements = [numbers_of(item, clip).motion_agreement for clip in late]

        assert agreements == sorted(agreements, reverse=True)
        assert agreements[-1] < LIMITS.motion_agreement.review


def test_a_background_that_moves_hides_neither_motion_nor_its_lack(items):
    for item in items:
        persons = (item.truth.person[0] >= 0).numpy()
        frames = true_frames(item)

        moving = with_moving_background(frames, persons)
        standing = with_moving_background(frames[:1].repeat(17, axis=0), persons[:1].repeat(17, axis=0))

        assert numbers_of(item, moving).motion_agreement > LIMITS.motion_agreement.review
        assert numbers_of(item, standing).motion_agreement < LIMITS.motion_agreement.review


def test_motion_may_be_told_by_its_direction_alone():
    """Dots on a belt change every block alike, forwards and backwards; only the flow knows."""
    dots = np.random.default_rng(0).uniform(0, 255, (16, 30, 1)).repeat(8, axis=0).repeat(8, axis=1).repeat(3, axis=2)
    sway = [round(6 * np.sin(n / 2)) for n in range(17)]
    forwards, backwards = (
        np.stack([np.roll(dots, sign * shift, axis=1) for shift in sway]).astype(np.uint8) for sign in (1, -1)
    )

    agreements = [
        measure(clip, clip[0], forwards, fps=FPS).motion_agreement for clip in (forwards // 2 + 60, backwards // 2 + 60)
    ]

    assert agreements[0] > 0.9
    assert agreements[1] < agreements[0]


def test_latents_that_are_no_number_fail_a_clip(items):
    latents = np.zeros((1, 16, 5, 4, 4), np.float32)
    latents[0, 3, 2, 1, 1] = np.nan

    numbers = numbers_of(items[0], true_frames(items[0]), latents=latents)

    assert numbers.nonfinite_percent == pytest.approx(100 / latents.size)
    verdict, findings = judge(numbers, LIMITS)
    assert verdict is Verdict.FAILED_QUALITY
    assert [finding.name for finding in findings] == ["nonfinite_percent"]


def test_pixels_that_are_no_number_do_not_become_black_ones():
    pixels = torch.zeros(1, 3, 2, 4, 4)
    pixels[0, 1, 1, 2, 3] = torch.nan

    with pytest.raises(GenerationError, match="1 decoded values are not finite"):
        list(to_frames([pixels]))


def test_somebody_else_elsewhere_has_another_identity(items):
    pipeline = random_pipeline(SCAIL_MINI, device=torch.device("cpu"), dtype=torch.float32)

    own = [identity(pipeline, item.reference, true_frames(item)) for item in items]
    other = [identity(pipeline, item.reference, true_frames(items[n - 1])) for n, item in enumerate(items)]

    assert min(own) > max(LIMITS.identity.review, *other)
    assert noticed(QualityNumbers(identity=min(own))) == set()


def test_a_black_reference_makes_no_black_clip_a_defect(items):
    item = replace(items[0], reference=np.zeros_like(items[0].reference))

    numbers = numbers_of(item, np.zeros_like(item.pose))

    assert numbers.black_percent is None


def test_a_pose_that_stands_still_makes_no_still_clip_a_defect(items):
    item = replace(items[0], pose=items[0].pose[:1].repeat(17, axis=0))

    numbers = numbers_of(item, true_frames(item)[:1].repeat(17, axis=0))

    assert (numbers.frozen_percent, numbers.motion_agreement) == (None, None)
    assert noticed(numbers) == set()


def test_a_single_frame_has_the_numbers_that_a_picture_has(items):
    numbers = numbers_of(items[0], true_frames(items[0])[:1])

    assert numbers.sharpness is not None
    assert (numbers.flicker, numbers.colour_drift, numbers.frozen_percent, numbers.motion_agreement) == (None,) * 4


def test_pictures_of_any_size_are_seen_as_the_pipeline_crops_them(items):
    item = items[0]
    padded = np.pad(item.pose, ((0, 0), (0, 0), (40, 40), (0, 0)))  # the crop takes it off again
    doubled = item.pose.repeat(2, axis=1).repeat(2, axis=2)

    agreements = [
        numbers_of(replace(item, pose=pose), true_frames(item)).motion_agreement
        for pose in (item.pose, padded, doubled)
    ]

    assert agreements == pytest.approx([agreements[0]] * 3, abs=0.02)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.8, Verdict.OK), (0.5, Verdict.OK), (0.4, Verdict.NEEDS_REVIEW), (0.1, Verdict.FAILED_QUALITY),
     (float("nan"), Verdict.FAILED_QUALITY)],
)  # fmt: skip
def test_a_limit_that_falls_is_passed_downwards(value, verdict):
    assert judge(QualityNumbers(sharpness=value), LIMITS._replace(sharpness=Limit(0.5, 0.2)))[0] is verdict


def test_the_worst_number_decides_and_every_number_is_told():
    verdict, findings = judge(QualityNumbers(flicker=4.0, grain=9.0, identity=0.9), LIMITS)

    assert verdict is Verdict.FAILED_QUALITY
    assert [str(finding) for finding in findings] == ["flicker 4, above 2", "grain 9, above 8"]
    assert findings[0] == Finding("flicker", 4.0, 2.0, Verdict.NEEDS_REVIEW, falls=False)


def test_alarms_are_counted_and_told_on_a_page():
    pipeline = random_pipeline(SCAIL_MINI, device=torch.device("cpu"), dtype=torch.float32)

    report = count_alarms(pipeline, num_clips=2, params=None, limits=LIMITS._replace(sharpness=Limit(1e6, 1e5)))

    assert report["good"]["drawn"]["alarms"] == {"sharpness": 2}
    assert report["good"]["drawn, the camera moves"]["num_clips"] == 2
    assert report["bad"]["frozen"]["alarms"]["frozen_percent"] == 2
    assert "| drawn | 2 | 0 | 0 | 2 | sharpness 2 |" in page(report)
