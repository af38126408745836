"""What the original files call their tensors, as data: a table or a rule for each network and family of files.

Source: zai-org/SCAIL (SAT names), Wan 2.1 (Wan names), diffusers (VAE names).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scail.errors import CheckpointError
from scail.fingerprint import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE, Component

Shapes = Mapping[str, tuple[int, ...]]

# The tables: a layer a line, N for the block. `a.q,k` joins a.q and a.k along their first axis, `a[0/3]` is the first
# of three equal parts of a. The last column: w weight, b bias, - the name is the tensor itself, and = the same without
# its leading axes of one.
_TRANSFORMER_TABLE = """
ours                             SAT                                                  Wan
patch_embedding                  mixins.patch_embed.proj                              patch_embedding                 wb
pose_patch_embedding             mixins.patch_embed.proj_pose                         pose_patch_embedding            wb
time_embedding.0                 time_embed.0                                         time_embedding.0                wb
time_embedding.2                 time_embed.2                                         time_embedding.2                wb
time_projection                  adaln_projection.1                                   time_projection.1               wb
text_embedding.0                 text_embedding.0                                     text_embedding.0                wb
text_embedding.2                 text_embedding.2                                     text_embedding.2                wb
image_embedding.0                clip_proj.proj.0                                     img_emb.proj.0                  wb
image_embedding.1                clip_proj.proj.1                                     img_emb.proj.1                  wb
image_embedding.3                clip_proj.proj.3                                     img_emb.proj.3                  wb
image_embedding.4                clip_proj.proj.4                                     img_emb.proj.4                  wb
blocks.N.modulation              mixins.adaln_layer.adaLN_modulations.N               blocks.N.modulation             -
blocks.N.self_attn.qkv           transformer.layers.N.attention.query_key_value       blocks.N.self_attn.q,k,v        wb
blocks.N.self_attn.norm_q        mixins.adaln_layer.query_layernorm_list.N            blocks.N.self_attn.norm_q       w
blocks.N.self_attn.norm_k        mixins.adaln_layer.key_layernorm_list.N              blocks.N.self_attn.norm_k       w
blocks.N.self_attn.out           transformer.layers.N.attention.dense                 blocks.N.self_attn.o            wb
blocks.N.cross_attn_norm         transformer.layers.N.post_cross_attention_layernorm  blocks.N.norm3                  wb
blocks.N.cross_attn.q            transformer.layers.N.cross_attention.query           blocks.N.cross_attn.q           wb
blocks.N.cross_attn.text_kv      transformer.layers.N.cross_attention.key_value       blocks.N.cross_attn.k,v         wb
blocks.N.cross_attn.image_kv     mixins.adaln_layer.clip_feature_key_value_list.N     blocks.N.cross_attn.k_img,v_img wb
blocks.N.cross_attn.norm_q       mixins.adaln_layer.cross_query_layernorm_list.N      blocks.N.cross_attn.norm_q      w
blocks.N.cross_attn.norm_text_k  mixins.adaln_layer.cross_key_layernorm_list.N        blocks.N.cross_attn.norm_k      w
blocks.N.cross_attn.norm_image_k mixins.adaln_layer.clip_feature_key_layernorm_list.N blocks.N.cross_attn.norm_k_img  w
blocks.N.cross_attn.out          transformer.layers.N.cross_attention.dense           blocks.N.cross_attn.o           wb
blocks.N.ffn.0                   transformer.layers.N.mlp.dense_h_to_4h               blocks.N.ffn.0                  wb
blocks.N.ffn.2                   transformer.layers.N.mlp.dense_4h_to_h               blocks.N.ffn.2                  wb
head.modulation                  mixins.final_layer.adaLN_modulation                  head.modulation                 -
head.linear                      mixins.final_layer.linear                            head.head                       wb
"""
_TEXT_ENCODER_TABLE = """
ours                                                            Wan
encoder.embed_tokens                                            token_embedding                   w
encoder.block.N.layer.0.layer_norm                              blocks.N.norm1                    w
encoder.block.N.layer.0.SelfAttention.q                         blocks.N.attn.q                   w
encoder.block.N.layer.0.SelfAttention.k                         blocks.N.attn.k                   w
encoder.block.N.layer.0.SelfAttention.v                         blocks.N.attn.v                   w
encoder.block.N.layer.0.SelfAttention.o                         blocks.N.attn.o                   w
encoder.block.N.layer.0.SelfAttention.relative_attention_bias   blocks.N.pos_embedding.embedding  w
encoder.block.N.layer.1.layer_norm                              blocks.N.norm2                    w
encoder.block.N.layer.1.DenseReluDense.wi_0                     blocks.N.ffn.gate.0               w
encoder.block.N.layer.1.DenseReluDense.wi_1                     blocks.N.ffn.fc1                  w
encoder.block.N.layer.1.DenseReluDense.wo                       blocks.N.ffn.fc2                  w
encoder.final_layer_norm                                        norm                              w
"""
_IMAGE_ENCODER_TABLE = """
ours                                   Wan
embeddings.class_embedding             visual.cls_embedding                      =
embeddings.patch_embedding             visual.patch_embedding                    w
embeddings.position_embedding.weight   visual.pos_embedding                      =
pre_layrnorm                           visual.pre_norm                           wb
encoder.layers.N.layer_norm1           visual.transformer.N.norm1                wb
encoder.layers.N.self_attn.q_proj      visual.transformer.N.attn.to_qkv[0/3]     wb
encoder.layers.N.self_attn.k_proj      visual.transformer.N.attn.to_qkv[1/3]     wb
encoder.layers.N.self_attn.v_proj      visual.transformer.N.attn.to_qkv[2/3]     wb
encoder.layers.N.self_attn.out_proj    visual.transformer.N.attn.proj            wb
encoder.layers.N.layer_norm2           visual.transformer.N.norm2                wb
encoder.layers.N.mlp.fc1               visual.transformer.N.mlp.0                wb
encoder.layers.N.mlp.fc2               visual.transformer.N.mlp.2                wb
"""
_PARAMETERS = {"wb": (".weight", ".bias"), "w": (".weight",), "-": ("",), "=": ("",)}


@dataclass(frozen=True)
class Recipe:
    """How one tensor of ours is made of tensors of a source."""

    sources: tuple[str, ...]
    part: tuple[int, int] = (0, 1)  # (which, of how many)
    squeezed: bool = False

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the result.

        Raises:
            CheckpointError: If tensors that are to be joined differ in shape.
        """
        shape, *others = (shapes[source] for source in self.sources)
        if any(other != shape for other in others):
            raise CheckpointError(f"{', '.join(self.sources)} should be of one shape: {[shape, *others]}.")
        if others:
            shape = (len(self.sources) * shape[0], *shape[1:])
        if self.part[1] > 1:
            shape = (shape[0] // self.part[1], *shape[1:])
        return _without_leading_ones(shape) if self.squeezed else shape

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        tensors = [read(source) for source in self.sources]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        which, number = self.part
        tensor = tensor.chunk(number)[which] if number > 1 else tensor
        return tensor.reshape(_without_leading_ones(tuple(tensor.shape)) if self.squeezed else tensor.shape)


@dataclass(frozen=True)
class Table:
    """The recipes of one layout, written out for as many blocks as a file has."""

    text: str
    column: str

    def recipes(self, keys: Iterable[str]) -> dict[str, Recipe]:
        header, *lines = (line.split() for line in self.text.strip().splitlines())
        column = header.index(self.column)
        rows = [(line[0], line[column], line[-1]) for line in lines]
        repeated = next(source for _, source, _ in rows if ".N" in source)
        num_blocks = num_blocks_of(keys, repeated)
        return {
            key: recipe
            for ours, source, kind in rows
            for block in (range(num_blocks) if ".N" in source else (0,))
            for key, recipe in _row_recipes(ours, source, kind, block)
        }


def _row_recipes(ours: str, source: str, kind: str, block: int) -> Iterator[tuple[str, Recipe]]:
    ours, source = (re.sub(r"\.N(?=\.|$)", f".{block}", name) for name in (ours, source))
    source, _, part = source.rstrip("]").partition("[")
    first, *others = source.split(",")
    layers = (first, *(f"{first.rpartition('.')[0]}.{other}" for other in others))
    which, number = map(int, (part or "0/1").split("/"))
    for parameter in _PARAMETERS[kind]:
        sources = tuple(layer + parameter for layer in layers)
        yield ours + parameter, Recipe(sources, (which, number), squeezed=kind == "=")


def num_blocks_of(keys: Iterable[str], repeated: str) -> int:
    """How many blocks `keys` tell of, by a name in which N stands for the block."""
    pattern = re.compile(re.escape(repeated).replace(r"\.N", r"\.(\d+)"))
    return 1 + max((int(match[1]) for key in keys if (match := pattern.match(key))), default=-1)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _same_names(keys: Iterable[str]) -> dict[str, Recipe]:
    return {key: Recipe((key,)) for key in keys}


def _vae_recipes(keys: Iterable[str]) -> dict[str, Recipe]:
    """diffusers' own conversion passes values through, so that it can be asked for names alone."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    renamed: dict[str, str] = convert_wan_vae_to_diffusers({key: key for key in keys})
    return {ours: Recipe((source,)) for ours, source in renamed.items()}


@dataclass(frozen=True)
class Layout:
    """One network as one family of files stores it.

    Attributes:
        name: For messages.
        component: Which of the four networks.
        signature: A key that no other layout has.
        recipes: From a file's keys, without their prefix, to the recipe of each of ours.
        prefixes: What may stand before every key. Keys without it belong to other networks and are left out.
        aliases: Beginnings of keys and what they are read as, where the file has not that spelling too.
        unused: Beginnings of keys of parts that a render does not run.
    """

    name: str
    component: Component
    signature: str
    recipes: Callable[[Iterable[str]], dict[str, Recipe]]
    prefixes: tuple[str, ...] = ("",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


_WAN_PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")
SAT_TRANSFORMER = Layout(
    "SAT",
    TRANSFORMER,
    signature="mixins.patch_embed.proj.weight",
    recipes=Table(_TRANSFORMER_TABLE, "SAT").recipes,
    prefixes=("", "model.diffusion_model."),
)
WAN_TRANSFORMER = Layout(
    "Wan",
    TRANSFORMER,
    signature="blocks.0.self_attn.q.weight",
    recipes=Table(_TRANSFORMER_TABLE, "Wan").recipes,
    prefixes=_WAN_PREFIXES,
    aliases={"patch_embedding_pose.": "pose_patch_embedding."},
)
WAN_VAE = Layout("Wan", VAE, signature="decoder.upsamples.0.residual.0.gamma", recipes=_vae_recipes)
DIFFUSERS_VAE = Layout("diffusers", VAE, signature="decoder.up_blocks.0.resnets.0.norm1.gamma", recipes=_same_names)
WAN_TEXT_ENCODER = Layout(
    "Wan",
    TEXT_ENCODER,
    signature="blocks.0.pos_embedding.embedding.weight",
    recipes=Table(_TEXT_ENCODER_TABLE, "Wan").recipes,
)
TRANSFORMERS_TEXT_ENCODER = Layout(
    "transformers",
    TEXT_ENCODER,
    signature="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    recipes=_same_names,
    aliases={"shared.": "encoder.embed_tokens."},
    unused=("shared.", "spiece_model"),
)
WAN_IMAGE_ENCODER = Layout(
    "Wan",
    IMAGE_ENCODER,
    signature="visual.post_norm.weight",
    recipes=Table(_IMAGE_ENCODER_TABLE, "Wan").recipes,
    unused=("visual.post_norm.", "visual.head", "log_scale", "textual."),
)
TRANSFORMERS_IMAGE_ENCODER = Layout(
    "transformers",
    IMAGE_ENCODER,
    signature="post_layernorm.weight",  # only of a whole tower, so that a last block is never left out twice
    recipes=_same_names,
    prefixes=("vision_model.", ""),
    unused=("post_layernorm.", "embeddings.position_ids", "visual_projection."),
)
LAYOUTS = (
    SAT_TRANSFORMER,
    WAN_TRANSFORMER,
    WAN_VAE,
    DIFFUSERS_VAE,
    WAN_TEXT_ENCODER,
    TRANSFORMERS_TEXT_ENCODER,
    WAN_IMAGE_ENCODER,
    TRANSFORMERS_IMAGE_ENCODER,
)


def needed_by(component: Component, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of what a render runs: all, but for the image encoder's last block."""
    if component is not IMAGE_ENCODER:
        return recipes
    last = f"encoder.layers.{num_blocks_of(recipes, 'encoder.layers.N') - 1}."
    return {ours: recipe for ours, recipe in recipes.items() if not ours.startswith(last)}
