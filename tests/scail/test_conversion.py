from __future__ import annotations

import json
import logging
import pickle
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scail.checkpoint import (
    load_image_encoder,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    on_meta,
    shapes_of,
)
from scail.config import SCAIL_14B, SCAIL_TINY
from scail.conversion import Heads, convert, convert_transformer_state
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import check_folder, read_model_config
from scail.layouts import SAT_TRANSFORMER, WAN_TRANSFORMER
from scail.models.transformer import ScailTransformer
from tests.scail import layouts

KEYMAP = json.loads((Path(__file__).parent / "keymap_14b.json").read_text())
COMPONENTS = ("transformer", "vae", "text_encoder", "image_encoder")
SAT_FILE = "model/1/mp_rank_00_model_states.pt"


def at_block(template: str, block: int) -> str:
    return re.sub(r"\bN\b", str(block), template)


def weights_of(checkpoint_dir: Path) -> dict[str, torch.Tensor]:
    return {
        f"{component}/{key}": tensor
        for component in COMPONENTS
        for path in (checkpoint_dir / component).glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


@pytest.fixture
def source(tmp_path) -> Path:
    """An official folder."""
    layouts.write_official(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def dest(tmp_path) -> Path:
    return tmp_path / "converted"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The official folder, converted: what the other layouts must come to as well."""
    folder = tmp_path_factory.mktemp("official")
    layouts.write_official(folder / "source")
    convert(folder / "source", folder / "converted", heads=layouts.HEADS)
    return folder / "converted"


def test_the_tables_cover_the_14b_tensor_by_tensor():
    rows = [(row, block) for row in KEYMAP["rows"] for block in range(row["count"])]
    sat_shapes = {at_block(row["sat"], block): tuple(row["shape"]) for row, block in rows}
    wan_of = {at_block(row["sat"], block): tuple(at_block(name, block) for name in row["wan"]) for row, block in rows}

    sat = SAT_TRANSFORMER.recipes(sat_shapes)
    wan = WAN_TRANSFORMER.recipes([name for names in wan_of.values() for name in names])
    ours = {key: recipe.shape(sat_shapes) for key, recipe in sat.items()}

    assert len(sat_shapes) == 985
    assert {recipe.sources[0] for recipe in sat.values()} == sat_shapes.keys()
    assert {key: wan_of[recipe.sources[0]] for key, recipe in sat.items()} == {
        key: recipe.sources for key, recipe in wan.items()
    }
    assert ours == shapes_of(on_meta(lambda: ScailTransformer(SCAIL_14B.transformer)))
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == KEYMAP["parameters"]


def test_the_table_covers_the_tiny_transformer():
    num_blocks = SCAIL_TINY.transformer.num_layers
    names = [at_block(row["sat"], block) for row in KEYMAP["rows"] for block in range(min(row["count"], num_blocks))]

    recipes = SAT_TRANSFORMER.recipes(names)

    assert recipes.keys() == shapes_of(on_meta(lambda: ScailTransformer(SCAIL_TINY.transformer))).keys()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(layouts.write_wan_branch, id="wan-branch"),
        pytest.param(layouts.write_wan2gp, id="wan2gp"),
        pytest.param(layouts.write_comfyui, id="comfyui"),
        pytest.param(partial(layouts.write_comfyui, prefix="model.diffusion_model."), id="comfyui-long-prefix"),
    ],
)
def test_every_layout_comes_to_the_same_tensors(write, converted, tmp_path, dest):
    write(tmp_path / "source")

    convert(tmp_path / "source", dest, heads=layouts.HEADS)

    expected, found = weights_of(converted), weights_of(dest)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_model_config(dest) == read_model_config(converted)


def test_networks_in_the_libraries_names_are_read_as_well(converted, source, dest):
    (source / "Wan2.1_VAE.pth").unlink()
    (source / "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth").unlink()
    text_encoder = load_file(converted / "text_encoder/model.safetensors")
    text_encoder["shared.weight"] = text_encoder["encoder.embed_tokens.weight"].clone()
    save_file(text_encoder, source / "umt5.safetensors")
    (source / "vae.safetensors").write_bytes((converted / "vae/diffusion_pytorch_model.safetensors").read_bytes())

    report = convert(source, dest, heads=layouts.HEADS)

    expected, found = weights_of(converted), weights_of(dest)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert report.left_out["text_encoder"] == ("shared.weight",)


def test_an_image_encoder_that_lost_its_last_block_is_not_taken_for_a_whole_one(converted, source, dest):
    next(source.glob("models_clip*")).unlink()
    (source / "clip.safetensors").write_bytes((converted / "image_encoder/model.safetensors").read_bytes())

    with pytest.raises(CheckpointError, match=r"no image_encoder.*clip\.safetensors"):
        convert(source, dest, heads=layouts.HEADS)


def test_the_official_transformer_arrives_unchanged(converted):
    transformer = load_transformer(converted, device="cpu", dtype=torch.bfloat16)

    expected = convert_transformer_state(layouts.original_weights().transformer)
    found = transformer.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert found["blocks.1.cross_attn.text_kv.weight"].equal(
        layouts.original_weights().transformer["transformer.layers.1.cross_attention.key_value.weight"]
    )


@torch.inference_mode()
def test_the_converted_networks_compute_what_the_official_ones_do(converted):
    golden = load_file(layouts.GOLDEN)
    reference_pixels = golden["case0.ref_pixels"]

    context = load_text_encoder(converted, device="cpu", dtype=torch.float32)(golden["case0.ids"], golden["case0.mask"])
    image_embeds = load_image_encoder(converted, device="cpu", dtype=torch.float32)(reference_pixels[:, :, 0])
    latents = load_vae(converted, device="cpu", dtype=torch.float32).encode(reference_pixels)

    # Tolerances of the recorded tensors: float32 rounding in another order of the same sums.
    torch.testing.assert_close(context, golden["case0.context"], rtol=0, atol=2e-5)
    torch.testing.assert_close(image_embeds, golden["case0.clip"], rtol=0, atol=2e-5)
    torch.testing.assert_close(latents, golden["case0.ref_latent"], rtol=0, atol=1e-5)


def test_sizes_are_read_off_the_tensors(converted):
    config = read_model_config(converted)

    assert (config.transformer.num_layers, config.transformer.hidden_size, config.transformer.num_heads) == (2, 64, 2)
    assert (config.transformer.latent_channels, config.transformer.mask_channels) == (16, 4)
    assert config.vae.base_size == 4
    assert (config.text_encoder.vocab_size, config.text_encoder.attention_size, config.text_encoder.num_heads) == (
        120,
        24,
        3,
    )
    assert (config.image_encoder.image_size, config.image_encoder.num_layers) == (56, 4)
    assert check_folder(converted) == []
    assert load_tokenizer(converted)("abc")[0].shape == (1, 512)


def test_heads_come_from_the_config_beside_the_file(tmp_path, dest):
    layouts.write_wan_branch(tmp_path / "source")

    report = convert(tmp_path / "source", dest, heads=Heads(image_encoder=4))

    assert report.config.transformer.num_heads == 2


def test_a_size_without_a_known_number_of_heads_is_refused(source, dest):
    with pytest.raises(CheckpointError, match=r"hidden size is 64, no multiple of 128: say how many heads"):
        convert(source, dest)


def test_weights_take_the_dtype_asked_for_and_the_vae_stays_float32(source, dest):
    convert(source, dest, dtype=torch.float16, heads=layouts.HEADS)

    dtypes = {key.split("/")[0]: tensor.dtype for key, tensor in weights_of(dest).items()}
    assert dtypes == dict.fromkeys(COMPONENTS, torch.float16) | {"vae": torch.float32}


def test_shards_hold_the_same_tensors_as_one_file(converted, source, dest):
    written = []

    convert(
        source,
        dest,
        heads=layouts.HEADS,
        max_shard_bytes=50_000,
        on_progress=lambda component, done, total: written.append((component, done, total)),
    )

    shards = sorted((dest / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert weights_of(dest).keys() == weights_of(converted).keys()
    found = load_transformer(dest, device="cpu", dtype=torch.bfloat16).state_dict()
    expected = load_transformer(converted, device="cpu", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [done for component, done, _ in written if component == "transformer"][-1] == written[0][2]
    assert check_folder(dest) == []


def test_keys_of_other_networks_in_the_sat_file_are_left_out_and_told(source, dest, caplog):
    beside = {"conditioner.embedder.weight": torch.zeros(2), "first_stage_model.x": torch.zeros(2)}
    layouts.write_sat(source / SAT_FILE, layouts.original_weights().transformer, beside)

    with caplog.at_level(logging.INFO, logger="scail"):
        report = convert(source, dest, heads=layouts.HEADS)

    assert report.left_out["transformer"] == ("conditioner.embedder.weight", "first_stage_model.x")
    assert report.taken["transformer"] == f"{source / SAT_FILE} (SAT names)"
    assert "conditioner.embedder.weight" in caplog.text


def test_an_unknown_key_of_the_transformer_is_refused(source, dest):
    transformer = layouts.original_weights().transformer | {"mixins.patch_embed.proj_mask.weight": torch.zeros(2)}
    layouts.write_sat(source / SAT_FILE, transformer)

    with pytest.raises(CheckpointError, match=r"1 tensors are not known: mixins\.patch_embed\.proj_mask\.weight"):
        convert(source, dest, heads=layouts.HEADS)


def test_a_missing_key_is_named(source, dest):
    transformer = layouts.original_weights().transformer
    del transformer["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    layouts.write_sat(source / SAT_FILE, transformer)

    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing: transformer\.layers\.1\.mlp\.dense_h_to_4h\.bias"
    ):
        convert(source, dest, heads=layouts.HEADS)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("umt5-xxl/models_t5_umt5-xxl-enc-bf16.safetensors", "blocks.1.attn.o.weight"),
        ("Wan2.1_VAE.safetensors", "encoder.downsamples.0.residual.2.weight"),
        ("Wan2.1_VAE.safetensors", "encoder.conv1.weight"),
    ],
)
def test_a_key_missing_in_another_network_is_refused_too(file, key, tmp_path, dest):
    layouts.write_wan2gp(tmp_path / "source")
    state = load_file(tmp_path / "source" / file)
    del state[key]
    save_file(state, tmp_path / "source" / file)

    with pytest.raises(CheckpointError, match="missing"):
        convert(tmp_path / "source", dest, heads=layouts.HEADS)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("blocks.1.self_attn.k.bias", [63], "should be of one shape"),
        ("patch_embedding.weight", [64, 20], "too many or too few axes"),
    ],
)
def test_tensors_that_cannot_be_joined_or_measured_are_refused(key, shape, message, tmp_path, dest):
    layouts.write_wan2gp(tmp_path / "source")
    path = tmp_path / "source/wan2.1_scail_preview_14B_bf16.safetensors"
    save_file(load_file(path) | {key: torch.zeros(shape)}, path)

    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "source", dest, heads=layouts.HEADS)


def test_a_misshapen_tensor_is_refused(source, dest):
    transformer = layouts.original_weights().transformer
    transformer["transformer.layers.1.attention.dense.bias"] = torch.zeros(3)
    layouts.write_sat(source / SAT_FILE, transformer)

    with pytest.raises(CheckpointError, match=r"blocks\.1\.self_attn\.out\.bias is \[3\] and should be \[64\]"):
        convert(source, dest, heads=layouts.HEADS)


def test_a_wan_transformer_without_pose_patches_is_refused(tmp_path, dest):
    layouts.write_wan2gp(tmp_path / "source")
    path = tmp_path / "source/wan2.1_scail_preview_14B_bf16.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.startswith("pose_")}, path)

    with pytest.raises(CheckpointError, match=r"missing: pose_patch_embedding\.bias, pose_patch_embedding\.weight"):
        convert(tmp_path / "source", dest, heads=layouts.HEADS)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_quantised_transformer_is_refused(scaled, tmp_path, dest):
    layouts.write_comfyui(tmp_path / "source")
    path = tmp_path / "source/diffusion_models/scail.safetensors"
    state = load_file(path)
    if scaled:
        state["diffusion_model.blocks.0.ffn.0.scale_weight"] = torch.ones(1)
    else:
        key = "diffusion_model.blocks.0.ffn.0.weight"
        state[key] = state[key].to(torch.float8_e4m3fn)
    save_file(state, path)

    with pytest.raises(CheckpointError, match=r"is quantised \(blocks\.0\.ffn\.0\..* cannot be read back exactly"):
        convert(tmp_path / "source", dest, heads=layouts.HEADS)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_holds_code_is_refused_and_not_run(source, dest, tmp_path):
    torch.save({"module": {"x": torch.zeros(1)}, "args": Malicious(tmp_path / "was_run")}, source / SAT_FILE)

    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt holds pickled objects other than tensors"):
        convert(source, dest, heads=layouts.HEADS)

    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("damage", ["legacy", "plain pickle", "cut off"])
def test_a_torch_file_that_cannot_be_mapped_is_refused(damage, source, dest):
    path = source / "Wan2.1_VAE.pth"
    if damage == "legacy":
        torch.save(layouts.original_weights().vae, path, _use_new_zipfile_serialization=False)
    elif damage == "plain pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        path.write_bytes(path.read_bytes()[:-2000])

    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth is not a torch archive that can be mapped"):
        convert(source, dest, heads=layouts.HEADS)


def test_a_truncated_safetensors_file_is_refused(tmp_path, dest):
    layouts.write_wan2gp(tmp_path / "source")
    path = tmp_path / "source/Wan2.1_VAE.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="was not written to the end"):
        convert(tmp_path / "source", dest, heads=layouts.HEADS)


def test_all_that_is_not_found_is_named_at_once(tmp_path, dest):
    (tmp_path / "source").mkdir()
    save_file({"lora.down": torch.zeros(2)}, tmp_path / "source/lora.safetensors")

    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "source", dest)

    assert "no transformer; no vae; no text_encoder; no image_encoder" in str(error.value)
    assert "lora.safetensors" in str(error.value)


def test_two_files_for_one_network_are_refused(source, dest):
    layouts.write_safetensors(source / "second.safetensors", layouts.original_weights().vae)

    with pytest.raises(CheckpointError, match=r"more than one vae: .*Wan2\.1_VAE\.pth .*second\.safetensors"):
        convert(source, dest, heads=layouts.HEADS)


def test_a_folder_without_umt5s_tokenizer_is_refused(source, dest):
    (source / "umt5-xxl/tokenizer.json").unlink()

    with pytest.raises(CheckpointError, match=r"one umt5 tokenizer .*found none"):
        convert(source, dest, heads=layouts.HEADS)


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_knows_is_refused(source, dest):
    symbols = ("<pad>", "</s>", "<unk>", *(f"<extra_{index}>" for index in range(120)))
    layouts.write_tokenizer(source / "umt5-xxl", symbols)

    with pytest.raises(CheckpointError, match="are not of one model"):
        convert(source, dest, heads=layouts.HEADS)

    assert not dest.exists()


def test_a_destination_in_use_is_refused(source, dest):
    dest.mkdir()
    (dest / "notes.txt").touch()

    with pytest.raises(InvalidInputError, match="is in use"):
        convert(source, dest, heads=layouts.HEADS)


def test_an_empty_destination_is_used(source, dest):
    dest.mkdir()

    convert(source, dest, heads=layouts.HEADS)

    assert check_folder(dest) == []


def test_a_converted_folder_is_no_source(converted, dest):
    with pytest.raises(InvalidInputError, match="converted already"):
        convert(converted, dest)


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(source, dest):
    def stop(component: str, done: int, total: int) -> None:
        if component == "text_encoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, dest, heads=layouts.HEADS, on_progress=stop)

    assert sorted(path.name for path in dest.parent.iterdir()) == ["source"]


def test_a_killed_conversion_leaves_only_a_hidden_partial_folder(source, dest):
    script = f"""
        import os
        from pathlib import Path
        from scail.conversion import Heads, convert
        convert(Path({str(source)!r}), Path({str(dest)!r}), heads=Heads(2, 4), on_progress=lambda *_: os._exit(9))
    """

    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)

    assert result.returncode == 9
    assert not dest.exists()
    convert(source, dest, heads=layouts.HEADS)
    assert check_folder(dest) == []


@pytest.mark.slow
def test_memory_follows_the_shards_and_not_the_file(tmp_path):
    source, dest = tmp_path / "source", tmp_path / "converted"
    layouts.write_official(source)
    config = {"hidden": 768, "ffn": 3072, "layers": 16}
    layouts.write_sat(source / SAT_FILE, enlarged(**config))
    script = f"""
        import json, resource
        from pathlib import Path
        from scail.conversion import Heads, convert
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        convert(Path({str(source)!r}), Path({str(dest)!r}), heads=Heads(6, 4), max_shard_bytes=16 * 2**20)
        print(json.dumps(peak() - before))
    """

    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True
    ).stdout

    growth, file_size = json.loads(output), (source / SAT_FILE).stat().st_size
    assert file_size > 600 * 2**20  # float32
    assert growth < 6 * 16 * 2**20  # a shard, its float32 source, the largest tensor, and the allocator's slack


def enlarged(hidden: int, ffn: int, layers: int) -> dict[str, torch.Tensor]:
    """A SAT transformer of other sizes, by the 14B's shapes."""
    sizes = {5120: hidden, 15360: 3 * hidden, 10240: 2 * hidden, 13824: ffn, 30720: 6 * hidden, 4096: 32, 1280: 40}
    return {
        at_block(row["sat"], block): torch.zeros([sizes.get(size, size) for size in row["shape"]])
        for row in KEYMAP["rows"]
        for block in range(min(row["count"], layers))
    }
