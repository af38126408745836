from __future__ import annotations

import pytest
import torch
from numpy.random import default_rng

from scail.mini.characters import GARMENTS, HUES, draw_characters, draw_clothes, is_held_out_pair
from scail.mini.data import (
    LANDSCAPE,
    PORTRAIT,
    draw_motions,
    draw_scenes,
    halve_pose_pictures,
    is_held_out_motion,
    render_film,
    render_pose_pictures,
    render_references,
)
from scail.mini.motion import MOTIONS

CPU = torch.device("cpu")


def scenes(seed: int = 0, num_clips: int = 6, *, num_frames: int = 5, size=PORTRAIT, held_out: bool = False):
    return draw_scenes(seed, num_clips, num_frames=num_frames, size=size, held_out=held_out, device=CPU)


def test_a_seed_means_the_same_scenes_and_pictures_every_time():
    first, second = scenes(7), scenes(7)

    assert torch.equal(first.joints, second.joints)
    assert first.prompts == second.prompts
    assert torch.equal(render_film(first).pixels, render_film(second).pixels)
    assert torch.equal(render_pose_pictures(first), render_pose_pictures(second))


@pytest.mark.parametrize("other", [{"seed": 8}, {"num_frames": 9}, {"size": LANDSCAPE}, {"held_out": True}])
def test_another_seed_length_size_or_split_means_other_scenes(other):
    assert not torch.equal(scenes(7).reference_joints, scenes(**{"seed": 7} | other).reference_joints)


def test_held_out_clothes_are_never_worn_in_training():
    training, held_out = (draw_clothes(default_rng(0), 5000, held_out=split) for split in (False, True))

    assert not is_held_out_pair(*training).any()
    assert is_held_out_pair(*held_out).all()
    assert not {*zip(*training, strict=True)} & {*zip(*held_out, strict=True)}


def test_training_and_held_out_clothes_together_are_all_there_are():
    pairs = [draw_clothes(default_rng(0), 20000, held_out=split) for split in (False, True)]

    assert len({pair for split in pairs for pair in zip(*split, strict=True)}) == len(HUES) ** 2


def test_held_out_motions_never_begin_so_in_training():
    training, held_out = (draw_motions(default_rng(0), 5000, held_out=split) for split in (False, True))

    assert not is_held_out_motion(*training.T).any()
    assert is_held_out_motion(*held_out.T).all()
    assert {*held_out[:, 0]} == {*range(len(MOTIONS))}


def test_characters_differ_in_every_way():
    characters = draw_characters(default_rng(0), 50, held_out=False)

    assert (characters.proportions.std(dim=0)[1:] > 0.02).all()
    assert (characters.radii.std(dim=0) > 0.5).all()
    seen = [name for index, name in enumerate(GARMENTS) if characters.colours[:, index].std(dim=0).min() > 0.05]
    assert set(GARMENTS) - set(seen) == {"eyes"}


@pytest.mark.parametrize("size", [PORTRAIT, LANDSCAPE])
def test_a_film_shows_somebody_before_a_background_that_stays(size):
    film = render_film(scenes(1, num_frames=5, size=size))

    assert film.pixels.shape == (6, 3, 5, *size)
    assert film.pixels.abs().max() <= 1
    share = (film.garment >= 0).float().mean(dim=(1, 2, 3))
    assert ((share > 0.03) & (share < 0.5)).all()
    never = (film.garment < 0).all(dim=1)
    never[:, :-1] &= never[:, 1:]
    empty = torch.nn.functional.max_pool2d((~never).float(), 3, stride=1, padding=1) == 0
    moved = film.pixels.diff(dim=2).abs().amax(dim=(1, 2))
    assert moved[empty].max() == 0
    assert moved.amax(dim=(1, 2)).min() > 0.1


def test_the_reference_has_the_background_and_the_colours_of_its_clip_in_another_pose():
    drawn = scenes(2)
    film, references = render_film(drawn), render_references(drawn)

    assert references.pixels.shape == (6, 3, 1, *PORTRAIT)
    nobody = (film.garment[:, :1] < 0) & (references.garment < 0)
    nobody = torch.nn.functional.max_pool2d((~nobody[:, 0]).float(), 3, stride=1, padding=1) == 0
    apart = (film.pixels[:, :, 0] - references.pixels[:, :, 0]).abs().amax(dim=1)
    assert apart[nobody].max() == 0
    assert (apart > 0.1).float().mean() > 0.02


def test_pose_pictures_are_black_where_nobody_is_and_halved_for_the_encoder():
    drawn = scenes(3)
    pictures, film = render_pose_pictures(drawn), render_film(drawn)

    halves = halve_pose_pictures(pictures)

    assert halves.shape == (6, 3, 5, 112, 64)
    bones = pictures.amax(dim=1) > 0
    covered = torch.nn.functional.max_pool2d((film.garment >= 0).float(), 5, stride=1, padding=2) > 0
    assert bones.any()
    assert (bones & ~covered).float().sum() < 0.05 * bones.sum()  # bones are inside bodies
    assert halves.min() == -1
    assert halves.max() > 0


def test_prompts_name_the_clothes_and_the_motion():
    drawn = scenes(4, 40)

    for clip, prompt in enumerate(drawn.prompts):
        persons = (drawn.clip == clip).nonzero()[:, 0].tolist()
        assert prompt.count("a person in a") == len(persons)
        for person in persons:
            assert HUES[drawn.characters.shirt[person]] + " shirt" in prompt
            assert HUES[drawn.characters.trousers[person]] + " trousers" in prompt
    assert 1 <= sum(" and a person" in prompt for prompt in drawn.prompts) < 20
