from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scail.config import SCAIL_14B, TransformerConfig
from scail.kernels.reference import rotate_pairs
from scail.models.rope import (
    RotaryTable,
    kept_rotary_table,
    pose_rotary,
    reference_rotary,
    rotary_table,
    video_rotary,
)

FRAMES, HEIGHT, WIDTH = 3, 4, 6
TIME_PAIRS, SPACE_PAIRS = 22, 21  # of a head of 128: 44 + 42 + 42
CONFIG = replace(SCAIL_14B.transformer, hidden_size=128, num_heads=1)


def frequencies(size: int) -> torch.Tensor:
    return CONFIG.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)


def length(table: RotaryTable) -> torch.Tensor:
    return torch.hypot(table.cos, table.sin)


def rotate(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """One vector (head_size,) at every position of a table: (L, head_size)."""
    return rotate_pairs(x.expand(1, len(table.cos), 1, -1), table.cos, table.sin)[0, :, 0]


@pytest.fixture
def scores() -> torch.Tensor:
    """Scores of one query with one key, between all positions of reference and video: (t, h, w, t, h, w)."""
    query, key = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    parts = reference_rotary(CONFIG, HEIGHT, WIDTH), video_rotary(CONFIG, FRAMES, HEIGHT, WIDTH)
    queries, keys = (torch.cat([rotate(x, part) for part in parts]) for x in (query, key))
    grid = (FRAMES + 1, HEIGHT, WIDTH)
    return (queries @ keys.T).reshape(*grid, *grid)


def test_scores_of_reference_and_video_depend_on_offsets_only(scores):
    here = scores[:-1, :-1, :-1, :-1, :-1, :-1]
    one_further = scores[1:, 1:, 1:, 1:, 1:, 1:]

    torch.testing.assert_close(here, one_further, rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_tell_offsets_apart_along_every_axis(scores, axis):
    of_first = scores[0, 0, 0]

    difference = of_first.narrow(axis, 0, 1) - of_first.narrow(axis, 1, 1)

    assert difference.abs().min() > 1e-3


def test_the_reference_stands_at_time_zero():
    table = reference_rotary(CONFIG, HEIGHT, WIDTH)

    assert torch.equal(table.cos[:, :TIME_PAIRS], torch.ones(HEIGHT * WIDTH, TIME_PAIRS))
    assert torch.equal(table.sin[:, :TIME_PAIRS], torch.zeros(HEIGHT * WIDTH, TIME_PAIRS))


def test_a_head_is_split_into_time_rows_and_columns():
    table = video_rotary(CONFIG, FRAMES, HEIGHT, WIDTH)
    sines = table.sin.reshape(FRAMES, HEIGHT, WIDTH, -1)

    varies = [(sines.diff(dim=axis).abs().amax(dim=(0, 1, 2)) > 0) for axis in range(3)]

    parts = torch.arange(3).repeat_interleave(torch.tensor([TIME_PAIRS, SPACE_PAIRS, SPACE_PAIRS]))
    for axis, varying in enumerate(varies):
        assert torch.equal(varying, parts == axis)


def test_adjacent_numbers_are_a_pair():
    table = video_rotary(CONFIG, 1, 2, 2)

    for index in range(128):
        rotated = rotate(torch.eye(128)[index], table)

        touched = set(rotated.abs().sum(0).nonzero().flatten().tolist())
        assert touched == {index - index % 2, index - index % 2 + 1}


def test_the_second_number_of_a_pair_is_the_sine_of_the_first():
    table = RotaryTable(torch.tensor([[0.0]]), torch.tensor([[1.0]]))  # a quarter turn

    assert rotate(torch.tensor([1.0, 0.0]), table).tolist() == [[0.0, 1.0]]


def test_reference_and_video_rotations_keep_lengths():
    for table in (reference_rotary(CONFIG, HEIGHT, WIDTH), video_rotary(CONFIG, FRAMES, HEIGHT, WIDTH)):
        torch.testing.assert_close(length(table), torch.ones_like(table.cos), rtol=0, atol=1e-6)


def test_pose_rotations_are_shortened_in_space_and_not_in_time():
    lengths = length(pose_rotary(CONFIG, FRAMES, HEIGHT, WIDTH)).double()

    half_step = frequencies(2 * SPACE_PAIRS).div(2).cos().expand(len(lengths), -1)
    time, row, column = lengths.split((TIME_PAIRS, SPACE_PAIRS, SPACE_PAIRS), dim=-1)
    torch.testing.assert_close(time, torch.ones_like(time), rtol=0, atol=1e-6)
    torch.testing.assert_close(row, half_step, rtol=0, atol=1e-6)
    torch.testing.assert_close(column, half_step, rtol=0, atol=1e-6)
    assert half_step.min() < 0.9


def test_pose_tokens_point_to_the_middle_of_their_cells_120_columns_to_the_right():
    table = pose_rotary(CONFIG, FRAMES, HEIGHT, WIDTH)

    rotations = torch.complex(table.cos, table.sin).to(torch.complex128)
    _, rows, columns = rotations.reshape(FRAMES, HEIGHT // 2, WIDTH // 2, -1).split(
        (TIME_PAIRS, SPACE_PAIRS, SPACE_PAIRS), dim=-1
    )
    for row in range(HEIGHT // 2):
        for column in range(WIDTH // 2):
            expected_row = torch.polar(torch.ones(SPACE_PAIRS).double(), (2 * row + 0.5) * frequencies(42))
            expected_column = torch.polar(torch.ones(SPACE_PAIRS).double(), (120 + 2 * column + 0.5) * frequencies(42))
            for found, expected in ((rows, expected_row), (columns, expected_column)):
                cell = found[0, row, column]
                torch.testing.assert_close(cell / cell.abs(), expected, rtol=0, atol=1e-4)


def test_pose_frames_stand_at_the_times_of_their_video_frames():
    video = video_rotary(CONFIG, FRAMES, HEIGHT, WIDTH).sin.reshape(FRAMES, -1, 64)
    pose = pose_rotary(CONFIG, FRAMES, HEIGHT, WIDTH).sin.reshape(FRAMES, -1, 64)

    torch.testing.assert_close(pose[:, 0, :TIME_PAIRS], video[:, 0, :TIME_PAIRS], rtol=0, atol=1e-6)


def test_the_whole_table_is_reference_then_video_then_pose():
    table = rotary_table(CONFIG, FRAMES, HEIGHT, WIDTH)

    reference, video, pose = table.sin.split((24, 72, 18))
    assert torch.equal(reference, reference_rotary(CONFIG, HEIGHT, WIDTH).sin)
    assert torch.equal(video, video_rotary(CONFIG, FRAMES, HEIGHT, WIDTH).sin)
    assert torch.equal(pose, pose_rotary(CONFIG, FRAMES, HEIGHT, WIDTH).sin)


def test_a_kept_table_is_made_once_and_serves_both_inference_and_training():
    with torch.inference_mode():
        kept = kept_rotary_table(CONFIG, FRAMES, HEIGHT, WIDTH, torch.device("cpu"), torch.bfloat16)

    table = rotary_table(CONFIG, FRAMES, HEIGHT, WIDTH)
    assert torch.equal(kept.cos, table.cos.bfloat16())
    assert torch.equal(kept.sin, table.sin.bfloat16())
    assert kept_rotary_table(CONFIG, FRAMES, HEIGHT, WIDTH, torch.device("cpu"), torch.bfloat16) is kept
    (kept.cos * torch.ones((), requires_grad=True)).sum().backward()  # an inference tensor would refuse


@pytest.mark.parametrize(("head_size", "time_pairs"), [(12, 2), (20, 4), (32, 6), (128, 22)])
def test_what_does_not_divide_by_six_goes_to_time(head_size, time_pairs):
    table = reference_rotary(TransformerConfig(hidden_size=head_size, num_heads=1), 2, 2)

    assert table.cos.shape == (4, head_size // 2)
    assert (table.sin[-1] == 0).sum() == time_pairs  # the last token is at row 1, column 1 and time 0


def test_bfloat16_is_rotated_in_float32():
    table = video_rotary(CONFIG, FRAMES, HEIGHT, WIDTH)
    x = torch.randn(2, 72, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()

    rotated = rotate_pairs(x, table.cos, table.sin)

    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate_pairs(x.float(), table.cos, table.sin).bfloat16())
