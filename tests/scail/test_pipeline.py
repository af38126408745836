from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from functools import partial

import numpy as np
import pytest
import torch

from scail.config import MAX_FRAMES, SamplingParams
from scail.errors import CheckpointError, GenerationError, Interrupted, InvalidInputError, OutOfMemoryError
from scail.models import causal_vae
from scail.pipeline import ScailPipeline, seeded_noise
from scail.types import LatentShape

SIZE = (32, 64)
FAST = SamplingParams(num_inference_steps=2, guidance_scale=3.0, seed=5)
STAGES = ["preprocess", "encode_text", "encode_image", "encode_pose", "denoise", "decode_latents"]


@pytest.fixture
def own_pipeline(tiny_checkpoint) -> ScailPipeline:
    return ScailPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture
def render(pipeline, reference, pose):
    """Renders the same clip but for what the test says; its frames."""

    def frames(**changes):
        arguments = {"reference": reference, "pose": pose, "prompt": "a dancer", "params": FAST, "size": SIZE}
        return pipeline(**{**arguments, **changes}).frames

    return frames


def test_a_reference_and_a_pose_video_become_frames(pipeline, reference, pose):
    output = pipeline(reference, pose, "a dancer", params=FAST, size=SIZE)

    assert output.frames.shape == (9, *SIZE, 3)
    assert output.frames.dtype == np.uint8
    assert output.frames.std() > 10  # random weights render varied noise
    assert output.latents.shape == (1, 16, 3, 4, 8)
    assert output.latents.dtype == torch.float32
    assert output.num_dropped_frames == 0
    assert output.peak_memory_gib > 0


def test_frames_are_handed_on_as_they_are_decoded(pipeline, reference, pose, monkeypatch):
    monkeypatch.setattr(causal_vae, "PIECE_NUMBERS", 1)
    pieces: list[np.ndarray] = []

    output = pipeline(reference, pose, "", params=FAST, size=SIZE, on_frames=pieces.append)

    assert [len(piece) for piece in pieces] == [1] * len(pose)
    assert np.array_equal(np.concatenate(pieces), output.frames)


def test_every_stage_is_timed_once_in_the_order_of_the_render(pipeline, reference, pose):
    output = pipeline(reference, pose, "", params=FAST, size=SIZE)

    assert list(output.seconds) == STAGES
    assert all(seconds > 0 for seconds in output.seconds.values())


@pytest.mark.parametrize(("num_frames", "num_rendered"), [(10, 9), (9, 9), (8, 5), (4, 1), (1, 1)])
def test_trailing_frames_are_dropped_and_reported(pipeline, reference, pose, num_frames, num_rendered):
    frames = np.concatenate([pose, pose])[:num_frames]

    output = pipeline(reference, frames, "", params=FAST, size=SIZE)

    assert len(output.frames) == num_rendered
    assert output.num_dropped_frames == num_frames - num_rendered


def test_a_frame_that_is_dropped_does_not_matter(render, pose):
    longer = np.concatenate([pose, pose[:1]])

    assert np.array_equal(render(pose=longer), render(pose=pose))


def test_without_a_size_the_official_rule_decides(pipeline, reference, pose, monkeypatch):
    sizes = []
    monkeypatch.setattr("scail.preprocess.target_size", lambda *size: sizes.append(size) or (64, 32))

    output = pipeline(reference, pose, "", params=FAST)

    assert sizes == [reference.shape[:2]]
    assert output.frames.shape[1:3] == (64, 32)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (0, 64), (33, 33)])
def test_sizes_are_refused_before_anything_runs(pipeline, reference, pose, layers_called, size):
    with pytest.raises(InvalidInputError, match="multiples of 32"):
        pipeline(reference, pose, "", params=FAST, size=size)
    assert layers_called == []


def test_more_frames_than_a_clip_has_are_refused_before_anything_runs(pipeline, reference, layers_called):
    with pytest.raises(InvalidInputError, match="pose has 82 frames; a clip has at most 81"):
        pipeline(reference, np.zeros((MAX_FRAMES + 1, 32, 32, 3), np.uint8), "", params=FAST, size=SIZE)
    assert layers_called == []


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("reference", (40, 72, 3), np.float32),
        ("reference", (40, 72), np.uint8),
        ("reference", (3, 40, 72), np.uint8),
        ("reference", (40, 72, 4), np.uint8),
        ("reference", (1, 40, 72, 3), np.uint8),
        ("reference", (0, 72, 3), np.uint8),
        ("pose", (9, 48, 80, 3), np.float32),
        ("pose", (9, 48, 80, 3), np.int64),
        ("pose", (48, 80, 3), np.uint8),
        ("pose", (9, 3, 48, 80), np.uint8),
        ("pose", (9, 48, 80, 4), np.uint8),
        ("pose", (0, 48, 80, 3), np.uint8),
        ("pose", (9, 48, 0, 3), np.uint8),
    ],
)
def test_other_types_and_axes_are_refused_before_anything_runs(
    pipeline, reference, pose, layers_called, name, shape, dtype
):
    arrays = {"reference": reference, "pose": pose, name: np.zeros(shape, dtype)}

    with pytest.raises(InvalidInputError, match=f"{name} is {np.dtype(dtype)}.*expected uint8"):
        pipeline(**arrays, prompt="", params=FAST, size=SIZE)
    assert layers_called == []


def test_a_reference_of_one_axis_is_refused_without_a_size_too(pipeline, pose):
    with pytest.raises(InvalidInputError, match=r"expected uint8 \(H, W, 3\)"):
        pipeline(np.zeros(40, np.uint8), pose, "", params=FAST)


def test_a_schedule_without_steps_is_refused_before_anything_runs(pipeline, reference, pose, layers_called):
    with pytest.raises(InvalidInputError, match="num_inference_steps is 0"):
        pipeline(reference, pose, "", params=replace(FAST, num_inference_steps=0), size=SIZE)
    assert layers_called == []


@pytest.mark.parametrize("name", ["reference", "pose"])
def test_pictures_may_be_views_with_reversed_axes(render, reference, pose, name):
    mirrored = {"reference": reference, "pose": pose}[name][..., ::-1]  # BGR to RGB, as everyone writes it

    assert np.array_equal(render(**{name: mirrored}), render(**{name: mirrored.copy()}))


def test_a_render_runs_layers_and_the_fixture_sees_them(render, layers_called):
    render()

    assert {"SelfAttention", "TextEncoder", "ImageEncoder"} <= set(layers_called)


def test_the_same_seed_gives_the_same_bytes(render):
    assert np.array_equal(render(), render())


@pytest.mark.parametrize(
    "changes",
    [
        {"params": replace(FAST, seed=6)},
        {"params": replace(FAST, guidance_scale=5.0)},
        {"params": replace(FAST, num_inference_steps=3)},
        {"params": replace(FAST, shift=1.0)},
        {"prompt": "a drummer"},
        {"negative_prompt": "blurred"},
        {"reference": np.full((40, 72, 3), 200, np.uint8)},
        {"pose": np.full((9, 48, 80, 3), 30, np.uint8)},
    ],
    ids=["seed", "guidance_scale", "num_inference_steps", "shift", "prompt", "negative_prompt", "reference", "pose"],
)
def test_whatever_is_asked_for_tells_in_the_frames(render, changes):
    assert not np.array_equal(render(**changes), render())


def test_a_seed_is_the_same_noise_whatever_ran_before():
    shape = LatentShape(3, 4, 8)

    first = seeded_noise(shape, 7)
    torch.manual_seed(1)
    torch.rand(100)

    assert torch.equal(seeded_noise(shape, 7), first)
    assert not torch.equal(seeded_noise(shape, 8), first)
    assert first.shape == (1, 16, 3, 4, 8)


def test_a_render_leaves_the_global_generator_alone(render):
    torch.manual_seed(1)
    before = torch.get_rng_state()

    render()

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("guidance_scale", "passes_a_step", "num_prompts"), [(4.0, 2, 2), (1.1, 2, 2), (1.0, 1, 1), (0.0, 1, 1)]
)
def test_without_guidance_the_unconditional_pass_is_skipped(
    pipeline, render, record_calls, guidance_scale, passes_a_step, num_prompts
):
    passes, prompts = record_calls(pipeline.transformer.head), record_calls(pipeline.text_encoder)

    render(params=SamplingParams(num_inference_steps=3, guidance_scale=guidance_scale))

    assert len(passes) == 3 * passes_a_step
    assert len(prompts) == num_prompts


def test_the_negative_prompt_does_not_matter_without_guidance(render):
    params = replace(FAST, guidance_scale=1.0)

    assert np.array_equal(render(params=params, negative_prompt="blurred"), render(params=params))


def test_the_vae_encodes_one_reference_frame_and_the_half_size_pose_and_nothing_else(pipeline, render, monkeypatch):
    shapes = []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: shapes.append(tuple(pixels.shape)) or encode(pixels))

    render()

    assert shapes == [(1, 3, 1, 32, 64), (1, 3, 9, 16, 32)]


def test_the_image_encoder_sees_the_cropped_reference(pipeline, render, record_calls):
    calls = record_calls(pipeline.image_encoder)

    render()

    assert [tuple(pixels.shape) for (pixels,) in calls] == [(1, 3, *SIZE)]


def test_steps_are_reported_in_order(render):
    steps = []

    render(on_step=lambda done, total: steps.append((done, total)))

    assert steps == [(1, 2), (2, 2)]


def test_an_interrupted_render_stops_within_one_step(pipeline, render, record_calls):
    passes = record_calls(pipeline.transformer.head)

    def stop(_done, _total):
        raise Interrupted

    with pytest.raises(Interrupted):
        render(params=replace(FAST, num_inference_steps=50), on_step=stop)
    assert len(passes) == 2  # one step, both sides of the guidance


def test_a_render_after_an_interrupted_one_is_not_changed_by_it(render):
    expected = render()

    def stop(_done, _total):
        raise Interrupted

    with pytest.raises(Interrupted):
        render(prompt="something else", on_step=stop)

    assert np.array_equal(render(), expected)


def test_a_pipeline_cannot_be_changed(pipeline):
    with pytest.raises(FrozenInstanceError):
        pipeline.dtype = torch.float16


def test_a_render_changes_no_weight_and_leaves_no_gradient(pipeline, render):
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}

    render()

    after = pipeline.transformer.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())


def test_weights_that_are_not_finite_are_an_error_and_not_a_black_clip(own_pipeline, reference, pose):
    own_pipeline.transformer.head.linear.bias.fill_(float("nan"))

    with pytest.raises(GenerationError, match="not finite"):
        own_pipeline(reference, pose, "", params=FAST, size=SIZE)


def test_too_little_memory_is_told_with_the_size_of_the_clip(pipeline, reference, pose, monkeypatch):
    def decode(_latents):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(pipeline.vae, "decode_pieces", decode)

    with pytest.raises(OutOfMemoryError, match="9 frames of 32 x 64 do not fit: tried to allocate 2 GiB"):
        pipeline(reference, pose, "", params=FAST, size=SIZE)


def test_padded_positions_of_a_prompt_are_exact_zeros(pipeline):
    context = pipeline.encode_prompt("jump")

    assert context.shape == (1, 512, 32)
    assert (context[0, :5] != 0).any(dim=-1).all()  # four bytes and the end
    assert torch.equal(context[0, 5:], torch.zeros(507, 32))


def test_bfloat16_renders_the_same_clip_but_for_rounding(tiny_checkpoint, pipeline, reference, pose):
    half = ScailPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)

    outputs = [model(reference, pose, "a dancer", params=FAST, size=SIZE) for model in (half, pipeline)]

    latents, expected = (output.latents for output in outputs)
    assert latents.dtype == torch.float32
    assert 0 < (latents - expected).norm() / expected.norm() < 0.05


def test_a_profile_is_taken_as_far_as_the_device_has_it(tiny_checkpoint, caplog):
    load = partial(ScailPipeline.from_pretrained, tiny_checkpoint, device="cpu", dtype=torch.float32)

    quality = load(profile="quality")

    assert (quality.quantization, quality.attention) == ("none", "sdpa")  # a CPU is no faster for either
    assert ["fp8 is not fast on cpu" in caplog.text, "attention float8 cannot be had" in caplog.text] == [True, True]
    assert load(profile="exact").quantization == "none"
    with pytest.raises(InvalidInputError, match=r"profile is 'turbo'; expected one of exact, quality, fast\."):
        load(profile="turbo")


@pytest.mark.parametrize("folder", ["transformer", "vae", "text_encoder", "image_encoder", "tokenizer"])
def test_a_checkpoint_without_one_of_its_parts_is_refused(tiny_checkpoint, tmp_path, folder):
    for path in tiny_checkpoint.iterdir():
        if path.name != folder:
            (tmp_path / path.name).symlink_to(path)

    with pytest.raises(CheckpointError, match=folder):
        ScailPipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
