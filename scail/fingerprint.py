"""A checkpoint folder seen without torch: its configuration, its files, their hashes and what is wrong with them.

    model_index.json   name and components
    transformer/       config.json, diffusion_pytorch_model*.safetensors
    vae/               config.json, diffusion_pytorch_model*.safetensors (float32)
    text_encoder/      config.json, model*.safetensors
    image_encoder/     config.json, model*.safetensors
    tokenizer/         tokenizer.json
    scheduler/         for tools that know diffusers' convention; nothing here reads it
    files.json         size, time and SHA-256 of every file above, so that planning need not read 44 GB

A `config.json` holds the fields of the component's dataclass in `scail.config`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from scail.config import ImageEncoderConfig, ModelConfig, Quantization, TextEncoderConfig, TransformerConfig, VaeConfig
from scail.errors import CheckpointError

MODEL_INDEX = "model_index.json"
HASHES = "files.json"
TOKENIZER = "tokenizer"
SCHEDULER = "scheduler"
PIPELINE_CLASS = "ScailPipeline"

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

ComponentConfig = TransformerConfig | VaeConfig | TextEncoderConfig | ImageEncoderConfig
Config = TypeVar("Config", TransformerConfig, VaeConfig, TextEncoderConfig, ImageEncoderConfig)


@dataclass(frozen=True)
class Component:
    """A folder with weights."""

    folder: str
    weights: str  # the weights' file name without `.safetensors`, as diffusers and transformers have it
    class_name: str


TRANSFORMER = Component("transformer", "diffusion_pytorch_model", "ScailTransformer")
VAE = Component("vae", "diffusion_pytorch_model", "AutoencoderKLWan")
TEXT_ENCODER = Component("text_encoder", "model", "UMT5EncoderModel")
IMAGE_ENCODER = Component("image_encoder", "model", "CLIPVisionModel")
COMPONENTS = (TRANSFORMER, VAE, TEXT_ENCODER, IMAGE_ENCODER)
LOADING_ORDER = (VAE, IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER)  # small ones first: they load while large ones arrive


@dataclass(frozen=True)
class TensorHeader:
    """What a file says about a tensor before any of its numbers is read."""

    dtype: str  # as safetensors writes it: BF16, F32, …
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0  # of its first byte in the file


def read_model_config(checkpoint_dir: Path) -> ModelConfig:
    """The sizes of a checkpoint's model.

    Raises:
        CheckpointError: If the folder, a `config.json` or a field of one is missing, unknown or of a wrong type.
    """
    if not checkpoint_dir.is_dir():
        raise CheckpointError(f"{checkpoint_dir} is not a folder; expected a checkpoint that `scail convert` wrote.")
    index = _read_json(checkpoint_dir / MODEL_INDEX)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise CheckpointError(
            f"{checkpoint_dir / MODEL_INDEX} is of {index.get('_class_name')!r}; expected {PIPELINE_CLASS!r}."
        )
    return ModelConfig(
        name=str(index.get("name", "")),
        transformer=_read_config(checkpoint_dir / TRANSFORMER.folder, TransformerConfig),
        vae=_read_config(checkpoint_dir / VAE.folder, VaeConfig),
        text_encoder=_read_config(checkpoint_dir / TEXT_ENCODER.folder, TextEncoderConfig),
        image_encoder=_read_config(checkpoint_dir / IMAGE_ENCODER.folder, ImageEncoderConfig),
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of ours, whole or not."""
    try:
        return _read_json(folder / MODEL_INDEX).get("_class_name") == PIPELINE_CLASS
    except CheckpointError:
        return False


def read_notice(checkpoint_dir: Path) -> str:
    """What a viewer of the clips must know about the weights, such as that they are random; else empty."""
    return str(_read_json(checkpoint_dir / MODEL_INDEX).get("notice", ""))


def read_quantization(checkpoint_dir: Path) -> Quantization:
    """How the transformer's weights are stored: `none` means in full.

    Raises:
        CheckpointError: If the folder says something that is not known here.
    """
    found = _read_json(checkpoint_dir / MODEL_INDEX).get("quantization", "none")
    if found not in get_args(Quantization):
        raise CheckpointError(
            f"{checkpoint_dir / MODEL_INDEX} is quantised as {found!r}; known are {', '.join(get_args(Quantization))}."
        )
    return cast(Quantization, found)


def read_loras(checkpoint_dir: Path) -> tuple[str, ...]:
    """The LoRAs that were fused into the weights when the folder was written, each as name and strength."""
    return tuple(map(str, _read_json(checkpoint_dir / MODEL_INDEX).get("loras", ())))


def write_model_config(
    checkpoint_dir: Path,
    config: ModelConfig,
    *,
    notice: str = "",
    quantization: Quantization = "none",
    loras: Sequence[str] = (),
) -> None:
    """Write `model_index.json`, every `config.json` and the scheduler's.

    Args:
        checkpoint_dir: Where; made if it is not there.
        config: Sizes of the model.
        notice: For whoever sees the clips.
        quantization: Of the transformer's weights.
        loras: That are fused into them.
    """
    by_component: tuple[ComponentConfig, ...] = (
        config.transformer,
        config.vae,
        config.text_encoder,
        config.image_encoder,
    )
    for component, component_config in zip(COMPONENTS, by_component, strict=True):
        folder = checkpoint_dir / component.folder
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", {"_class_name": component.class_name, **asdict(component_config)})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}
    (checkpoint_dir / SCHEDULER).mkdir(exist_ok=True)
    _write_json(checkpoint_dir / SCHEDULER / "scheduler_config.json", scheduler)
    components = {component.folder: component.class_name for component in COMPONENTS}
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS, "name": config.name, **components}
    index |= {"notice": notice} if notice else {}
    index |= {"quantization": quantization} if quantization != "none" else {}
    index |= {"loras": list(loras)} if loras else {}
    _write_json(checkpoint_dir / MODEL_INDEX, index)


def checkpoint_fingerprint(checkpoint_dir: Path) -> str:
    """Hash over the hashes of a checkpoint's files: equal for equal weights, wherever the folder is.

    A file whose size and time are those in `files.json` is not read again. Others are, and the record is renewed
    where the folder can be written.

    Raises:
        CheckpointError: If the folder is not a checkpoint.
    """
    return fingerprint_of(record_hashes(checkpoint_dir))


def fingerprint_of(hashes: Mapping[str, Mapping[str, Any]]) -> str:
    """The fingerprint of a folder whose `files.json` says this."""
    lines = "".join(f"{entry['sha256']}  {path}\n" for path, entry in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def record_hashes(checkpoint_dir: Path) -> dict[str, dict[str, Any]]:
    """Hash what `files.json` does not know, renew it and return it: size, time and SHA-256 by relative path."""
    if not (checkpoint_dir / MODEL_INDEX).is_file():
        raise CheckpointError(
            f"{checkpoint_dir} has no {MODEL_INDEX}; expected a checkpoint that `scail convert` wrote."
        )
    known = _known_hashes(checkpoint_dir)
    hashes = {}
    for path in _files(checkpoint_dir):
        name, stat = path.relative_to(checkpoint_dir).as_posix(), path.stat()
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        recorded = known.get(name, {})
        if {key: recorded.get(key) for key in entry} != entry or "sha256" not in recorded:
            with path.open("rb") as file:
                recorded = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        hashes[name] = entry | {"sha256": recorded["sha256"]}
    if hashes != known:
        with contextlib.suppress(OSError):  # a read-only volume: the hashes hold all the same
            partial = checkpoint_dir / f".{HASHES}.partial"
            _write_json(partial, hashes)
            partial.replace(checkpoint_dir / HASHES)
    return hashes


def check_folder(checkpoint_dir: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line a problem, without reading its weights.

    Every file's header is read, and the sizes in `config.json` are held against telling tensors. Each single tensor
    is checked when the component is loaded.
    """
    try:
        config = read_model_config(checkpoint_dir)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for component in COMPONENTS:
        try:
            files = component_headers(checkpoint_dir, component)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        found = {key: entry.shape for header in files.values() for key, entry in header.items()}
        problems += [
            f"{checkpoint_dir / component.folder}: {key} is {found.get(key, 'missing')}; by config.json it is {shape}."
            for key, shape in _telling_shapes(config, component).items()
            if found.get(key) != shape
        ]
    if not (checkpoint_dir / TOKENIZER / "tokenizer.json").is_file():
        problems.append(f"{checkpoint_dir / TOKENIZER / 'tokenizer.json'} is missing.")
    return problems


def _telling_shapes(config: ModelConfig, component: Component) -> dict[str, tuple[int, ...] | None]:
    """Shapes that together tell a component's size; None for a block that must not be there."""
    dit, vae, text, image = config.transformer, config.vae, config.text_encoder, config.image_encoder
    patch = (1, dit.patch_size, dit.patch_size)
    num_blocks = image.num_layers - 1  # the last one is not used
    shapes: dict[Component, dict[str, tuple[int, ...] | None]] = {
        TRANSFORMER: {
            "patch_embedding.weight": (dit.hidden_size, dit.latent_channels + dit.mask_channels, *patch),
            "text_embedding.0.weight": (dit.hidden_size, dit.text_size),
            "image_embedding.3.weight": (dit.hidden_size, dit.image_size),
            f"blocks.{dit.num_layers - 1}.ffn.0.weight": (dit.ffn_size, dit.hidden_size),
            f"blocks.{dit.num_layers}.ffn.0.weight": None,
        },
        VAE: {
            "decoder.norm_out.gamma": (vae.base_size, 1, 1, 1),
            "quant_conv.weight": (2 * vae.latent_channels, 2 * vae.latent_channels, 1, 1, 1),
        },
        TEXT_ENCODER: {
            "encoder.embed_tokens.weight": (text.vocab_size, text.hidden_size),
            f"encoder.block.{text.num_layers - 1}.layer.1.DenseReluDense.wo.weight": (text.hidden_size, text.ffn_size),
            f"encoder.block.{text.num_layers}.layer.1.DenseReluDense.wo.weight": None,
        },
        IMAGE_ENCODER: {
            "embeddings.patch_embedding.weight": (image.hidden_size, 3, image.patch_size, image.patch_size),
            f"encoder.layers.{num_blocks - 1}.mlp.fc1.weight": (image.ffn_size, image.hidden_size),
            f"encoder.layers.{num_blocks}.mlp.fc1.weight": None,
        },
    }
    return shapes[component]


def component_headers(checkpoint_dir: Path, component: Component) -> dict[Path, dict[str, TensorHeader]]:
    """The tensors of a component by file; sharded ones as their index names them.

    Raises:
        CheckpointError: If a file is missing or damaged, or the index does not agree with the files.
    """
    folder = checkpoint_dir / component.folder
    index_path = folder / f"{component.weights}.safetensors.index.json"
    if not index_path.is_file():
        path = folder / f"{component.weights}.safetensors"
        return {path: safetensors_header(path)}
    return sharded_headers(index_path)


def sharded_headers(index_path: Path) -> dict[Path, dict[str, TensorHeader]]:
    """The tensors of every file that an index names.

    Raises:
        CheckpointError: If a file is missing or damaged, or the index does not agree with the files.
    """
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
        raise CheckpointError(f"{index_path} has no `weight_map` from tensors to files beside it.")
    headers = {
        index_path.parent / name: safetensors_header(index_path.parent / name)
        for name in sorted(set(weight_map.values()))
    }
    found = {(key, path.name) for path, header in headers.items() for key in header}
    if differing := sorted(found ^ set(weight_map.items())):
        raise CheckpointError(f"{index_path} does not agree with its files: {some(key for key, _ in differing)}.")
    return headers


def safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file.

    Raises:
        CheckpointError: If the file is missing, is no safetensors file or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > min(size, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is not a safetensors file, or it is cut off.")
            entries = json.loads(file.read(header_size))
        entries.pop("__metadata__", None)
        spans = {key: entry["data_offsets"] for key, entry in entries.items()}
        header = {
            key: TensorHeader(
                entry["dtype"], tuple(entry["shape"]), spans[key][1] - spans[key][0], 8 + header_size + spans[key][0]
            )
            for key, entry in entries.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error
    expected = 8 + header_size + max((end for _, end in spans.values()), default=0)
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes; its header says {expected}. It was not written to the end.")
    return header


def some(names: Any, limit: int = 5) -> str:
    """The first few of many names and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_config(folder: Path, config_type: type[Config]) -> Config:
    path = folder / "config.json"
    values = {key: value for key, value in _read_json(path).items() if not key.startswith("_")}
    defaults = asdict(config_type())
    if unknown := values.keys() - defaults.keys():
        raise CheckpointError(f"{path} has fields that are not known here: {some(unknown)}.")
    if missing := defaults.keys() - values.keys():
        raise CheckpointError(f"{path} lacks {some(missing)}.")
    for name, default in defaults.items():
        if isinstance(default, tuple) and isinstance(values[name], list):
            values[name] = tuple(values[name])
        allowed = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(values[name], allowed):
            raise CheckpointError(f"{path}: {name} is {values[name]!r}; expected a value such as {default!r}.")
    return config_type(**values)


def _known_hashes(checkpoint_dir: Path) -> dict[str, dict[str, Any]]:
    try:
        known = _read_json(checkpoint_dir / HASHES)
    except CheckpointError:
        return {}
    return {name: entry for name, entry in known.items() if isinstance(entry, dict)}


def _files(checkpoint_dir: Path) -> list[Path]:
    """Every file that belongs to the model; notes and licences that lie beside do not."""
    folders = (*(component.folder for component in COMPONENTS), TOKENIZER, SCHEDULER)
    inside = (path for name in folders for path in (checkpoint_dir / name).rglob("*"))
    return [checkpoint_dir / MODEL_INDEX, *sorted(path for path in inside if path.is_file())]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected an object.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
