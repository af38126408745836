from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scail.errors import InvalidInputError
from scail.models.transformer import ScailTransformer
from scail.sampling import flow_sigmas
from scail.types import Conditioning

FRAMES, HEIGHT, WIDTH = 3, 4, 8


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning_of(batch_size: int = 1, seed: int = 0) -> Conditioning:
    return Conditioning(
        context=random(batch_size, 12, 32, seed=seed),
        image_embeds=random(batch_size, 17, 40, seed=seed + 1),
        reference_latents=random(batch_size, 16, 1, HEIGHT, WIDTH, seed=seed + 2),
        pose_latents=random(batch_size, 16, FRAMES, HEIGHT // 2, WIDTH // 2, seed=seed + 3),
    )


def latents_of(batch_size: int = 1) -> Tensor:
    return random(batch_size, 16, FRAMES, HEIGHT, WIDTH, seed=9)


@pytest.fixture
def transformer(pipeline) -> ScailTransformer:
    return pipeline.transformer


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def test_velocity_has_the_shape_of_the_latents(transformer):
    velocity = transformer(latents_of(2), torch.tensor([900.0, 10.0]), transformer.prepare(conditioning_of()))

    assert velocity.shape == latents_of(2).shape
    assert torch.isfinite(velocity).all()


@pytest.mark.parametrize("num_steps", [2, 6])
def test_cross_attention_keys_are_computed_once_a_clip_and_not_once_a_step(pipeline, record_calls, num_steps):
    blocks = pipeline.transformer.blocks
    queries, texts, images = (
        [record_calls(getattr(block.cross_attn, name)) for block in blocks] for name in ("q", "text_kv", "image_kv")
    )
    negative_context, sigmas = random(1, 12, 32, seed=7), flow_sigmas(num_steps, shift=5.0)

    pipeline.generate(conditioning_of(), negative_context, latents_of(), sigmas, guidance_scale=4.0)

    assert [len(calls) for calls in queries] == [2 * num_steps] * len(blocks)
    assert [len(calls) for calls in texts] == [2] * len(blocks)  # one for each side of the guidance
    assert [len(calls) for calls in images] == [1] * len(blocks)  # both sides see the same image


@pytest.mark.parametrize("num_steps", [2, 6])
def test_reference_and_pose_become_tokens_once_a_clip(pipeline, record_calls, num_steps):
    pose_calls = record_calls(pipeline.transformer.pose_patch_embedding)
    video_calls = record_calls(pipeline.transformer.patch_embedding)

    pipeline.generate(conditioning_of(), None, latents_of(), flow_sigmas(num_steps, shift=5.0), guidance_scale=1.0)

    assert len(pose_calls) == 1
    assert len(video_calls) == 1 + num_steps  # the reference, then the latents of each step


def test_another_context_is_as_if_prepared_anew(transformer):
    conditioning, context = conditioning_of(), random(1, 20, 32, seed=7)
    changed = transformer.with_context(transformer.prepare(conditioning), context)

    anew = transformer.prepare(replace(conditioning, context=context))

    velocities = [transformer(latents_of(), torch.tensor([500.0]), prepared) for prepared in (changed, anew)]
    assert torch.equal(*velocities)


def test_another_context_leaves_what_was_prepared_as_it_was(transformer):
    prepared = transformer.prepare(conditioning_of())
    before = transformer(latents_of(), torch.tensor([500.0]), prepared)

    transformer.with_context(prepared, random(1, 12, 32, seed=7))

    assert torch.equal(transformer(latents_of(), torch.tensor([500.0]), prepared), before)


def test_a_batch_with_shared_conditioning_equals_single_runs(transformer):
    prepared = transformer.prepare(conditioning_of())
    latents, timesteps = latents_of(3), torch.tensor([1000.0, 416.6667, 3.7])

    together = transformer(latents, timesteps, prepared)

    singly = [transformer(latents[[index]], timesteps[[index]], prepared) for index in range(3)]
    torch.testing.assert_close(together, torch.cat(singly), rtol=0, atol=1e-5)


def test_a_permutation_of_the_batch_permutes_the_velocities(transformer):
    conditioning, latents, timesteps = conditioning_of(3), latents_of(3), torch.tensor([1000.0, 416.6667, 3.7])
    order = [2, 0, 1]
    velocity = transformer(latents, timesteps, transformer.prepare(conditioning))

    permuted = transformer(
        latents[order],
        timesteps[order],
        transformer.prepare(Conditioning(*(value[order] for value in vars(conditioning).values()))),
    )

    torch.testing.assert_close(permuted, velocity[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["context", "image_embeds", "reference_latents", "pose_latents"])
def test_every_part_of_the_conditioning_tells_in_the_velocity(transformer, name):
    conditioning, other = conditioning_of(), conditioning_of(seed=20)
    changed = replace(conditioning, **{name: getattr(other, name)})

    velocities = [
        transformer(latents_of(), torch.tensor([500.0]), transformer.prepare(value))
        for value in (conditioning, changed)
    ]

    assert (velocities[0] - velocities[1]).abs().max() > 0.01


def test_fractions_of_a_timestep_tell_in_the_velocity(transformer):
    prepared = transformer.prepare(conditioning_of())

    velocities = [transformer(latents_of(), torch.tensor([t]), prepared) for t in (972.0, 972.2222)]

    assert (velocities[0] - velocities[1]).abs().max() > 1e-3


def test_an_empty_history_is_no_history(transformer):
    prepared, timesteps = transformer.prepare(conditioning_of()), torch.tensor([500.0])

    with_mask = transformer(latents_of(), timesteps, prepared, torch.zeros(1, 4, FRAMES, HEIGHT, WIDTH))

    assert torch.equal(with_mask, transformer(latents_of(), timesteps, prepared))


@pytest.mark.parametrize("num_history_frames", [1, FRAMES])
def test_history_tells_in_the_velocity(transformer, num_history_frames):
    prepared, timesteps = transformer.prepare(conditioning_of()), torch.tensor([500.0])
    mask = torch.zeros(1, 4, FRAMES, HEIGHT, WIDTH)
    mask[:, :, :num_history_frames] = 1

    with_mask = transformer(latents_of(), timesteps, prepared, mask)

    assert (with_mask - transformer(latents_of(), timesteps, prepared)).abs().max() > 0.01


def test_one_history_mask_is_shared_by_the_batch(transformer):
    prepared, timesteps = transformer.prepare(conditioning_of()), torch.tensor([500.0, 20.0])
    mask = random(1, 4, FRAMES, HEIGHT, WIDTH, seed=3).gt(0).float()

    shared = transformer(latents_of(2), timesteps, prepared, mask)

    assert torch.equal(shared, transformer(latents_of(2), timesteps, prepared, mask.repeat(2, 1, 1, 1, 1)))


@pytest.mark.parametrize("size", [(4, 8), (4, 4), (2, 2), (1, 2)])
def test_pose_latents_of_another_size_than_half_are_refused(transformer, size):
    conditioning = replace(conditioning_of(), pose_latents=torch.zeros(1, 16, FRAMES, *size))

    with pytest.raises(InvalidInputError, match="expected half of the reference's"):
        transformer.prepare(conditioning)


@pytest.mark.parametrize("size", [(6, 8), (8, 10), (5, 8)])
def test_latents_of_odd_size_are_refused_as_the_official_network_fails_on_them(transformer, size):
    height, width = size
    conditioning = replace(
        conditioning_of(),
        reference_latents=torch.zeros(1, 16, 1, height, width),
        pose_latents=torch.zeros(1, 16, FRAMES, height // 2, width // 2),
    )

    with pytest.raises(InvalidInputError, match=f"{height} x {width}.*multiples of 4"):
        transformer.prepare(conditioning)


def test_bfloat16_is_finite_and_close_to_float32(transformer):
    conditioning, timesteps = conditioning_of(), torch.tensor([972.2222])
    expected = transformer(latents_of(), timesteps, transformer.prepare(conditioning))
    half = deepcopy(transformer).to(torch.bfloat16)
    half_conditioning = Conditioning(*(value.bfloat16() for value in vars(conditioning).values()))

    velocity = half(latents_of().bfloat16(), timesteps, half.prepare(half_conditioning))

    assert velocity.dtype == torch.bfloat16
    assert (velocity.float() - expected).norm() / expected.norm() < 0.02  # official: 0.6 to 0.9 % on its tiny networks
