"""Opening and writing a checkpoint folder: meta device, memory-mapped safetensors, strict, assigned.

What the folder holds is in `scail.fingerprint`, which needs no torch; how it is made of the original files is in
`scail.conversion`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from scail.config import EXACT, LoraFile, ModelConfig, Quantization, RuntimeConfig
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import (
    IMAGE_ENCODER,
    LOADING_ORDER,
    MODEL_INDEX,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    Component,
    TensorHeader,
    component_headers,
    read_model_config,
    read_quantization,
    record_hashes,
    some,
    write_model_config,
)
from scail.loading import DTYPES, fill
from scail.memory import Placement, place_bare
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import PromptTokenizer, TextEncoder
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.quantization import WEIGHT_DTYPES, quantize_blocks
from scail.weights import WeightChanges, refuse_changes_of_quantized

MAX_SHARD_BYTES = 1024**3

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Networks:
    """A model's four networks, and who put their weights where they are."""

    transformer: ScailTransformer
    vae: VideoVae
    text_encoder: TextEncoder
    image_encoder: ImageEncoder
    placement: Placement
    quantization: Quantization


def load_networks(
    checkpoint_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    runtime: RuntimeConfig = EXACT,
    wait_for: Callable[[str], None] | None = None,
) -> Networks:
    """All four networks, each weight where `runtime.memory` has it, LoRAs fused and layers quantised on the way.

    Args:
        checkpoint_dir: The folder.
        device: Where every stage computes.
        dtype: Of weights and activations.
        runtime: How the model is run.
        wait_for: Called with a component's folder before the weights in it are looked at.

    Raises:
        CheckpointError: If a file or a tensor is missing, extra, misshapen or damaged, or a LoRA does not fit.
        InvalidInputError: If the checkpoint is quantised and another arithmetic, or a LoRA, is asked for.
    """
    bare = _Bare.of(checkpoint_dir, dtype, runtime.quantization, runtime.loras)
    others = (bare_vae(checkpoint_dir, dtype), bare_text_encoder(checkpoint_dir, dtype))
    vae, text_encoder, image_encoder = *others, bare_image_encoder(checkpoint_dir, dtype)
    modules: dict[Component, nn.Module] = {
        VAE: vae.model,
        IMAGE_ENCODER: image_encoder,
        TEXT_ENCODER: text_encoder,
        TRANSFORMER: bare.transformer,
    }

    def read() -> None:
        for component in LOADING_ORDER:
            if wait_for:
                wait_for(component.folder)
            own = bare if component == TRANSFORMER else None
            load_weights(modules[component], checkpoint_dir, component, device=device, bare=own)

    if device.type == "cpu":
        read()  # mapped, and copied only if they are to wait
    placement = Placement(
        bare.transformer,
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        device=device,
        policy=runtime.memory,
    )
    if device.type != "cpu":
        read()
    placement.pin()
    return Networks(bare.transformer, vae, text_encoder, image_encoder, placement, bare.quantization)


def load_transformer(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> ScailTransformer:
    """The diffusion transformer, all of it in `dtype`, norms and tables included, as the official code casts it.

    Raises:
        CheckpointError: As do the other loaders, if a file or a tensor is missing, extra, misshapen or damaged.
    """
    bare = _Bare.of(checkpoint_dir, dtype, "none", ())
    transformer = load_weights(bare.transformer, checkpoint_dir, TRANSFORMER, device=torch.device(device), bare=bare)
    return transformer.to(device)


def load_vae(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> VideoVae:
    vae = bare_vae(checkpoint_dir, dtype)
    load_weights(vae.model, checkpoint_dir, VAE, device=torch.device(device))
    return vae.to(device)


def load_text_encoder(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    encoder = bare_text_encoder(checkpoint_dir, dtype)
    load_weights(encoder, checkpoint_dir, TEXT_ENCODER, device=torch.device(device))
    return encoder.to(device)  # with what no file holds


def load_image_encoder(checkpoint_dir: Path, *, device: torch.device | str, dtype: torch.dtype) -> ImageEncoder:
    encoder = bare_image_encoder(checkpoint_dir, dtype)
    load_weights(encoder, checkpoint_dir, IMAGE_ENCODER, device=torch.device(device))
    return encoder.to(device)  # with what no file holds


@dataclass(frozen=True)
class _Bare:
    """A transformer without memory for its weights, and how those of a folder become its own.

    Attributes:
        transformer: On the meta device, quantised if it is to be.
        file_shapes: What the folder's files have to hold.
        changes: On the way from the files.
        quantization: Of the result.
    """

    transformer: ScailTransformer
    file_shapes: dict[str, tuple[int, ...]]
    changes: WeightChanges
    quantization: Quantization

    @classmethod
    def of(
        cls, checkpoint_dir: Path, dtype: torch.dtype, quantization: Quantization, loras: Sequence[LoraFile]
    ) -> _Bare:
        config, stored = read_model_config(checkpoint_dir).transformer, read_quantization(checkpoint_dir)
        refuse_changes_of_quantized(loras, stored, quantization)
        transformer = on_meta(lambda: ScailTransformer(config)).to(dtype)
        shapes = shapes_of(transformer)
        changes = WeightChanges()
        if stored == "none":
            changes = WeightChanges.of(loras, quantization, config=config, shapes=shapes)
        result = quantization if stored == "none" else stored
        if result != "none":
            quantize_blocks(transformer, result)
        return cls(transformer, shapes if stored == "none" else shapes_of(transformer), changes, result)


def bare_vae(checkpoint_dir: Path, dtype: torch.dtype) -> VideoVae:
    config = read_model_config(checkpoint_dir).vae
    return on_meta(lambda: VideoVae.from_config(config)).to(dtype)


def bare_text_encoder(checkpoint_dir: Path, dtype: torch.dtype) -> TextEncoder:
    config = read_model_config(checkpoint_dir).text_encoder
    return on_meta(lambda: TextEncoder.from_config(config)).to(dtype)


def bare_image_encoder(checkpoint_dir: Path, dtype: torch.dtype) -> ImageEncoder:
    config = read_model_config(checkpoint_dir).image_encoder
    return on_meta(lambda: ImageEncoder.from_config(config)).to(dtype)


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
    module: Network, checkpoint_dir: Path, component: Component, *, device: torch.device, bare: _Bare | None = None
) -> Network:
    """Give `module`, whose tensors tell the dtypes, the weights of one component.

    Keys and shapes are compared by the files' headers first, so that the wrong files cost no time. On the CPU and in
    the dtype of the files the weights stay memory-mapped. Tensors that have a place already are filled there.

    Returns:
        `module`, on `device`.

    Raises:
        CheckpointError: If a file or a tensor is missing, extra, misshapen or damaged.
    """
    files = component_headers(checkpoint_dir, component)
    where = str(checkpoint_dir / component.folder)
    changes = bare.changes if bare else WeightChanges()
    found = {key: entry for header in files.values() for key, entry in header.items()}
    expected = bare.file_shapes if bare else shapes_of(module)
    compare_shapes({key: entry.shape for key, entry in found.items()}, expected, where=where)
    targets = module.state_dict()
    _refuse_other_rounding(found, targets, changes, where=where)
    if device.type == "cpu":
        module.load_state_dict(dict(_mapped_tensors(files, targets, changes)), strict=True, assign=True)
        return module
    place_bare(module, device)
    fill(module.state_dict(), files, device=device, changes=changes)
    return module


def _mapped_tensors(
    files: Iterable[Path], targets: Mapping[str, Tensor], changes: WeightChanges
) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    for name, tensor in changes.apply(key, file.get_tensor(key)).items():
                        yield name, tensor.to(targets[name].dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def _refuse_other_rounding(
    found: Mapping[str, TensorHeader], targets: Mapping[str, Tensor], changes: WeightChanges, *, where: str
) -> None:
    """A weight of one byte a number means nothing without the scale it was rounded with."""
    for key, header in found.items():
        wanted = targets[key].dtype
        if not changes.touch(key) and wanted in WEIGHT_DTYPES.values() and DTYPES.get(header.dtype) != wanted:
            raise CheckpointError(f"{where}: {key} is {header.dtype}; by {MODEL_INDEX} it should be {wanted}.")


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
    write_byte_tokenizer(checkpoint_dir / TOKENIZER, config.text_encoder.vocab_size)
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


def write_byte_tokenizer(folder: Path, vocab_size: int) -> None:
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
