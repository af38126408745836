"""Writing a component's weights, changed on the way; and from there, a checkpoint folder of ours made into another.

What a folder holds is in `scail.fingerprint`. A file is written at a time, and nothing is held beyond it.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scail.checkpoint import MAX_SHARD_BYTES, Shard, compare_shapes, on_meta, plan_shards, shapes_of, write_index
from scail.config import LoraFile, Quantization
from scail.errors import InvalidInputError
from scail.fingerprint import (
    COMPONENTS,
    SCHEDULER,
    TOKENIZER,
    TRANSFORMER,
    Component,
    component_headers,
    read_loras,
    read_model_config,
    read_notice,
    read_quantization,
    record_hashes,
    write_model_config,
)
from scail.models.transformer import ScailTransformer
from scail.sources import SafetensorsSource
from scail.weights import WeightChanges, refuse_changes_of_quantized

Progress = Callable[[str, int, int], None]  # component, its bytes written so far, its bytes in all
Reader = Callable[[], AbstractContextManager[Callable[[str], Tensor]]]


def write_component(
    component: Component,
    dest: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    open_source: Reader,
    dtype: torch.dtype,
    changes: WeightChanges,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
) -> None:
    """Write the files of one component.

    Args:
        component: Whose weights they are.
        dest: The checkpoint folder.
        shapes: Of the tensors before they are changed.
        open_source: Gives a function that reads one of them; opened anew for every file, since a mapped file's pages
            stay while it is open.
        dtype: Of what is not quantised.
        changes: Applied to every tensor.
        max_shard_bytes: Bound of a file.
        on_progress: Called after every file.
    """
    folder = dest / component.folder
    written = {key: changes.sizes(key, shape, dtype) for key, shape in shapes.items()}
    sizes = {key: sum(parts.values()) for key, parts in written.items()}
    shards = plan_shards(component, sizes, max_shard_bytes)
    num_bytes = 0
    for shard in shards:
        with open_source() as read:
            tensors: dict[str, Tensor] = {}
            for key in shard.keys:
                tensors |= changes.apply(key, read(key).to(dtype).contiguous())
            save_file(tensors, folder / shard.file_name, metadata={"format": "pt"})
        num_bytes += sum(sizes[key] for key in shard.keys)
        if on_progress is not None:
            on_progress(component.folder, num_bytes, sum(sizes.values()))
    if len(shards) > 1:
        named = [Shard(shard.file_name, tuple(name for key in shard.keys for name in written[key])) for shard in shards]
        write_index(folder, component, named, num_bytes)


def rewrite(
    source: Path,
    dest: Path,
    *,
    quantization: Quantization = "none",
    loras: Sequence[LoraFile] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
) -> None:
    """Make another checkpoint of one of ours: with LoRAs fused into it, quantised, or both.

    `dest` appears, complete, at the end.

    Raises:
        InvalidInputError: If `dest` is in use, nothing is to be changed, or the source is quantised already.
        CheckpointError: If the source or a LoRA is incomplete, damaged or of another model.
    """
    dest = free_folder(dest)
    config, stored = read_model_config(source), read_quantization(source)
    if quantization == "none" and not loras:
        raise InvalidInputError(f"{source} is converted already; --quantize or --lora make another checkpoint of it.")
    refuse_changes_of_quantized(loras, stored, quantization)
    if stored != "none":
        raise InvalidInputError(f"{source} is quantised ({stored}) already.")
    files = component_headers(source, TRANSFORMER)
    headers = {key: header for found in files.values() for key, header in found.items()}
    shapes = {key: header.shape for key, header in headers.items()}
    expected = shapes_of(on_meta(lambda: ScailTransformer(config.transformer)))
    compare_shapes(shapes, expected, where=str(source / TRANSFORMER.folder))
    changes = WeightChanges.of(loras, quantization, config=config.transformer, shapes=shapes)
    partial_dest = partial_folder(dest)
    try:
        write_model_config(
            partial_dest,
            config,
            notice=read_notice(source),
            quantization=quantization,
            loras=(*read_loras(source), *(lora.name for lora in loras)),
        )
        write_component(
            TRANSFORMER,
            partial_dest,
            shapes=shapes,
            open_source=SafetensorsSource(source / TRANSFORMER.folder, files).open,
            dtype=torch.bfloat16,
            changes=changes,
            max_shard_bytes=max_shard_bytes,
            on_progress=on_progress,
        )
        for name in (TOKENIZER, SCHEDULER, *(other.folder for other in COMPONENTS if other is not TRANSFORMER)):
            if (source / name).is_dir():
                shutil.copytree(source / name, partial_dest / name, dirs_exist_ok=True)
        record_hashes(partial_dest)
        partial_dest.replace(dest)
    finally:
        shutil.rmtree(partial_dest, ignore_errors=True)


def free_folder(dest: Path) -> Path:
    """`dest`, absolute, if nothing is there.

    Raises:
        InvalidInputError: If it is in use.
    """
    dest = dest.absolute()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InvalidInputError(f"{dest} is in use; expected a new or an empty folder.")
    return dest


def partial_folder(dest: Path) -> Path:
    """Where a folder is written until it is complete."""
    return dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.partial")
