"""The trained miniature through the pipeline: a clip follows its own pose and looks like its own reference."""

from __future__ import annotations

import pytest
import torch

from scail.config import SamplingParams
from scail.mini.evaluate import render, true_frames
from scail.pipeline import ScailPipeline
from tasks.checkpoint import MINIATURE
from tests.scail.mini.two_acts import follows, is_dressed_as, two_acts

FEW_STEPS = SamplingParams(num_inference_steps=4, guidance_scale=1.0, seed=1)


@pytest.fixture(scope="module")
def miniature() -> ScailPipeline:
    return ScailPipeline.from_pretrained(MINIATURE, device="cpu", dtype=torch.float32)


def test_the_measure_knows_the_truth_from_another_motion_and_other_clothes():
    acts = two_acts()
    first, second = acts.first, acts.second
    truth = true_frames(first)

    assert follows(truth, first.truth, acts.exchanged)
    assert not follows(truth, acts.exchanged, first.truth)
    assert is_dressed_as(truth, first.truth, first.reference_film, second.reference_film)
    assert not is_dressed_as(truth, first.truth, second.reference_film, first.reference_film)


def test_another_pose_changes_the_motion_and_another_reference_the_character(miniature):
    acts = two_acts()
    first, second = acts.first, acts.second

    own = render(miniature, first, first.pose, FEW_STEPS)
    of_second = render(miniature, first, second.pose, FEW_STEPS)
    of_another = render(miniature, second, second.pose, FEW_STEPS)

    assert follows(own, first.truth, acts.exchanged)
    assert follows(of_second, acts.exchanged, first.truth)
    for clip, truth in ((own, first.truth), (of_second, acts.exchanged)):
        assert is_dressed_as(clip, truth, first.reference_film, second.reference_film)
    assert is_dressed_as(of_another, second.truth, second.reference_film, first.reference_film)
