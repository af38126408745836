from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from scail import fingerprint
from scail.checkpoint import (
    Shard,
    load_image_encoder,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    plan_shards,
    write_index,
    write_random_checkpoint,
)
from scail.config import SCAIL_TINY
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import check_folder, checkpoint_fingerprint, read_model_config
from scail.types import Conditioning

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    return folder


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, or take out those that are None."""
    state = load_file(path) | changes
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(checkpoint_dir: Path):
    return load_transformer(checkpoint_dir, device="cpu", dtype=torch.float32)


def test_a_random_checkpoint_has_the_real_folders_layout(original):
    files = sorted(path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file())

    assert files == [
        "files.json",
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert read_model_config(original) == SCAIL_TINY
    assert check_folder(original) == []


def test_the_same_seed_writes_the_same_weights(original, tmp_path):
    write_random_checkpoint(tmp_path / "again", SCAIL_TINY, seed=0)
    write_random_checkpoint(tmp_path / "other", SCAIL_TINY, seed=1)

    assert checkpoint_fingerprint(tmp_path / "again") == checkpoint_fingerprint(original)
    assert checkpoint_fingerprint(tmp_path / "other") != checkpoint_fingerprint(original)


def test_a_folder_in_use_is_not_written_over(checkpoint):
    with pytest.raises(InvalidInputError, match="is not empty"):
        write_random_checkpoint(checkpoint, SCAIL_TINY, seed=0)


@torch.inference_mode()
def test_random_weights_give_finite_and_varied_results(original):
    generator = torch.Generator().manual_seed(0)
    token_ids, mask = load_tokenizer(original)("a dancer")
    pixels = torch.rand(1, 3, 5, 64, 32, generator=generator) * 2 - 1
    vae = load_vae(original, device="cpu", dtype=torch.float32)
    transformer = load(original)

    latents = vae.encode(pixels)
    conditioning = Conditioning(
        context=load_text_encoder(original, device="cpu", dtype=torch.float32)(token_ids, mask),
        image_embeds=load_image_encoder(original, device="cpu", dtype=torch.float32)(pixels[:, :, 0]),
        reference_latents=latents[:, :, :1],
        pose_latents=torch.randn(1, 16, 2, 4, 2, generator=generator),
    )
    noise = torch.randn(latents.shape, generator=generator)
    velocity = transformer(noise, torch.tensor([500.0]), transformer.prepare(conditioning))
    decoded = vae.decode(noise)

    assert conditioning.context[mask == 1].std() > 0.1
    for name, tensor in {"latents": latents, "velocity": velocity, "decoded": decoded}.items():
        assert tensor.isfinite().all(), name
        assert 0.1 < tensor.std() < 5, name


def test_weights_arrive_as_they_are_in_the_files(original):
    found = {
        "transformer": load_transformer(original, device="cpu", dtype=torch.bfloat16),
        "vae": load_vae(original, device="cpu", dtype=torch.float32).model,
        "text_encoder": load_text_encoder(original, device="cpu", dtype=torch.bfloat16),
        "image_encoder": load_image_encoder(original, device="cpu", dtype=torch.bfloat16),
    }

    for component in fingerprint.COMPONENTS:
        network = found[component.folder]
        stored = load_file(original / component.folder / f"{component.weights}.safetensors")
        assert network.state_dict().keys() == stored.keys()
        assert all(torch.equal(network.state_dict()[key], stored[key]) for key in stored)
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_the_vae_is_float32_on_disk_and_the_rest_bfloat16(original):
    dtypes = {
        component.folder: {
            tensor.dtype
            for tensor in load_file(original / component.folder / f"{component.weights}.safetensors").values()
        }
        for component in fingerprint.COMPONENTS
    }

    assert dtypes.pop("vae") == {torch.float32}
    assert set().union(*dtypes.values()) == {torch.bfloat16}


def test_the_whole_transformer_takes_the_dtype_asked_for(original):
    assert {parameter.dtype for parameter in load(original).parameters()} == {torch.float32}


def test_position_ids_survive_the_meta_device(original):
    encoder = load_image_encoder(original, device="cpu", dtype=torch.float32)

    assert encoder.embeddings.position_ids.tolist() == [list(range(17))]


def test_the_tiny_tokenizer_works_here_and_in_transformers(original):
    ids, mask = load_tokenizer(original)("a dancer, 踊る")
    library = AutoTokenizer.from_pretrained(original / "tokenizer", local_files_only=True)

    assert ids.shape == (1, 512)
    assert ids[mask == 1].tolist() == library("a dancer, 踊る").input_ids
    assert 2 not in ids[mask == 1]  # <unk>
    assert library.decode(ids[mask == 1][:-1]) == "a dancer, 踊る"


def test_shards_under_an_index_are_read_as_one(checkpoint):
    folder, component = checkpoint / "transformer", fingerprint.TRANSFORMER
    state = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    sizes = {key: tensor.nbytes for key, tensor in state.items()}
    shards = plan_shards(component, sizes, max_bytes=30_000)
    for shard in shards:
        save_file({key: state[key] for key in shard.keys}, folder / shard.file_name)
    write_index(folder, component, shards, sum(sizes.values()))

    loaded = load_transformer(checkpoint, device="cpu", dtype=torch.bfloat16).state_dict()

    assert len(shards) > 2
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    shards_path = folder / shards[1].file_name
    shards_path.unlink()
    with pytest.raises(CheckpointError, match=f"{shards_path.name} is missing"):
        load(checkpoint)


def test_shards_are_bounded_unless_one_tensor_is_larger():
    shards = plan_shards(fingerprint.VAE, {"a": 4, "b": 4, "c": 20, "d": 4}, max_bytes=10)

    assert shards == [
        Shard("diffusion_pytorch_model-00001-of-00003.safetensors", ("a", "b")),
        Shard("diffusion_pytorch_model-00002-of-00003.safetensors", ("c",)),
        Shard("diffusion_pytorch_model-00003-of-00003.safetensors", ("d",)),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.ffn.0.bias": None}, r"of 73 tensors, 1 missing: blocks\.0\.ffn\.0\.bias\."),
        ({"blocks.7.ffn.0.bias": torch.zeros(3)}, r"1 not expected: blocks\.7\.ffn\.0\.bias\."),
        (
            {"head.linear.bias": torch.zeros(3)},
            r"1 of another shape: head\.linear\.bias is \[3\] and should be \[64\]\.",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_wrong_tensor_is_named(changes, message, checkpoint):
    edit_weights(checkpoint / WEIGHTS, **changes)

    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_many_wrong_tensors_are_counted_and_some_named(checkpoint):
    edit_weights(checkpoint / WEIGHTS, **{f"extra.{index}": torch.zeros(1) for index in range(9)})

    with pytest.raises(CheckpointError, match=r"9 not expected: extra\.0, .*extra\.4 and 4 more"):
        load(checkpoint)


def test_weights_of_another_size_than_the_config_are_refused(checkpoint):
    edit_json(checkpoint / "transformer/config.json", num_layers=3, ffn_size=128)

    with pytest.raises(CheckpointError, match=r"missing: blocks\.2\..*of another shape: blocks\.0\.ffn\.0\.bias"):
        load(checkpoint)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def fill(path: Path) -> None:
    path.write_bytes(b"not weights at all, but longer than a header's length")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (cut, "was not written to the end"),
        (lengthen, "bytes; its header says"),
        (fill, "is not a safetensors file"),
        (lambda path: path.write_bytes(b""), "is not a readable safetensors file"),
    ],
    ids=["missing", "cut", "longer", "something else", "empty"],
)
def test_damaged_weights_are_refused_by_the_loader_and_told_by_the_doctor(damage, message, checkpoint):
    damage(checkpoint / WEIGHTS)

    problems = check_folder(checkpoint)

    assert len(problems) == 1
    assert message in problems[0]
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"depth": 3}, "has fields that are not known here: depth"),
        ("transformer/config.json", {"num_heads": "4"}, "num_heads is '4'"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "is of 'WanPipeline'; expected 'ScailPipeline'"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(file, changes, message, checkpoint):
    edit_json(checkpoint / file, **changes)

    with pytest.raises(CheckpointError, match=message):
        read_model_config(checkpoint)
    assert message in check_folder(checkpoint)[0]


def test_a_field_that_is_missing_is_named(checkpoint):
    path = checkpoint / "vae/config.json"
    config = json.loads(path.read_text())
    del config["base_size"]
    path.write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"vae/config\.json lacks base_size"):
        read_model_config(checkpoint)


def test_the_doctor_tells_every_problem_on_its_own_line(checkpoint):
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").unlink()
    (checkpoint / "tokenizer/tokenizer.json").unlink()

    problems = check_folder(checkpoint)

    assert [problem.split("/")[-1] for problem in problems] == [
        "diffusion_pytorch_model.safetensors is missing.",
        "tokenizer.json is missing.",
    ]


def test_a_folder_that_does_not_exist_is_one_problem(tmp_path):
    assert check_folder(tmp_path / "nowhere") == [
        f"{tmp_path / 'nowhere'} is not a folder; expected a checkpoint that `scail convert` wrote."
    ]


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    edit_json(checkpoint / "text_encoder/config.json", vocab_size=100)

    with pytest.raises(CheckpointError, match="has 259 tokens, the text encoder knows 100"):
        load_tokenizer(checkpoint)


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    config = replace(SCAIL_TINY, text_encoder=replace(SCAIL_TINY.text_encoder, vocab_size=200))

    with pytest.raises(InvalidInputError, match="vocab_size is 200"):
        write_random_checkpoint(tmp_path / "small", config, seed=0)


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(original, checkpoint):
    os.utime(checkpoint / WEIGHTS, ns=(1, 1))  # as after a download
    (checkpoint / "README.md").write_text("a note")

    assert checkpoint_fingerprint(checkpoint) == checkpoint_fingerprint(original)


@pytest.mark.parametrize("file", [WEIGHTS, "transformer/config.json", "tokenizer/tokenizer.json", "model_index.json"])
def test_any_changed_byte_changes_the_fingerprint(file, original, checkpoint):
    content = bytearray((checkpoint / file).read_bytes())
    content[-3] ^= 1
    (checkpoint / file).write_bytes(content)

    assert checkpoint_fingerprint(checkpoint) != checkpoint_fingerprint(original)


def test_known_files_are_not_read_again(checkpoint, monkeypatch):
    expected = checkpoint_fingerprint(checkpoint)
    hashed = []
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", lambda *args: hashed.append(args))

    assert checkpoint_fingerprint(checkpoint) == expected
    assert hashed == []


def test_a_damaged_record_is_made_anew(original, checkpoint):
    (checkpoint / "files.json").write_text("{")

    assert checkpoint_fingerprint(checkpoint) == checkpoint_fingerprint(original)
    assert json.loads((checkpoint / "files.json").read_text())[WEIGHTS]["size"] == (checkpoint / WEIGHTS).stat().st_size


def test_a_fingerprint_needs_no_right_to_write(original, checkpoint, monkeypatch):
    os.utime(checkpoint / WEIGHTS, ns=(1, 1))

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(fingerprint, "_write_json", refuse)

    assert checkpoint_fingerprint(checkpoint) == checkpoint_fingerprint(original)


def test_planning_needs_no_torch(original):
    script = (
        "import sys; from pathlib import Path; from scail.fingerprint import checkpoint_fingerprint, check_folder;"
        f"folder = Path({str(original)!r}); checkpoint_fingerprint(folder); check_folder(folder);"
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
