"""Writers of tiny source folders, one for each layout that `scail convert` reads.

The weights are the golden ones, in the official files' own names; the other layouts are made of them here, by rules
written apart from the tables under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from scail.conversion import Heads

GOLDEN = Path(__file__).parent.parent / "golden" / "pipeline.safetensors"
HEADS = Heads(transformer=2, image_encoder=4)  # of the golden networks
SAT_PREFIX = "model.diffusion_model."

_SAT_TO_WAN = (  # in this order; fused layers are split afterwards
    (r"^mixins\.patch_embed\.proj\.", "patch_embedding."),
    (r"^mixins\.patch_embed\.proj_pose\.", "pose_patch_embedding."),
    (r"^time_embed\.", "time_embedding."),
    (r"^adaln_projection\.", "time_projection."),
    (r"^clip_proj\.", "img_emb."),
    (r"^mixins\.adaln_layer\.adaLN_modulations\.(\d+)$", r"blocks.\1.modulation"),
    (r"^mixins\.adaln_layer\.(query|key)_layernorm_list\.(\d+)", r"blocks.\2.self_attn.norm_\1"),
    (r"^mixins\.adaln_layer\.cross_(query|key)_layernorm_list\.(\d+)", r"blocks.\2.cross_attn.norm_\1"),
    (r"^mixins\.adaln_layer\.clip_feature_key_layernorm_list\.(\d+)", r"blocks.\1.cross_attn.norm_k_img"),
    (r"^mixins\.adaln_layer\.clip_feature_key_value_list\.(\d+)", r"blocks.\1.cross_attn.k_img+v_img"),
    (r"norm_query", "norm_q"),
    (r"norm_key", "norm_k"),
    (r"^transformer\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.query_key_value", ".self_attn.q+k+v"),
    (r"\.attention\.dense", ".self_attn.o"),
    (r"\.cross_attention\.query", ".cross_attn.q"),
    (r"\.cross_attention\.key_value", ".cross_attn.k+v"),
    (r"\.cross_attention\.dense", ".cross_attn.o"),
    (r"\.post_cross_attention_layernorm", ".norm3"),
    (r"\.mlp\.dense_h_to_4h", ".ffn.0"),
    (r"\.mlp\.dense_4h_to_h", ".ffn.2"),
    (r"^mixins\.final_layer\.linear", "head.head"),
    (r"^mixins\.final_layer\.adaLN_modulation", "head.modulation"),
)
_T5_TO_TRANSFORMERS = (
    (r"^token_embedding", "shared"),
    (r"^norm", "encoder.final_layer_norm"),
    (r"^blocks\.(\d+)\.norm1", r"encoder.block.\1.layer.0.layer_norm"),
    (r"^blocks\.(\d+)\.norm2", r"encoder.block.\1.layer.1.layer_norm"),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
    (r"^blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
    (r"^blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
)
_CLIP_TO_TRANSFORMERS = (
    (r"^visual\.cls_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.patch_embedding", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.pre_norm", "vision_model.pre_layrnorm"),
    (r"^visual\.post_norm", "vision_model.post_layernorm"),
    (r"^visual\.transformer\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.to_qkv", ".self_attn.q_proj+k_proj+v_proj"),
    (r"\.attn\.proj", ".self_attn.out_proj"),
    (r"\.mlp\.0", ".mlp.fc1"),
    (r"\.mlp\.2", ".mlp.fc2"),
    (r"^visual\.head", "visual_projection.weight"),
)


@dataclass(frozen=True)
class OriginalWeights:
    """The four networks in the official files' names; the transformer's without their prefix."""

    transformer: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoder: dict[str, Tensor]
    image_encoder: dict[str, Tensor]


def original_weights() -> OriginalWeights:
    tensors = load_file(GOLDEN)

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    return OriginalWeights(under(f"module.{SAT_PREFIX}"), under("vae."), under("t5."), under("clip."))


def write_official(folder: Path) -> None:
    """zai-org/SCAIL-Preview: SAT transformer, everything else in `.pth` files; CLIP's own tokenizer lies about."""
    weights = original_weights()
    write_sat(folder / "model/1/mp_rank_00_model_states.pt", weights.transformer)
    write_torch(folder / "Wan2.1_VAE.pth", weights.vae)
    write_torch(folder / "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth", weights.text_encoder)
    clip = {"log_scale": torch.zeros(()), **weights.image_encoder}
    write_torch(folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth", clip)
    write_tokenizer(folder / "umt5-xxl")
    write_tokenizer(folder / "xlm-roberta-large", symbols=("<s>", "<pad>", "</s>", "<unk>"))


def write_wan_branch(folder: Path) -> None:
    """The official `wan` branch: Wan's names, `patch_embedding_pose`, shards under an index, heads in config.json."""
    write_official(folder)
    (folder / "model/1/mp_rank_00_model_states.pt").unlink()
    wan = {
        re.sub(r"^pose_patch_embedding", "patch_embedding_pose", key): tensor
        for key, tensor in wan_names(original_weights().transformer).items()
    }
    keys = sorted(wan)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, names in shards.items():
        save_file({key: wan[key] for key in names}, folder / name)
    weight_map = {key: name for name, names in shards.items() for key in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "i2v", "dim": 64, "num_heads": 2, "in_dim": 20}))


def write_wan2gp(folder: Path) -> None:
    """Wan2GP: every network a safetensors file in the official names, the transformer in Wan's."""
    weights = original_weights()
    write_safetensors(folder / "wan2.1_scail_preview_14B_bf16.safetensors", wan_names(weights.transformer))
    write_safetensors(folder / "Wan2.1_VAE.safetensors", weights.vae)
    write_safetensors(folder / "umt5-xxl/models_t5_umt5-xxl-enc-bf16.safetensors", weights.text_encoder)
    clip = {"log_scale": torch.zeros(()), "textual.token_embedding.weight": torch.zeros(5, 4), **weights.image_encoder}
    write_safetensors(folder / "xlm-roberta-large/models_clip_open-clip-bf16.safetensors", clip)
    write_tokenizer(folder / "umt5-xxl")


def write_comfyui(folder: Path, prefix: str = "diffusion_model.") -> None:
    """ComfyUI: one folder a kind, prefixed transformer, encoders in transformers' names."""
    weights = original_weights()
    transformer = {prefix + key: tensor for key, tensor in wan_names(weights.transformer).items()}
    write_safetensors(folder / "diffusion_models/scail.safetensors", transformer)
    write_safetensors(folder / "vae/wan_2.1_vae.safetensors", weights.vae)
    text_encoder = renamed(weights.text_encoder, _T5_TO_TRANSFORMERS)
    text_encoder["spiece_model"] = torch.zeros(16, dtype=torch.uint8)
    write_safetensors(folder / "text_encoders/umt5_xxl_fp16.safetensors", text_encoder)
    clip = renamed(weights.image_encoder, _CLIP_TO_TRANSFORMERS)
    clip["vision_model.embeddings.class_embedding"] = clip["vision_model.embeddings.class_embedding"].flatten()
    position = "vision_model.embeddings.position_embedding.weight"
    clip[position] = clip[position][0]
    write_safetensors(folder / "clip_vision/clip_vision_h.safetensors", clip)
    write_tokenizer(folder / "text_encoders")


def wan_names(sat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(sat, _SAT_TO_WAN)


def renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """`state` by rules; a result such as `attn.q+k.weight` stands for two tensors, attn.q.weight and attn.k.weight."""
    result = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*\.)([^.]*\+[^.]*)(\.\w+)", name):
            layers = match[2].split("+")
            for layer, part in zip(layers, tensor.chunk(len(layers)), strict=True):
                result[f"{match[1]}{layer}{match[3]}"] = part.clone()
        else:
            result[name] = tensor
    return result


def write_sat(path: Path, transformer: Mapping[str, Tensor], beside: Mapping[str, Tensor] | None = None) -> None:
    """What DeepSpeed writes: the weights under `module`, among numbers and names of the training run."""
    module = {SAT_PREFIX + key: tensor for key, tensor in transformer.items()} | dict(beside or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": module, "optimizer": None, "global_steps": 1, "ds_version": "0.14"}, path)


def write_torch(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), path)


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)


def write_tokenizer(folder: Path, symbols: tuple[str, ...] = ("<pad>", "</s>", "<unk>")) -> None:
    """A letter a token: few enough for the golden text encoder's 120."""
    vocab = {symbol: index for index, symbol in enumerate([*symbols, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocab["</s>"])])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
