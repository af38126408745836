"""Opening and writing a checkpoint folder: meta device, memory-mapped safetensors, strict, assigned.

What the folder holds is in `scail.fingerprint`, which needs no torch; how it is made of the original files is in
`scail.conversion`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from scail.config import ModelConfig
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import (
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    Component,
    component_headers,
    read_model_config,
    record_hashes,
    some,
    write_model_config,
)
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import PromptTokenizer, TextEncoder
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae

MAX_SHARD_BYTES = 1024**3

Network = TypeVar("Network", bound=nn.Module)


def load_transformer(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> ScailTransformer:
    """The diffusion transformer, all of it in `dtype`, norms and tables included, as the official code casts it.

    Raises:
        CheckpointError: As do the other loaders, if a file or a tensor is missing, extra, misshapen or damaged.
    """
    config = read_model_config(checkpoint_dir).transformer
    transformer = on_meta(lambda: ScailTransformer(config))
    return load_weights(transformer, checkpoint_dir, TRANSFORMER, device=device, dtype=dtype)


def load_vae(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> VideoVae:
    config = read_model_config(checkpoint_dir).vae
    vae = on_meta(lambda: VideoVae.from_config(config))
    load_weights(vae.model, checkpoint_dir, VAE, device=device, dtype=dtype)
    return vae


def load_text_encoder(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    config = read_model_config(checkpoint_dir).text_encoder
    text_encoder = on_meta(lambda: TextEncoder.from_config(config))
    return load_weights(text_encoder, checkpoint_dir, TEXT_ENCODER, device=device, dtype=dtype)


def load_image_encoder(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> ImageEncoder:
    config = read_model_config(checkpoint_dir).image_encoder
    image_encoder = on_meta(lambda: ImageEncoder.from_config(config))
    return load_weights(image_encoder, checkpoint_dir, IMAGE_ENCODER, device=device, dtype=dtype)


def load_tokenizer(checkpoint_dir: Path) -> PromptTokenizer:
    config = read_model_config(checkpoint_dir).text_encoder
    tokenizer = PromptTokenizer(checkpoint_dir / TOKENIZER, config.max_length)
    if tokenizer.num_tokens > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint_dir / TOKENIZER} has {tokenizer.num_tokens} tokens, the text encoder knows "
            f"{config.vocab_size}: they are not of one model."
        )
    return tokenizer


def on_meta(build: Callable[[], Network]) -> Network:
    """Build a network without memory for its weights, frozen and in evaluation mode."""
    with torch.device("meta"):
        return build().eval().requires_grad_(False)


def load_weights(
    module: Network, checkpoint_dir: Path, component: Component, *, device: torch.device | str, dtype: torch.dtype
) -> Network:
    """Give `module`, which was built on the meta device, the weights of one component.

    Keys and shapes are compared by the files' headers first, so that the wrong files cost no time. On the CPU and in
    the dtype of the files the weights stay memory-mapped.

    Returns:
        `module`, on `device`.

    Raises:
        CheckpointError: If a file or a tensor is missing, extra, misshapen or damaged.
    """
    files = component_headers(checkpoint_dir, component)
    found = {key: entry.shape for header in files.values() for key, entry in header.items()}
    compare_shapes(found, shapes_of(module), where=str(checkpoint_dir / component.folder))
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                state |= {key: file.get_tensor(key).to(device=device, dtype=dtype) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Refuse tensors that are missing, extra or misshapen.

    Raises:
        CheckpointError: With the first few names of each kind and their number.
    """
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    misshapen = [
        f"{key} is {list(found[key])} and should be {list(expected[key])}"
        for key in expected.keys() & found.keys()
        if found[key] != expected[key]
    ]
    problems = [
        f"{len(names)} {kind}: {some(names)}"
        for kind, names in (("missing", missing), ("not expected", extra), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: of {len(expected)} tensors, {'; '.join(problems)}.")


@dataclass(frozen=True)
class Shard:
    """One file of weights to be written: its name and the tensors in it."""

    file_name: str
    keys: tuple[str, ...]


def plan_shards(component: Component, sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Spread tensors over files of at most `max_bytes` each, or of one tensor where it alone is larger.

    Args:
        component: Whose weights they are; decides the files' names.
        sizes: Bytes by tensor.
        max_bytes: Bound of one file.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    if len(groups) == 1:
        return [Shard(f"{component.weights}.safetensors", tuple(groups[0]))]
    return [
        Shard(f"{component.weights}-{number:05}-of-{len(groups):05}.safetensors", tuple(keys))
        for number, keys in enumerate(groups, start=1)
    ]


def write_index(folder: Path, component: Component, shards: Iterable[Shard], total_bytes: int) -> None:
    """The index of weights in more than one file."""
    weight_map = {key: shard.file_name for shard in shards for key in shard.keys}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    path = folder / f"{component.weights}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_random_checkpoint(checkpoint_dir: Path, config: ModelConfig, *, seed: int) -> None:
    """Write a checkpoint of random weights, the same for the same seed: it renders varied noise.

    Raises:
        InvalidInputError: If the folder is not empty, or the vocabulary is too small for a byte-level tokenizer.
    """
    if checkpoint_dir.exists() and any(checkpoint_dir.iterdir()):
        raise InvalidInputError(f"{checkpoint_dir} is not empty; expected a new or an empty folder.")
    networks: list[tuple[Component, nn.Module, torch.dtype]] = [
        (TRANSFORMER, on_meta(lambda: ScailTransformer(config.transformer)), torch.bfloat16),
        (VAE, on_meta(lambda: VideoVae.from_config(config.vae)).model, torch.float32),
        (TEXT_ENCODER, on_meta(lambda: TextEncoder.from_config(config.text_encoder)), torch.bfloat16),
        (IMAGE_ENCODER, on_meta(lambda: ImageEncoder.from_config(config.image_encoder)), torch.bfloat16),
    ]
    write_model_config(checkpoint_dir, config, notice="The weights are random: the pictures are noise.")
    _write_byte_tokenizer(checkpoint_dir / TOKENIZER, config.text_encoder.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    for component, network, dtype in networks:
        state = {
            key: _random_tensor(key, shape, generator).to(dtype) for key, shape in sorted(shapes_of(network).items())
        }
        path = checkpoint_dir / component.folder / f"{component.weights}.safetensors"
        save_file(state, path, metadata={"format": "pt"})
    record_hashes(checkpoint_dir)


def _random_tensor(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what passes through them; norms near one, biases near zero."""
    noise = torch.randn(shape, generator=generator)
    if key.endswith("modulation"):
        return noise * 0.5  # gates too: large enough that every block tells in the output
    if key.endswith("bias"):
        return noise * 0.02
    if max(shape) == noise.numel():
        return 1 + noise * 0.02
    return noise * (shape[0] / noise.numel()) ** 0.5


def _write_byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of one token a byte, with umt5's special tokens."""
    symbols = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if len(symbols) > vocab_size:
        raise InvalidInputError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs {len(symbols)}.")
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(symbols[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
