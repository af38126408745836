from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scail import preprocess
from scail.preprocess import crop_pose, halve_pose, pose_pixels, reference_pixels, to_frames


def random_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def bicubic(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    pixels = torch.tensor(frames).permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


def edge(height: int, width: int) -> np.ndarray:
    """Black on the left, white on the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 255
    return image


def test_a_reference_that_fits_is_not_resampled():
    image = random_frames(1, 32, 64)[0]

    pixels = reference_pixels(image, 32, 64)

    assert pixels.shape == (1, 3, 1, 32, 64)
    assert pixels.dtype == torch.float32
    levels = ((pixels[0, :, 0].double() + 1) / 2 * 255).permute(1, 2, 0)
    assert np.array_equal(levels.round().numpy(), image)
    assert (levels - levels.round()).abs().max() < 1e-4


def test_pose_frames_that_fit_are_not_resampled():
    frames = random_frames(3, 32, 64)

    cropped = crop_pose(frames, 32, 64)

    assert cropped.dtype == torch.uint8
    assert np.array_equal(cropped.permute(0, 2, 3, 1).numpy(), frames)


@pytest.mark.parametrize(("size", "rows", "columns"), [((32, 96), (0, 32), (32, 64)), ((101, 32), (34, 66), (0, 32))])
def test_what_is_only_too_long_is_cropped_about_its_centre(size, rows, columns):
    frames = random_frames(2, *size)
    kept = frames[:, slice(*rows), slice(*columns)]

    assert np.array_equal(crop_pose(frames, 32, 32).permute(0, 2, 3, 1).numpy(), kept)
    assert torch.equal(reference_pixels(frames[0], 32, 32), reference_pixels(kept[0], 32, 32))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mirrored_reference_gives_mirrored_pixels(axis):
    image = random_frames(1, 50, 70)[0]  # covers 32 x 44: an even number of columns too many

    mirrored = reference_pixels(np.flip(image, axis).copy(), 32, 32)

    torch.testing.assert_close(mirrored, reference_pixels(image, 32, 32).flip(axis + 3), rtol=0, atol=1e-5)


def test_the_reference_is_resized_in_float():
    image = random_frames(1, 50, 70)[0]

    pixels = reference_pixels(image, 32, 32)

    expected = bicubic(image[None], 32, 44)[..., 6:38] / 127.5 - 1
    torch.testing.assert_close(pixels[:, :, 0], expected, rtol=0, atol=1e-5)


def test_overshoot_of_the_reference_is_kept_and_of_the_pose_clamped():
    image = edge(16, 16)

    reference = reference_pixels(image, 64, 64)
    pose = pose_pixels(image[None], 64, 64)

    assert reference.max() > 1.02
    assert reference.min() < -1.02
    assert pose.max() == 1
    assert pose.min() == -1
    assert torch.equal(crop_pose(image[None], 64, 64).float(), bicubic(image[None], 64, 64).clamp(0, 255).round())


def test_resized_pose_frames_are_rounded_to_the_nearest_level():
    frames = random_frames(2, 50, 70)
    exact = bicubic(frames, 32, 44)[..., 6:38].clamp(0, 255)

    rounding = crop_pose(frames, 32, 32).float() - exact

    assert rounding.abs().max() <= 0.5
    assert rounding.min() < -0.4
    assert rounding.max() > 0.4


def test_shrinking_averages_and_does_not_pick():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255

    pixels = reference_pixels(stripes, 32, 32)[..., 4:-4]

    assert pixels.abs().max() < 0.05


def test_halving_is_the_mean_of_two_by_two_pixels():
    frames = torch.tensor(random_frames(2, 32, 64)).permute(0, 3, 1, 2)
    normalised = (frames.double() - 127.5) / 127.5

    halved = halve_pose(frames)

    quarters = [normalised[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    torch.testing.assert_close(halved.double(), sum(quarters) / 4, rtol=0, atol=1e-6)


def test_the_pose_has_half_the_size_of_the_clip():
    pixels = pose_pixels(random_frames(5, 50, 90), 32, 64)

    assert pixels.shape == (1, 3, 5, 16, 32)
    assert pixels.dtype == torch.float32


def test_pose_frames_keep_their_order_and_do_not_mix():
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(48, 1).repeat(48, 2).repeat(3, 3)

    pixels = pose_pixels(frames, 32, 32)

    expected = ((torch.arange(20) - 127.5) / 127.5)[:, None, None].expand(20, 16, 16)
    torch.testing.assert_close(pixels[0, 1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 19, 20])
def test_chunks_of_frames_do_not_change_a_bit(monkeypatch, frames_per_chunk):
    frames = random_frames(20, 50, 70)
    expected = pose_pixels(frames, 32, 32)
    monkeypatch.setattr(preprocess, "FRAMES_PER_CHUNK", frames_per_chunk)

    assert torch.equal(pose_pixels(frames, 32, 32), expected)


def test_inputs_are_left_as_they_are():
    frames = random_frames(2, 50, 70)
    before = frames.copy()

    reference_pixels(frames[0], 32, 32)
    pose_pixels(frames, 32, 32)

    assert np.array_equal(frames, before)


def test_frames_are_truncated_and_not_rounded():
    levels = torch.arange(255) + 0.9

    (frames,) = to_frames([(levels / 127.5 - 1).reshape(1, 1, 1, 1, 255).expand(1, 3, 1, 1, 255)])

    assert np.array_equal(frames[0, 0, :, 0], np.arange(255))


def test_frames_are_clamped_to_the_levels_there_are():
    (frames,) = to_frames([torch.tensor([-3.0, -1.0, 1.0, 1.3]).reshape(1, 1, 1, 1, 4).expand(1, 3, 1, 1, 4)])

    assert frames[0, 0, :, 0].tolist() == [0, 0, 255, 255]


def test_frames_come_out_with_colours_last():
    pixels = torch.full((1, 3, 5, 6, 7), -1.0)
    pixels[0, 2, 4, 1, 3] = 1.0

    (frames,) = to_frames([pixels])

    assert frames.shape == (5, 6, 7, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous
    assert np.argwhere(frames).tolist() == [[4, 1, 3, 2]]


def test_pieces_become_frames_in_their_order_and_one_piece_late():
    asked: list[int] = []

    def pieces() -> Iterator[torch.Tensor]:
        for number in range(3):
            asked.append(number)
            yield torch.full((1, 3, number + 1, 2, 2), (number + 0.5) / 127.5 - 1)

    seen = [(frames.shape[0], int(frames.max()), len(asked)) for frames in to_frames(pieces())]

    assert seen == [(1, 0, 2), (2, 1, 3), (3, 2, 3)]
    assert [*to_frames([])] == []
