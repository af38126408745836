"""Original files → our checkpoint folder. The layouts are data, in `scail.layouts`; here they are found and followed.

A source is a folder that holds the four networks and umt5's tokenizer somewhere in it. Networks are recognised by
their keys and not by file names, so these all work, and mixtures of them:

- the official SCAIL-Preview folder: SAT `mp_rank_00_model_states.pt`, `Wan2.1_VAE.pth`, umt5 and CLIP `.pth`;
- the official `wan` branch: Wan's names, the pose patches as `patch_embedding_pose`, a `config.json` with the heads;
- Wan2GP and ComfyUI safetensors: Wan's names, bare or under `diffusion_model.` or `model.diffusion_model.`; text and
  image encoder under the names of the official files or of transformers.

Nothing is held whole: files are mapped, opened anew for every shard that is written, and no code in them is run.

Source: zai-org/SCAIL (SAT names), Wan 2.1 (Wan names), diffusers (VAE names).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from scail.checkpoint import (
    MAX_SHARD_BYTES,
    compare_shapes,
    load_tokenizer,
    on_meta,
    shapes_of,
)
from scail.config import (
    SCAIL_14B,
    LoraFile,
    ModelConfig,
    Quantization,
)
from scail.errors import CheckpointError, InvalidInputError
from scail.fingerprint import (
    COMPONENTS,
    IMAGE_ENCODER,
    MODEL_INDEX,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    Component,
    TensorHeader,
    record_hashes,
    some,
    write_model_config,
)
from scail.layouts import (
    LAYOUTS,
    SAT_TRANSFORMER,
    WAN_IMAGE_ENCODER,
    WAN_TEXT_ENCODER,
    WAN_VAE,
    Layout,
    Recipe,
    needed_by,
)
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import TextEncoder
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.rewriting import Progress, free_folder, partial_folder, write_component
from scail.sizes import heads_beside, image_encoder_config, text_encoder_config, transformer_config, vae_config
from scail.sources import SourceFile, source_files
from scail.weights import WeightChanges

logger = logging.getLogger(__name__)

_READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
_QUANTISED_KEY = re.compile(
    r"scaled_fp8|comfy_quant|\.(weight_scale|scale_weight|scale_input|input_scale|_scale|_data)$"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads, which shapes do not tell; None: by the head sizes that all released models have."""

    transformer: int | None = None
    image_encoder: int | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion took for what.

    Attributes:
        config: Sizes of the model.
        taken: File and layout by component.
        left_out: Keys by component that were in the file and belong to no part that a render runs.
        unrecognised: Weight files that hold none of the four networks.
    """

    config: ModelConfig
    taken: dict[str, str]
    left_out: dict[str, tuple[str, ...]]
    unrecognised: tuple[Path, ...]


@dataclass(frozen=True)
class _Match:
    """A network found in a file."""

    file: SourceFile
    layout: Layout
    prefix: str

    def __str__(self) -> str:
        return f"{self.file.path} ({self.layout.name} names)"


@dataclass(frozen=True)
class _Plan:
    """All that is needed to write one component."""

    match: _Match
    names: dict[str, str]  # from the recipes' keys to the file's own
    recipes: dict[str, Recipe]
    shapes: dict[str, tuple[int, ...]]
    left_out: tuple[str, ...]


def convert(
    source: Path,
    dest: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: Heads | None = None,
    quantization: Quantization = "none",
    loras: Sequence[LoraFile] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
) -> ConversionReport:
    """Write our checkpoint folder from original files.

    Everything is checked by the files' headers before the first byte is written. `dest` appears, complete, at the
    end; a conversion that was killed leaves a hidden `.partial` folder beside it.

    Args:
        source: Folder with the four networks and umt5's tokenizer.
        dest: A folder that does not exist or is empty.
        dtype: Of transformer, text and image encoder; the VAE is written in float32.
        heads: Numbers of heads of models that were never released, such as those of tests.
        quantization: Of the transformer's matrix products.
        loras: Fused into the transformer before that.
        max_shard_bytes: Bound of a file of weights. From float32 files a conversion needs about 3.5 times that much
            memory: 3.0 GiB by default.
        on_progress: Called after every file with component, bytes written and bytes in all.

    Raises:
        InvalidInputError: If `source` is no folder or `dest` is in use.
        CheckpointError: If a network or the tokenizer is not found, is there twice, is incomplete, has unknown
            tensors, is quantised, damaged, or holds pickled code.
    """
    dest = free_folder(dest)
    matches, unrecognised = _find_networks(source)
    tokenizer_dir = _find_tokenizer(source)
    plans, config = _plan_model(matches, heads or Heads())
    for plan in plans:
        logger.info("%s from %s", plan.match.layout.component.folder, plan.match)
        if plan.left_out:
            logger.info("%d tensors are not needed: %s", len(plan.left_out), some(plan.left_out))
    changes = _changes(plans, config, quantization, loras)
    partial_dest = partial_folder(dest)
    try:
        write_model_config(partial_dest, config, quantization=quantization, loras=tuple(lora.name for lora in loras))
        for plan in plans:
            component = plan.match.layout.component
            write_component(
                component,
                partial_dest,
                shapes=plan.shapes,
                open_source=partial(_opened, plan),
                dtype=torch.float32 if component is VAE else dtype,
                changes=changes if component is TRANSFORMER else WeightChanges(),
                max_shard_bytes=max_shard_bytes,
                on_progress=on_progress,
            )
        _copy_tokenizer(tokenizer_dir, partial_dest)
        record_hashes(partial_dest)
        partial_dest.replace(dest)
    finally:
        shutil.rmtree(partial_dest, ignore_errors=True)
    return ConversionReport(
        config=config,
        taken={plan.match.layout.component.folder: str(plan.match) for plan in plans},
        left_out={plan.match.layout.component.folder: plan.left_out for plan in plans if plan.left_out},
        unrecognised=unrecognised,
    )


def _find_networks(source: Path) -> tuple[dict[Component, _Match], tuple[Path, ...]]:
    if not source.is_dir():
        raise InvalidInputError(f"{source} is not a folder; expected one that holds the original files.")
    if (source / MODEL_INDEX).is_file() and (source / TRANSFORMER.folder).is_dir():
        raise InvalidInputError(f"{source} has a {MODEL_INDEX}: it is converted already, or not of an original layout.")
    found: dict[Component, list[_Match]] = defaultdict(list)
    unrecognised = []
    for file in source_files(source):
        matches = [
            _Match(file, layout, prefix)
            for layout in LAYOUTS
            for prefix in layout.prefixes
            if prefix + layout.signature in file.headers
        ]
        for match in matches:
            found[match.layout.component].append(match)
        if not matches:
            unrecognised.append(file.path)
    problems = [f"no {component.folder}" for component in COMPONENTS if not found[component]]
    problems += [
        f"more than one {component.folder}: {', '.join(map(str, matches))}"
        for component, matches in found.items()
        if len(matches) > 1
    ]
    if problems:
        seen = f" Weight files of no known layout: {some(map(str, unrecognised))}." if unrecognised else ""
        raise CheckpointError(f"{source} has {'; '.join(problems)}.{seen}")
    return {component: matches[0] for component, matches in found.items()}, tuple(unrecognised)


def _plan_model(matches: Mapping[Component, _Match], heads: Heads) -> tuple[list[_Plan], ModelConfig]:
    plans = {component: _plan(match) for component, match in matches.items()}
    try:
        shapes = {
            component: {ours: recipe.shape(plan.shapes) for ours, recipe in plan.recipes.items()}
            for component, plan in plans.items()
        }
        config = ModelConfig(
            name="SCAIL",
            transformer=transformer_config(
                shapes[TRANSFORMER], heads.transformer or heads_beside(matches[TRANSFORMER].file.path)
            ),
            vae=vae_config(shapes[VAE]),
            text_encoder=text_encoder_config(shapes[TEXT_ENCODER]),
            image_encoder=image_encoder_config(shapes[IMAGE_ENCODER], heads.image_encoder),
        )
    except KeyError as error:
        raise CheckpointError(f"a tensor is missing: {error.args[0]}.") from error
    except (IndexError, ValueError) as error:
        raise CheckpointError(
            f"a tensor that the sizes are read from has too many or too few axes: {error}."
        ) from error
    if replace(config, name=SCAIL_14B.name) == SCAIL_14B:
        config = SCAIL_14B
    networks: dict[Component, Callable[[], nn.Module]] = {
        TRANSFORMER: partial(ScailTransformer, config.transformer),
        VAE: lambda: VideoVae.from_config(config.vae).model,
        TEXT_ENCODER: partial(TextEncoder, config.text_encoder),
        IMAGE_ENCODER: partial(ImageEncoder, config.image_encoder),
    }
    for component, build in networks.items():
        compare_shapes(shapes[component], shapes_of(on_meta(build)), where=str(matches[component]))
    return [replace(plans[component], shapes=shapes[component]) for component in COMPONENTS], config


def _plan(match: _Match) -> _Plan:
    """Which tensors of a file make which of ours; `shapes` are still the file's."""
    layout, prefix, headers = match.layout, match.prefix, match.file.headers
    names = {key.removeprefix(prefix): key for key in headers if key.startswith(prefix)}
    for spelling, meant in layout.aliases.items():
        for key in [key for key in names if key.startswith(spelling)]:
            if (canonical := meant + key.removeprefix(spelling)) not in names:
                names[canonical] = names.pop(key)
    unused = [key for key in names if key.startswith(layout.unused)] if layout.unused else []
    keys = names.keys() - set(unused)
    _refuse_quantised(match, {key: headers[names[key]] for key in sorted(keys)})
    recipes = layout.recipes(sorted(keys, key=_natural_order))
    used = {source for recipe in recipes.values() for source in recipe.sources}
    if missing := used - keys:
        raise CheckpointError(f"{match}: {len(missing)} tensors are missing: {some(missing)}.")
    if extra := keys - used:
        raise CheckpointError(f"{match}: {len(extra)} tensors are not known: {some(extra)}.")
    needed = needed_by(layout.component, recipes)
    taken = {names[source] for recipe in needed.values() for source in recipe.sources}
    shapes = {key: headers[names[key]].shape for key in keys}
    return _Plan(match, names, needed, shapes, left_out=tuple(sorted(headers.keys() - taken)))


def _refuse_quantised(match: _Match, headers: Mapping[str, TensorHeader]) -> None:
    for key, header in headers.items():
        if header.dtype not in _READABLE_DTYPES or _QUANTISED_KEY.search(key):
            raise CheckpointError(
                f"{match} is quantised ({key} is {header.dtype}), and its weights cannot be read back exactly; "
                "convert the bf16, fp16 or fp32 file instead."
            )


def _natural_order(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _changes(
    plans: Sequence[_Plan], config: ModelConfig, quantization: Quantization, loras: Sequence[LoraFile]
) -> WeightChanges:
    [shapes] = (plan.shapes for plan in plans if plan.match.layout.component is TRANSFORMER)
    return WeightChanges.of(loras, quantization, config=config.transformer, shapes=shapes)


@contextmanager
def _opened(plan: _Plan) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads a tensor of ours, made of those of the source."""
    with plan.match.file.open() as read:
        yield lambda ours: plan.recipes[ours].make(lambda key: read(plan.names[key]))


def _find_tokenizer(source: Path) -> Path:
    """umt5's tokenizer: the one whose padding is token 0 (CLIP's text tower, often beside it, has 1)."""
    folders = []
    for path in sorted(source.rglob("tokenizer.json")):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        if tokenizer.token_to_id("<pad>") == 0:
            folders.append(path.parent)
    if len(folders) != 1:
        found = f"{len(folders)}: {some(map(str, folders))}" if folders else "none"
        raise CheckpointError(
            f"{source} should have one umt5 tokenizer (google/umt5-xxl's tokenizer.json); found {found}."
        )
    return folders[0]


def _copy_tokenizer(tokenizer_dir: Path, dest: Path) -> None:
    (dest / TOKENIZER).mkdir()
    for name in _TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, dest / TOKENIZER / name)
    load_tokenizer(dest)


def convert_transformer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAT tensors, keys without `model.diffusion_model.`, as `ScailTransformer` names them."""
    return _convert_state(SAT_TRANSFORMER, state)


def convert_vae_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `Wan2.1_VAE.pth` as `VideoVae.model` names them."""
    return _convert_state(WAN_VAE, state)


def convert_text_encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of umt5's `.pth` as `TextEncoder` names them."""
    return _convert_state(WAN_TEXT_ENCODER, state)


def convert_image_encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of CLIP's `.pth` as `ImageEncoder` names them; those it does not run are left out."""
    return _convert_state(WAN_IMAGE_ENCODER, state)


def _convert_state(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = [key for key in state if not key.startswith(layout.unused)]
    recipes = needed_by(layout.component, layout.recipes(keys))
    return {ours: recipe.make(state.__getitem__) for ours, recipe in recipes.items()}
