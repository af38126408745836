"""LoRA files in every layout, against W + strength · (alpha / rank) · up · down written out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from scail.checkpoint import load_networks, shapes_of
from scail.config import SCAIL_TINY, LoraFile, RuntimeConfig
from scail.errors import CheckpointError
from scail.lora import Lora, places_of_wan_names

CONFIG = SCAIL_TINY.transformer
SIZE, RANK = CONFIG.hidden_size, 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tiny_checkpoint):
    state = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    return {key: tensor.float() for key, tensor in state.items()}


@pytest.fixture
def fused(weights, tmp_path):
    def fuse(tensors, strength=1.0):
        save_file(tensors, tmp_path / "lora.safetensors")
        shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        lora = Lora.open(tmp_path / "lora.safetensors", strength, CONFIG, shapes)
        return {key: lora.fuse(key, tensor) for key, tensor in weights.items()}, lora

    return fuse


def changed(state, weights):
    return {key for key in weights if not torch.equal(state[key], weights[key])}


PAIRS = [
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
]
LAYERS = [
    "blocks.1.ffn.0",
    "diffusion_model.blocks.1.ffn.0",
    "model.diffusion_model.blocks.1.ffn.0",
    "transformer.blocks.1.ffn.0",
    "base_model.model.blocks.1.ffn.0",
    "lora_unet_blocks_1_ffn_0",
    "transformer.blocks.1.ffn.net.0.proj",
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("down_name", "up_name"), PAIRS)
def test_a_pair_of_low_rank_is_added_under_every_name(layer, down_name, up_name, fused, weights):
    down, up = random(RANK, SIZE), random(CONFIG.ffn_size, RANK, seed=1)

    state, _ = fused({f"{layer}.{down_name}": down, f"{layer}.{up_name}": up}, strength=0.5)

    expected = weights["blocks.1.ffn.0.weight"] + 0.5 * (up @ down)
    assert torch.allclose(state["blocks.1.ffn.0.weight"], expected, atol=1e-6)
    assert changed(state, weights) == {"blocks.1.ffn.0.weight"}


def test_alpha_over_rank_scales_the_pair(fused, weights):
    down, up = random(RANK, SIZE), random(SIZE, RANK, seed=1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}

    state, _ = fused({f"blocks.0.cross_attn.o.{name}": tensor for name, tensor in tensors.items()})

    expected = weights["blocks.0.cross_attn.out.weight"] + 2.0 / RANK * (up @ down)
    assert torch.allclose(state["blocks.0.cross_attn.out.weight"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wan", "ours", "index"),
    [
        ("self_attn.q", "self_attn.qkv", 0),
        ("self_attn.k", "self_attn.qkv", 1),
        ("self_attn.v", "self_attn.qkv", 2),
        ("cross_attn.k", "cross_attn.text_kv", 0),
        ("cross_attn.v", "cross_attn.text_kv", 1),
        ("cross_attn.k_img", "cross_attn.image_kv", 0),
        ("cross_attn.v_img", "cross_attn.image_kv", 1),
        ("attn1.to_v", "self_attn.qkv", 2),
        ("attn2.add_v_proj", "cross_attn.image_kv", 1),
    ],
)
def test_what_is_one_layer_here_takes_the_delta_on_its_part(wan, ours, index, fused, weights):
    down, up = random(RANK, SIZE), random(SIZE, RANK, seed=1)

    state, _ = fused({f"blocks.0.{wan}.lora_down.weight": down, f"blocks.0.{wan}.lora_up.weight": up})

    expected = weights[f"blocks.0.{ours}.weight"].clone()
    expected[index * SIZE : (index + 1) * SIZE] += up @ down
    assert torch.allclose(state[f"blocks.0.{ours}.weight"], expected, atol=1e-6)


def test_whole_differences_go_to_weights_biases_norms_and_tables(fused, weights):
    deltas = {
        "blocks.0.self_attn.k.diff_b": random(SIZE),
        "blocks.0.norm3.diff": random(SIZE, seed=1),
        "blocks.0.self_attn.norm_q.diff": random(SIZE, seed=2),
        "head.head.diff": random(64, SIZE, seed=3),
        "time_projection.1.diff_b": random(6 * SIZE, seed=4),
        "blocks.0.modulation.diff": random(1, 6, SIZE, seed=5),
    }

    state, _ = fused({f"diffusion_model.{key}": tensor for key, tensor in deltas.items()}, strength=2.0)

    qkv_bias = weights["blocks.0.self_attn.qkv.bias"].clone()
    qkv_bias[SIZE : 2 * SIZE] += 2 * deltas["blocks.0.self_attn.k.diff_b"]
    assert torch.allclose(state["blocks.0.self_attn.qkv.bias"], qkv_bias)
    for ours, theirs in {
        "blocks.0.cross_attn_norm.weight": "blocks.0.norm3.diff",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "head.linear.weight": "head.head.diff",
        "time_projection.bias": "time_projection.1.diff_b",
        "blocks.0.modulation": "blocks.0.modulation.diff",
    }.items():
        assert torch.allclose(state[ours], weights[ours] + 2 * deltas[theirs], atol=1e-6)
    assert len(changed(state, weights)) == len(deltas)


def test_a_patch_embedding_of_36_channels_is_left_out_and_told(fused, weights, caplog):
    tensors = {
        "diffusion_model.patch_embedding.diff": random(SIZE, 36, 1, 2, 2),
        "diffusion_model.patch_embedding.diff_b": random(SIZE),
        "diffusion_model.blocks.0.ffn.2.diff_b": random(SIZE, seed=1),
    }

    state, lora = fused(tensors)

    assert changed(state, weights) == {"blocks.0.ffn.2.bias"}
    assert lora.left_out == ("diffusion_model.patch_embedding.diff", "diffusion_model.patch_embedding.diff_b")
    assert "patch_embedding.diff" in caplog.text


def test_a_patch_embedding_of_our_channels_is_taken(fused, weights):
    diff = random(SIZE, 20, 1, 2, 2)

    state, lora = fused({"patch_embedding.diff": diff})

    assert torch.allclose(state["patch_embedding.weight"], weights["patch_embedding.weight"] + diff, atol=1e-6)
    assert not lora.left_out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.0.ffn.9.lora_up.weight": (SIZE, 4)}, "belong to no layer of SCAIL: blocks.0.ffn.9.lora_up.weight"),
        ({"blocks.7.ffn.2.diff_b": (SIZE,)}, "belong to no layer"),
        ({"te_text_model.layers.0.lora_up.weight": (8, 4)}, "belong to no layer"),
        ({"blocks.0.ffn.2.lora_up.weight": (SIZE, 4)}, "without a partner"),
        (
            {"blocks.0.ffn.2.lora_up.weight": (99, 4), "blocks.0.ffn.2.lora_down.weight": (4, 96)},
            r"should give \[48, 96\]",
        ),
        ({"blocks.0.ffn.2.diff_b": (47,)}, r"is \[47\] and should be \[48\]"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tensors, message, fused):
    with pytest.raises(CheckpointError, match=message):
        fused({key: torch.zeros(shape) for key, shape in tensors.items()})


def test_every_parameter_of_wans_has_one_place_and_every_one_of_ours_is_covered(weights):
    places = places_of_wan_names(CONFIG.num_layers)

    parts = {(place.key, place.index) for place in places.values()}
    assert len(parts) == len(places)
    assert {place.key for place in places.values()} == set(weights)
    assert all(sum(place.key == key for place in places.values()) == places_of(key, places) for key in weights)


def places_of(key, places):
    return next(place.count for place in places.values() if place.key == key)


def test_a_lora_is_fused_while_a_checkpoint_is_loaded(tiny_checkpoint, tmp_path, weights):
    down, up = random(RANK, SIZE), random(SIZE, RANK, seed=1)
    path = tmp_path / "style.safetensors"
    save_file({"blocks.0.self_attn.q.lora_down.weight": down, "blocks.0.self_attn.q.lora_up.weight": up}, path)
    runtime = RuntimeConfig(loras=(LoraFile.parse(f"{path}:0.25"),))

    networks = load_networks(tiny_checkpoint, device=torch.device("cpu"), dtype=torch.float32, runtime=runtime)

    found = networks.transformer.state_dict()["blocks.0.self_attn.qkv.weight"]
    expected = weights["blocks.0.self_attn.qkv.weight"].clone()
    expected[:SIZE] += 0.25 * (up @ down)
    assert torch.equal(found, expected.bfloat16().float())  # rounded once, to the checkpoint's dtype
    assert shapes_of(networks.transformer).keys() == weights.keys()


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors", "a.safetensors", 1.0),
        ("/x/b:c", "/x/b:c", 1.0),
        ("a:nan", "a:nan", 1.0),
    ],
)
def test_a_file_and_its_strength_are_one_word(text, path, strength):
    assert LoraFile.parse(text) == LoraFile(path, strength)
