"""Checkpoints made of others: quantised, with LoRAs fused; and that they are what loading would have made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scail.checkpoint import load_networks
from scail.config import LoraFile, RuntimeConfig, SamplingParams
from scail.conversion import convert
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import (
    TRANSFORMER,
    check_folder,
    checkpoint_fingerprint,
    component_headers,
    read_loras,
    read_notice,
    read_quantization,
)
from scail.loading import fill
from scail.pipeline import ScailPipeline
from scail.rewriting import rewrite
from tests.scail import layouts

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["fp8", "int8"])
def kind(request):
    return request.param


@pytest.fixture
def quantized(tiny_checkpoint, kind, tmp_path):
    rewrite(tiny_checkpoint, tmp_path / "quantized", quantization=kind)
    return tmp_path / "quantized"


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file({"blocks.1.self_attn.v.diff": torch.randn(48, 48, generator=torch.Generator().manual_seed(3))}, path)
    return LoraFile(str(path), 0.5)


def transformer_of(folder, **runtime):
    runtime = RuntimeConfig(**runtime)
    return load_networks(folder, device=CPU, dtype=torch.bfloat16, runtime=runtime).transformer.state_dict()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].float(), expected[key].float()) for key in expected)
    assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in expected.items()}


def test_what_is_quantised_on_disk_is_what_loading_makes_of_the_original(tiny_checkpoint, quantized, kind):
    assert_equal(transformer_of(quantized), transformer_of(tiny_checkpoint, quantization=kind))


def test_a_quantised_folder_says_so_and_is_another_checkpoint(tiny_checkpoint, quantized, kind):
    assert check_folder(quantized) == []
    assert read_quantization(quantized) == kind
    assert read_quantization(tiny_checkpoint) == "none"
    assert read_notice(quantized) == read_notice(tiny_checkpoint)
    assert checkpoint_fingerprint(quantized) != checkpoint_fingerprint(tiny_checkpoint)
    small = {tensor.element_size() for tensor in load_file(quantized / WEIGHTS).values()}
    assert small == {1, 2, 4}  # weights, what stays bfloat16, scales


def test_a_quantised_folder_renders_whatever_arithmetic_is_asked_for(quantized, kind, reference, pose):
    pipeline = ScailPipeline.from_pretrained(quantized, device="cpu", dtype=torch.float32)

    output = pipeline(reference, pose, "a dancer", size=(32, 64), params=SamplingParams(num_inference_steps=1))

    assert pipeline.quantization == kind
    assert torch.isfinite(output.latents).all()


def test_shards_hold_each_weight_with_its_scales(tiny_checkpoint, tmp_path):
    rewrite(tiny_checkpoint, tmp_path / "small", quantization="fp8", max_shard_bytes=20_000)

    files = component_headers(tmp_path / "small", TRANSFORMER)
    assert len(files) > 3
    for headers in files.values():
        assert all(f"{key}_scale" in headers for key, header in headers.items() if header.dtype == "F8_E4M3")
    assert_equal(transformer_of(tmp_path / "small"), transformer_of(tiny_checkpoint, quantization="fp8"))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_lora_is_fused_on_disk_as_it_is_at_load(quantization, tiny_checkpoint, lora, tmp_path):
    rewrite(tiny_checkpoint, tmp_path / "fused", loras=[lora], quantization=quantization)

    assert read_loras(tmp_path / "fused") == ("style.safetensors:0.5",)
    expected = transformer_of(tiny_checkpoint, loras=(lora,), quantization=quantization)
    assert_equal(transformer_of(tmp_path / "fused"), expected)


def test_original_files_become_a_quantised_folder_in_one_go(tmp_path):
    layouts.write_official(tmp_path / "source")
    for dest, changes in {"plain": {}, "fp8": {"quantization": "fp8"}}.items():
        convert(tmp_path / "source", tmp_path / dest, heads=layouts.HEADS, **changes)

    rewrite(tmp_path / "plain", tmp_path / "rewritten", quantization="fp8")

    assert_equal(load_file(tmp_path / "fp8" / WEIGHTS), load_file(tmp_path / "rewritten" / WEIGHTS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "fp8"}, "is quantised .* already"),
        ({"loras": [LoraFile("style.safetensors")]}, "a LoRA is fused before that"),
        ({}, "is converted already"),
    ],
)
def test_a_folder_that_cannot_be_changed_so_is_refused(changes, message, quantized, kind, tmp_path):
    changes = changes if changes.get("quantization") is None else {"quantization": kind}

    with pytest.raises(InvalidInputError, match=message):
        rewrite(quantized, tmp_path / "again", **changes)

    assert not (tmp_path / "again").exists()


def test_another_arithmetic_of_quantised_weights_is_refused(quantized, kind):
    other = {"fp8": "int8", "int8": "fp8"}[kind]

    with pytest.raises(InvalidInputError, match=f"quantised \\({kind}\\) and cannot be made {other}"):
        transformer_of(quantized, quantization=other)


def test_weights_without_their_rounding_are_refused(tiny_checkpoint, quantized):
    plain, state = load_file(tiny_checkpoint / WEIGHTS), load_file(quantized / WEIGHTS)
    key = "blocks.0.ffn.0.weight"
    save_file(state | {key: plain[key]}, quantized / WEIGHTS)

    with pytest.raises(CheckpointError, match=rf"{key} is BF16; by model_index.json it should be"):
        transformer_of(quantized)


def test_a_folder_that_says_an_unknown_arithmetic_is_refused(quantized):
    index = quantized / "model_index.json"
    index.write_text(index.read_text().replace('"quantization": "', '"quantization": "x'))

    with pytest.raises(CheckpointError, match=r"is quantised as 'x.*'; known are none, fp8, int8"):
        transformer_of(quantized)


def test_threads_fill_memory_with_what_the_files_hold(tiny_checkpoint):
    expected = load_file(tiny_checkpoint / WEIGHTS)
    files = component_headers(tiny_checkpoint, TRANSFORMER)
    targets = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in expected.items()}
    targets["head.linear.bias"] = torch.empty_like(expected["head.linear.bias"], dtype=torch.float32)  # converted

    fill(targets, files, device=CPU, num_threads=3)

    assert all(torch.equal(targets[key].float(), tensor.float()) for key, tensor in expected.items())


def test_a_file_that_became_shorter_since_its_header_was_read_is_an_error(tiny_checkpoint, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(Path(tiny_checkpoint / WEIGHTS).read_bytes())
    headers = next(iter(component_headers(tiny_checkpoint, TRANSFORMER).values()))
    targets = {key: tensor.clone() for key, tensor in load_file(path).items()}
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="ends at byte"):
        fill(targets, {path: headers}, device=CPU)
