from __future__ import annotations

import copy
import math

import pytest

from scail.mini.goals import Goal, goals_of, table

GOOD = {
    "clips": 12,
    "num_frames": 17,
    "size": [224, 128],
    "params": {"num_inference_steps": 20, "guidance_scale": 1.0},
    "mean": {"limb_error_percent": 1.2, "delta_e": 8.0, "background_psnr": 31.0},
    "vae_alone": {"limb_error_percent": 0.8, "delta_e": 6.0, "background_psnr": 34.0},
    "passing_percent": 100.0,
    "exchanges": {
        "limb_error_percent": 1.5,
        "limb_error_before_percent": 6.0,
        "delta_e": 9.0,
        "delta_e_of_other": 60.0,
    },
}


def test_a_good_report_meets_every_goal():
    assert [goal.met for goal in goals_of(GOOD)] == [True] * 7
    assert "MISSED" not in table(GOOD)


@pytest.mark.parametrize(
    ("part", "name", "value", "num_missed"),
    [
        ("mean", "limb_error_percent", 3.2, 1),
        ("mean", "delta_e", 16.0, 1),
        ("mean", "background_psnr", 20.0, 1),
        ("mean", "background_psnr", math.nan, 1),
        ("exchanges", "limb_error_before_percent", 1.5, 1),  # it moves as before, whatever the pose
        ("exchanges", "delta_e_of_other", 9.0, 1),  # it looks alike, whatever the reference
    ],
)
def test_what_is_missed_is_told(part, name, value, num_missed):
    report = copy.deepcopy(GOOD)
    report[part][name] = value

    assert sum(not goal.met for goal in goals_of(report)) == num_missed
    assert table(report).count("MISSED") == num_missed


def test_a_single_clip_has_nothing_to_be_exchanged_with():
    assert len(goals_of(GOOD | {"exchanges": {}})) == 3


def test_a_goal_says_what_was_reached_and_what_was_wanted():
    assert str(Goal("background kept", 31.0, 25.0, "dB", at_least=True)).split() == (
        ["background", "kept", "31.00", "goal", "≥", "25", "dB", "met"]
    )
