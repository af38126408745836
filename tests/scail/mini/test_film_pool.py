from __future__ import annotations

import pytest
import torch

from scail.mini.film_pool import FilmKind, FilmPool

CPU = torch.device("cpu")
SIZE = (64, 48)


@pytest.fixture(scope="module")
def pool() -> FilmPool:
    return FilmPool(FilmKind(SIZE, 9, 3), (1,), CPU)


@pytest.mark.parametrize(("num_frames", "size"), [(1, (32, 32)), (5, (16, 48)), (9, SIZE)])
def test_pieces_have_the_asked_size_and_values_of_pictures(pool, num_frames, size):
    torch.manual_seed(0)
    pieces = pool.cut(4, num_frames, size)

    assert pieces.shape == (4, 3, num_frames, *size)
    assert pieces.min() >= -1
    assert pieces.max() <= 1


def test_whole_pieces_are_the_clips_but_for_mirroring_and_the_order_of_colours(pool):
    torch.manual_seed(0)
    pieces = pool.cut(8, 9, SIZE)

    clips = (pool.films.levels.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    for piece in pieces:
        sums = piece.sum(dim=0)  # over the channels
        assert any(
            torch.allclose(sums, other.sum(dim=0), atol=1e-5) for clip in clips for other in (clip, clip.flip(3))
        )


def test_pieces_show_somebody(pool):
    height, width = SIZE
    for clip, places in enumerate(pool.films.places):
        assert (places >= 0).all()
        assert (places < torch.tensor([9, height, width])).all()
        background = pool.films.levels[clip, :, 0, 0].float()  # a corner, frame by frame
        seen = [
            (pool.films.levels[clip, t, max(0, y - 4) : y + 4, max(0, x - 4) : x + 4].float() - background[t])
            .abs()
            .max()
            for t, y, x in places.tolist()
        ]
        assert torch.stack(seen).gt(12).float().mean() > 0.9


def test_the_oldest_clips_are_renewed_first():
    pool = FilmPool(FilmKind(SIZE, 1, 3, pose=True), (2,), CPU)
    before = pool.films.levels.clone()

    pool.renew(2)

    changed = [(pool.films.levels[n] != before[n]).any().item() for n in range(3)]
    assert changed == [True, True, False]
    assert pool.films.levels.shape[2:4] == (32, 24)  # pose pictures are halved
    assert pool.renewal.next_slot == 2
