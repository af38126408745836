"""LoRA files, fused into the transformer's weights: W + strength · (alpha / rank) · up · down.

A file names layers as Wan does, under one of several prefixes, or as diffusers does; each layer has a pair of low rank
(`lora_down` and `lora_up`, or `lora_A` and `lora_B`, with `alpha` or without), a whole difference (`diff`), or a
difference of its bias (`diff_b`). Where our layer is several of Wan's joined (query, key and value), the difference is
added to its part. A difference for the patch embedding of Wan's image-to-video models, which have 36 input channels,
has no place in SCAIL's 20: it is left out, and said so. Anything else without a place is an error.

Source: the LightX2V distillation files, Wan2GP's and LightX2V's loaders; the names in `scail.layouts`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scail.config import TransformerConfig
from scail.errors import CheckpointError
from scail.fingerprint import safetensors_header, some
from scail.layouts import WAN_TRANSFORMER

logger = logging.getLogger(__name__)

_PREFIXES = (
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
)
_ROLES = {
    "lora_down": "down",
    "lora_A": "down",
    "lora_up": "up",
    "lora_B": "up",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
}
_SUFFIX = re.compile(r"\.(lora_down|lora_up|lora_A|lora_B|alpha|diff|diff_b)(\.default)?(\.weight)?$")
_OPTIONAL = "patch_embedding"  # of another number of input channels, it is left out

# diffusers' names and Wan's, longest first.
_DIFFUSERS_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "proj_out": "head.head",
}


@dataclass(frozen=True)
class Place:
    """Where a tensor of Wan's is in one of ours: the `index`-th of `count` equal parts along the first axis."""

    key: str
    index: int
    count: int


@dataclass
class Delta:
    """What a file has for one layer of Wan's: keys of the file by their role."""

    place: Place
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """A LoRA file, matched to a transformer's tensors.

    Attributes:
        path: The file.
        strength: Factor of all of it.
        deltas: By the tensor of ours that they change.
        left_out: Keys of the file that have no place here, and may not have.
    """

    path: Path
    strength: float
    deltas: Mapping[str, tuple[Delta, ...]]
    left_out: tuple[str, ...]

    @classmethod
    def open(
        cls, path: Path, strength: float, config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> Lora:
        """Match a file's keys and shapes, without reading its numbers.

        Args:
            path: A safetensors file.
            strength: Factor of all of it; 1 as trained.
            config: Of the transformer.
            shapes: Of its tensors.

        Raises:
            CheckpointError: If the file is unreadable, or has a tensor that belongs to no layer, has no partner or does
                not fit.
        """
        headers = safetensors_header(path)
        places = places_of_wan_names(config.num_layers)
        found: dict[str, Delta] = {}
        unknown = []
        for key in headers:
            match = _SUFFIX.search(key)
            name = match and _wan_name(key[: match.start()], places)
            if match is None or name is None:
                unknown.append(key)
                continue
            parameter = name if name in places else f"{name}.{'bias' if match[1] == 'diff_b' else 'weight'}"
            if parameter not in places:
                unknown.append(key)
                continue
            found.setdefault(parameter, Delta(places[parameter])).keys[_ROLES[match[1]]] = key
        if unknown:
            raise CheckpointError(f"{path}: {len(unknown)} tensors belong to no layer of SCAIL: {some(unknown)}.")
        if not found:
            raise CheckpointError(f"{path} holds no tensors; expected a LoRA.")
        header_shapes = {key: header.shape for key, header in headers.items()}
        kept, left_out = _fitting(path, found, header_shapes, shapes)
        if left_out:
            logger.warning("%s: of another number of input channels, left out: %s", path, some(left_out))
        deltas: dict[str, tuple[Delta, ...]] = {}
        for delta in kept:
            deltas[delta.place.key] = (*deltas.get(delta.place.key, ()), delta)
        return cls(path, strength, deltas, tuple(left_out))

    def fuse(self, key: str, weight: Tensor) -> Tensor:
        """`weight` with what the file adds to it; summed in float32, rounded once.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        if not (deltas := self.deltas.get(key, ())):
            return weight
        fused = weight.float()
        fused = fused.clone() if fused is weight else fused
        for delta in deltas:
            part = fused.chunk(delta.place.count)[delta.place.index]
            part += self.strength * self._difference(delta, part)
        return fused.to(weight.dtype)

    def _difference(self, delta: Delta, part: Tensor) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                read = {role: file.get_tensor(key).to(part.device).float() for role, key in delta.keys.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        total = torch.zeros_like(part)
        if "down" in read:
            down, up = read["down"].flatten(1), read["up"].flatten(1)
            scale = float(read["alpha"]) / len(down) if "alpha" in read else 1.0
            total += scale * (up @ down).view(part.shape)
        for role in ("diff", "diff_b"):
            if role in read:
                total += read[role].view(part.shape)
        return total


def places_of_wan_names(num_layers: int) -> dict[str, Place]:
    """Where every parameter of Wan's is in ours."""
    recipes = WAN_TRANSFORMER.recipes([f"blocks.{num_layers - 1}.modulation"])
    return {
        source: Place(ours, index, len(recipe.sources))
        for ours, recipe in recipes.items()
        for index, source in enumerate(recipe.sources)
    }


def _wan_name(name: str, places: Mapping[str, Place]) -> str | None:
    """Wan's name of a layer, or of a parameter without one, such as `blocks.0.modulation`."""
    prefixed = True
    while prefixed:
        prefixed = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, prefixed = name.removeprefix(prefix), True
    layers = {parameter.rpartition(".")[0] for parameter in places if parameter.endswith((".weight", ".bias"))}
    if name in layers or name in places:
        return name
    for theirs, ours in _DIFFUSERS_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{ours}", name)
    name = re.sub(r"^(blocks\.\d+)\.norm2$", r"\1.norm3", name)
    if name in layers:
        return name
    return {layer.replace(".", "_"): layer for layer in layers}.get(name)  # kohya writes underscores


def _fitting(
    path: Path,
    found: Mapping[str, Delta],
    header_shapes: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[Delta], list[str]]:
    """The deltas that have a place, and the keys of those that are left out."""
    kept: list[Delta] = []
    left_out: list[str] = []
    problems: list[str] = []
    for parameter, delta in found.items():
        rows, *others = shapes[delta.place.key]
        expected = (rows // delta.place.count, *others)
        if not (problem := _misfit(delta, header_shapes, expected)):
            kept.append(delta)
        elif parameter.startswith(_OPTIONAL):
            left_out += delta.keys.values()
        else:
            problems.append(f"{parameter} {problem}")
    if problems:
        raise CheckpointError(f"{path} does not fit: {some(problems)}.")
    with_weight_left_out = {key for key in left_out if not key.endswith("diff_b")}
    if with_weight_left_out:  # a bias without its weight is of no use
        for delta in [delta for delta in kept if delta.place.key.startswith(f"{_OPTIONAL}.")]:
            kept.remove(delta)
            left_out += delta.keys.values()
    return kept, sorted(left_out)


def _misfit(delta: Delta, header_shapes: Mapping[str, tuple[int, ...]], expected: tuple[int, ...]) -> str | None:
    """What is wrong with a delta for a tensor of shape `expected`, if anything is."""
    has = {role: header_shapes[key] for role, key in delta.keys.items()}
    if ("down" in has) != ("up" in has) or ("alpha" in has and "down" not in has):
        return f"has {' and '.join(sorted(delta.keys.values()))} without a partner"
    for role in ("diff", "diff_b"):
        if role in has and has[role] != expected and _bare(has[role]) != _bare(expected):
            return f"is {list(has[role])} and should be {list(expected)}"
    if "down" in has:
        down, up = has["down"], has["up"]
        num_inputs = _product(expected[1:])
        if _product(down[1:]) != num_inputs or up[0] != expected[0] or _product(up[1:]) != down[0]:
            return f"is {list(up)} · {list(down)} and should give {list(expected)}"
    return None


def _bare(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without its axes of one, which files write or leave out."""
    return tuple(size for size in shape if size != 1)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
