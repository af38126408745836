from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from scail.bench import random_pipeline
from scail.config import SCAIL_TINY, SamplingParams
from scail.mini.data import LANDSCAPE, PORTRAIT, draw_scenes, render_film
from scail.mini.evaluate import (
    SEARCH_SHARE,
    ClipInput,
    Scores,
    clip_inputs,
    evaluate,
    exchanged_film,
    limb_delta_e,
    limb_errors,
    score,
    to_lab,
)

CPU = torch.device("cpu")
NUM_FRAMES = 2


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(3, 4, num_frames=NUM_FRAMES, size=PORTRAIT, held_out=True, device=CPU)


@pytest.fixture(scope="module")
def inputs(scenes) -> list[ClipInput]:
    return clip_inputs(scenes)


def frames(pixels: torch.Tensor) -> np.ndarray:
    """uint8 (T, H, W, 3) of (3, T, H, W) in -1 … 1."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()


def test_the_truth_itself_scores_well_and_passes(inputs):
    for item in inputs:
        scores = score(frames(item.truth.pixels[0]), item.truth, item.reference_film)

        assert scores.limb_error_percent < 0.3
        assert scores.limbs_lost_percent == 0
        assert scores.delta_e < 10  # shading alone
        assert scores.psnr > 45
        assert scores.passes


@pytest.mark.parametrize("shift", [3, 6])
def test_a_shifted_clip_has_its_limbs_about_as_far_off(inputs, shift):
    errors = [limb_errors(torch.roll(item.truth.pixels[0], shift, dims=1 + 1), item.truth)[0] for item in inputs]

    assert 0.6 * shift < np.mean(errors) < 1.5 * shift


def test_limbs_that_are_missing_count_with_the_radius_of_the_search(inputs):
    grey = torch.zeros_like(inputs[0].truth.pixels[0])
    error, lost = limb_errors(grey - 1, inputs[0].truth)

    assert lost > 0.7
    assert error > 0.6 * SEARCH_SHARE * PORTRAIT[0]


def test_a_clip_of_the_wrong_colours_has_a_large_delta_e(inputs):
    item = inputs[0]

    wrong = limb_delta_e(item.truth.pixels[0].flip(0), item.truth, item.reference_film)

    right = limb_delta_e(item.truth.pixels[0], item.truth, item.reference_film)
    assert wrong > 30
    assert right < 10


def test_a_darker_background_is_seen_in_its_own_score_alone(inputs):
    item = inputs[0]
    behind = (item.truth.garment[0] < 0).float()
    darker = item.truth.pixels[0] - 0.2 * behind

    scores = score(frames(darker), item.truth, item.reference_film)

    assert scores.background_psnr == pytest.approx(20, abs=0.5)
    assert scores.delta_e < 10


@pytest.mark.parametrize(
    ("colour", "lab"),
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_has_its_known_values(colour, lab):
    values = to_lab(torch.tensor([colour], dtype=torch.float64) * 2 - 1)[0]

    torch.testing.assert_close(values, torch.tensor(lab, dtype=torch.float64), rtol=0, atol=0.05)


def test_exchanged_persons_move_as_the_others_and_look_like_themselves(scenes):
    persons = np.bincount(scenes.clip.numpy())
    index, partner = np.flatnonzero(persons == 1)[:2]

    film = exchanged_film(scenes, index, partner)

    theirs = render_film(scenes)
    apart = (film.garment[0] >= 0) != (theirs.garment[partner] >= 0)
    somebody = (theirs.garment[partner] >= 0).float().mean()
    assert apart.float().mean() < 0.35 * somebody  # the same pose; bodies are broader or thinner
    own = ((film.garment[0] >= 0) != (theirs.garment[index] >= 0)).float().mean()
    assert own > apart.float().mean()
    nobody = (
        torch.nn.functional.max_pool2d(((film.garment[0] >= 0) | (theirs.garment[index] >= 0)).float(), 3, 1, 1) == 0
    )
    assert torch.equal(film.pixels[0][:, nobody], theirs.pixels[index][:, nobody])


def test_what_the_pipeline_is_given_are_plain_pictures(inputs):
    item = inputs[0]

    assert item.reference.dtype == item.pose.dtype == np.uint8
    assert item.reference.shape == (*PORTRAIT, 3)
    assert item.pose.shape == (NUM_FRAMES, *PORTRAIT, 3)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({}, True), ({"limb_error_percent": 3.1}, False), ({"delta_e": 15.1}, False), ({"background_psnr": 20}, False)],
)
def test_a_clip_passes_within_every_limit(changes, passes):
    good = {"limb_error_percent": 1.0, "limbs_lost_percent": 0.0, "delta_e": 8.0, "background_psnr": 35, "psnr": 30}

    assert Scores(**good | changes).passes is passes


def test_a_pipeline_is_scored_with_exchanges():
    pipeline = random_pipeline(SCAIL_TINY, device=CPU, dtype=torch.float32)
    params = SamplingParams(num_inference_steps=1, guidance_scale=1.0)

    report = evaluate(pipeline, num_clips=3, params=params, num_frames=1, size=LANDSCAPE)

    json.dumps(report)
    assert report["passing_percent"] == 0  # its weights are random
    assert len(report["each"]) == report["clips"] == 3
    assert {"limb_error_percent", "delta_e", "background_psnr"} <= report["mean"].keys() & report["vae_alone"].keys()
    assert all(math.isfinite(value) for value in report["exchanges"].values())
    assert report["exchanges"]
