"""Memory policies: whatever of a model waits on the host, the same bits come out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scail import bench, memory
from scail.checkpoint import on_meta
from scail.config import SCAIL_14B, SCAIL_TINY, RuntimeConfig, SamplingParams
from scail.errors import Interrupted
from scail.memory import Placement, spread
from scail.models.transformer import ScailTransformer
from scail.quantization import quantize_blocks
from scail.streaming import ALIGNMENT, LayerStream, Slots, Stack

CPU = torch.device("cpu")
DEEP = replace(SCAIL_TINY, transformer=replace(SCAIL_TINY.transformer, num_layers=5))
PARAMS = SamplingParams(num_inference_steps=2, guidance_scale=3.0)
SIZE = (32, 64)


def deep_pipeline(memory_policy="resident", num_resident_blocks=None, quantization="none"):
    """Five blocks of random weights; the same ones each time."""
    runtime = RuntimeConfig(memory="resident", quantization=quantization)
    pipeline = bench.random_pipeline(DEEP, device=CPU, dtype=torch.float32, runtime=runtime)
    placement = Placement(
        pipeline.transformer,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        image_encoder=pipeline.image_encoder,
        device=CPU,
        policy=memory_policy,
        num_resident_blocks=num_resident_blocks,
    )
    return replace(pipeline, placement=placement)


def render(pipeline, reference, pose, **changes):
    return pipeline(reference, pose, "a dancer", params=PARAMS, size=SIZE, **changes)


@pytest.fixture(scope="module")
def expected():
    cache = {}

    def of(reference, pose, quantization="none"):
        if quantization not in cache:
            cache[quantization] = render(deep_pipeline(quantization=quantization), reference, pose)
        return cache[quantization]

    return of


@pytest.mark.parametrize("num_resident", range(6))
def test_however_many_blocks_stay_the_bits_are_the_same(num_resident, expected, reference, pose):
    streamed = render(deep_pipeline("balanced", num_resident), reference, pose)

    assert torch.equal(streamed.latents, expected(reference, pose).latents)
    assert (streamed.frames == expected(reference, pose).frames).all()


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_quantised_blocks_are_streamed_to_the_same_bits(quantization, expected, reference, pose):
    streamed = render(deep_pipeline("low", quantization=quantization), reference, pose)

    assert torch.equal(streamed.latents, expected(reference, pose, quantization).latents)


def test_one_clip_after_another_is_the_same_clip(expected, reference, pose):
    pipeline = deep_pipeline("low")

    clips = [render(pipeline, reference, pose) for _ in range(2)]

    assert all(torch.equal(clip.latents, expected(reference, pose).latents) for clip in clips)


def test_a_clip_after_an_interrupted_one_is_not_changed_by_it(expected, reference, pose):
    pipeline = deep_pipeline("low")

    def stop(*_progress):
        raise Interrupted

    with pytest.raises(Interrupted):
        render(pipeline, reference, pose, on_step=stop)

    assert torch.equal(render(pipeline, reference, pose).latents, expected(reference, pose).latents)


def test_a_sweep_that_breaks_off_leaves_the_next_one_right():
    layers = [nn.Linear(2, 2) for _ in range(4)]
    biases = [layer.bias.detach().clone() for layer in layers]
    stream = stream_of(layers, range(4))

    next(iter(stream))

    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(stream, biases, strict=True))


def stream_of(layers, waiting, slots=None):
    stack = Stack(layers, waiting)
    return LayerStream(stack, slots or Slots(stack.num_bytes, CPU))


def test_the_next_layer_is_on_its_way_while_one_computes(monkeypatch):
    brought = []
    bring = Slots.bring
    monkeypatch.setattr(Slots, "bring", lambda self, key, flat: brought.append(key[1]) or bring(self, key, flat))
    stream = stream_of([nn.Linear(2, 2) for _ in range(3)], [0, 2])

    sweep = iter(stream)
    next(sweep)
    assert brought == [0, 2]  # the first and, ahead of time, the next that waits
    list(sweep)

    assert brought == [0, 2, 2, 0]  # the last sweep's end is the next one's beginning


def test_stacks_that_share_their_slots_do_not_disturb_one_another():
    slots = Slots(ALIGNMENT * 4, CPU)
    stacks = [[nn.Linear(2, 3) for _ in range(3)], [nn.Linear(4, 1) for _ in range(2)]]
    biases = [[layer.bias.detach().clone() for layer in layers] for layers in stacks]
    streams = [stream_of(layers, range(len(layers)), slots) for layers in stacks]

    for _ in range(3):
        for stream, expected_biases in zip(streams, biases, strict=True):
            found = [layer.bias.clone() for layer in stream]
            assert all(map(torch.equal, found, expected_biases))


def test_a_streamed_model_keeps_no_second_copy_on_its_device():
    pipeline = deep_pipeline("low")

    executing = pipeline.transformer._sources[1].executing
    assert len(executing) == 2
    used = {
        tensor.untyped_storage().data_ptr()
        for block in executing
        for tensor in block.parameters()
        if not tensor.is_meta
    }
    assert len(used) == 2  # two slots, whatever the number of blocks


def test_what_only_the_conditioning_uses_does_not_pass_through_at_every_step(monkeypatch, reference, pose):
    pipeline = deep_pipeline("low")
    conditioning, steps = pipeline.transformer._sources
    brought = []
    bring = Slots.bring
    monkeypatch.setattr(Slots, "bring", lambda self, key, flat: brought.append(key[0]) or bring(self, key, flat))

    render(pipeline, reference, pose)

    sides, num_steps, num_blocks = 2, PARAMS.num_inference_steps, DEEP.transformer.num_layers
    assert brought.count(id(conditioning)) == 2 * sides * num_blocks  # each is asked for once, and once ahead
    assert brought.count(id(steps)) == 2 * num_steps * num_blocks  # both sides of the guidance in one pass


def test_blocks_that_wait_are_spread_over_the_pass():
    assert spread(10, 0) == []
    assert spread(10, 3) == [0, 3, 6]
    assert spread(10, 10) == list(range(10))


def sizes_of_14b(quantization="none"):
    networks = [on_meta(build).bfloat16() for build in (lambda: ScailTransformer(SCAIL_14B.transformer), *others())]
    if quantization != "none":
        quantize_blocks(networks[0], quantization)
    return memory._Sizes.of(networks[0], networks[1:], CPU)


def others():
    return (
        lambda: bench.VideoVae.from_config(SCAIL_14B.vae),
        lambda: bench.TextEncoder.from_config(SCAIL_14B.text_encoder),
        lambda: bench.ImageEncoder.from_config(SCAIL_14B.image_encoder),
    )


@pytest.fixture(scope="module")
def sizes():
    return {quantization: sizes_of_14b(quantization) for quantization in ("none", "fp8")}


def test_within_the_balanced_budget_half_of_the_blocks_stay_in_bfloat16_and_nearly_all_in_float8(sizes):
    assert 12 <= sizes["none"].num_blocks_within(memory.BALANCED_BYTES) <= 24
    assert sizes["fp8"].num_blocks_within(memory.BALANCED_BYTES) >= 34


@pytest.mark.parametrize(
    ("free_gb", "quantization", "policy"),
    [
        (79, "none", "resident"),
        (47, "none", "balanced"),
        (47, "fp8", "resident"),
        (25, "none", "balanced"),
        (16, "fp8", "low"),
    ],
)
def test_auto_takes_the_fastest_policy_for_which_there_is_room(free_gb, quantization, policy, sizes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free_gb * 1_000_000_000, 0))

    chosen, budget = memory.choose_policy("auto", sizes[quantization], torch.device("cuda"))

    assert chosen == policy
    assert budget < free_gb * 1_000_000_000


def test_auto_on_a_cpu_leaves_everything_where_it_is(sizes):
    assert memory.choose_policy("auto", sizes["none"], CPU)[0] == "resident"


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CUDA = torch.device("cuda", 0)
WIDE = replace(
    SCAIL_TINY,
    transformer=replace(SCAIL_TINY.transformer, num_layers=7, hidden_size=1024, num_heads=8, ffn_size=4096),
)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("memory_policy", "quantization", "compiled"),
    [("low", "none", False), ("balanced", "none", False), ("low", "fp8", True)],
)
def test_on_a_gpu_blocks_that_are_copied_beside_the_computing_give_the_same_bits(
    memory_policy, quantization, compiled, reference, pose, monkeypatch
):
    monkeypatch.setattr(memory._Sizes, "num_blocks_within", lambda _sizes, _budget: 3)
    latents = {}
    for policy in ("resident", memory_policy):
        runtime = RuntimeConfig(memory=policy, quantization=quantization, compiled=compiled)
        pipeline = bench.random_pipeline(WIDE, device=CUDA, dtype=torch.bfloat16, runtime=runtime)
        latents[policy] = [
            pipeline(reference, pose, "a dancer", params=PARAMS, size=(256, 448)).latents for _ in range(2)
        ]

    first = latents["resident"][0]
    assert all(torch.equal(first, again) for again in (latents["resident"][1], *latents[memory_policy]))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("policy", ["resident", "low"])
def test_on_a_gpu_a_checkpoint_arrives_whole_under_every_policy(policy, tiny_checkpoint):
    from scail.checkpoint import load_networks, load_transformer

    networks = load_networks(
        tiny_checkpoint, device=CUDA, dtype=torch.bfloat16, runtime=RuntimeConfig(memory=policy, quantization="int8")
    )
    expected = load_transformer(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    quantize_blocks(expected, "int8")

    found = {key: tensor.cpu() for key, tensor in networks.transformer.state_dict().items()}
    for key, tensor in expected.state_dict().items():
        assert (found[key].float() - tensor.float()).abs().max() <= (1 if tensor.dtype == torch.int8 else 1e-6), key


@pytest.mark.parametrize(("total", "left"), [(80e9, 2e9), (24e9, 2e9), (3e9, 1.5e9)])
def test_torch_may_not_keep_the_whole_device(monkeypatch, total, left):
    shares = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=int(total)))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.update({device.index: share})
    )
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda _settings: None)

    memory.prepare_allocator(torch.device("cuda", 1))
    memory.prepare_allocator(CPU)

    assert {index: round(total * (1 - share)) for index, share in shares.items()} == {1: round(left)}


@pytest.mark.parametrize("variable", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_up_unless_the_user_has_done_it(monkeypatch, variable):
    settings = []
    for name in memory.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=int(80e9)))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)

    memory.prepare_allocator(torch.device("cuda", 0))

    assert settings == ([] if variable else ["expandable_segments:True"])
