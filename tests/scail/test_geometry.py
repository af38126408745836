from __future__ import annotations

from itertools import product

import pytest

from scail.errors import InvalidInputError
from scail.geometry import check_size, cover_size, kept_share, target_size
from scail.types import LatentShape

SIZES = [
    (1, 1),
    (1, 999),
    (999, 1),
    (97, 131),
    (360, 640),
    (480, 853),
    (512, 896),
    (896, 512),
    (1080, 1920),
    (719, 719),
]
TARGETS = [(512, 896), (896, 512), (32, 32), (64, 1024)]
CASES = list(product(SIZES, TARGETS))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1080, 1920, (512, 896)), (1920, 1080, (896, 512)), (700, 700, (896, 512)), (700, 701, (512, 896))],
)
def test_the_orientation_is_the_references_and_a_square_is_portrait(height, width, expected):
    assert target_size(height, width) == expected


def test_another_pair_of_sides_keeps_the_rule():
    assert target_size(10, 20, (32, 64)) == (32, 64)
    assert target_size(20, 20, (32, 64)) == (64, 32)


@pytest.mark.parametrize("size", [(500, 896), (512, 900), (0, 32), (32, 0), (-32, 32), (16, 16)])
def test_sizes_that_are_no_positive_multiple_of_32_are_refused(size):
    with pytest.raises(InvalidInputError, match=f"{size[0]} x {size[1]}.*multiples of 32"):
        check_size(*size)


@pytest.mark.parametrize("size", [(32, 32), (512, 896), (896, 512), (704, 1280)])
def test_multiples_of_32_pass(size):
    check_size(*size)


@pytest.mark.parametrize(("size", "target"), CASES)
def test_a_covering_size_leaves_no_gap_and_fits_one_side(size, target):
    height, width = cover_size(*size, *target)

    assert height >= target[0]
    assert width >= target[1]
    assert height == target[0] or width == target[1]


@pytest.mark.parametrize(("size", "target"), CASES)
def test_a_covering_size_loses_less_than_a_pixel_of_the_aspect(size, target):
    height, width = cover_size(*size, *target)

    if height == target[0]:
        assert 0 <= size[1] * height - width * size[0] < size[0]
    else:
        assert 0 <= size[0] * width - height * size[1] < size[1]


def test_fractions_of_a_pixel_are_cut_off():
    assert cover_size(333, 1000, 512, 896) == (512, 1537)  # 1537.54
    assert cover_size(1000, 333, 896, 512) == (1537, 512)


def test_a_size_that_fits_stays():
    assert cover_size(512, 896, 512, 896) == (512, 896)
    assert cover_size(1024, 1792, 512, 896) == (512, 896)


@pytest.mark.parametrize(("size", "target"), CASES)
def test_some_of_every_picture_is_kept_and_never_more_than_all(size, target):
    assert 0 < kept_share(*size, *target) <= 1


def test_the_kept_share_is_what_the_crop_leaves():
    assert kept_share(512, 896, 512, 896) == 1
    assert kept_share(100, 400, 64, 64) == pytest.approx(0.25)
    assert kept_share(400, 100, 64, 64) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("num_frames", "num_latent_frames", "num_output_frames"),
    [(1, 1, 1), (4, 1, 1), (5, 2, 5), (8, 2, 5), (10, 3, 9), (81, 21, 81)],
)
def test_only_whole_groups_of_four_frames_are_rendered(num_frames, num_latent_frames, num_output_frames):
    shape = LatentShape.of_clip(num_frames, 512, 896)

    assert (shape.num_frames, shape.height, shape.width) == (num_latent_frames, 64, 112)
    assert shape.num_output_frames == num_output_frames
