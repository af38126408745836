"""The sizes of the four networks, read off the shapes of their tensors.

Numbers of heads are in no shape: they follow from the head sizes that all released models have, unless the caller
says them. A shape that is missing or has other axes is a KeyError, IndexError or ValueError: the caller knows the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from scail.config import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from scail.errors import CheckpointError
from scail.layouts import Shapes, num_blocks_of

_HEAD_SIZE = 128  # the transformer's, in every size of Wan
_IMAGE_HEAD_SIZE = 80  # ViT-H's


def transformer_config(shapes: Shapes, num_heads: int | None) -> TransformerConfig:
    """Of the transformer; `num_heads` None: heads of 128.

    Raises:
        CheckpointError: If the hidden size is no multiple of them.
    """
    hidden_size, in_channels, _, patch_size, _ = shapes["patch_embedding.weight"]
    latent_channels = shapes["head.linear.weight"][0] // patch_size**2
    if num_heads is None and hidden_size % _HEAD_SIZE:
        raise CheckpointError(
            f"the transformer's hidden size is {hidden_size}, no multiple of {_HEAD_SIZE}: say how many heads it has."
        )
    num_heads = num_heads or hidden_size // _HEAD_SIZE
    if hidden_size % num_heads:
        raise CheckpointError(f"the transformer's hidden size is {hidden_size}, no multiple of {num_heads} heads.")
    return TransformerConfig(
        num_layers=num_blocks_of(shapes, "blocks.N.modulation"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        ffn_size=shapes["blocks.0.ffn.0.weight"][0],
        text_size=shapes["text_embedding.0.weight"][1],
        image_size=shapes["image_embedding.1.weight"][1],
        time_freq_size=shapes["time_embedding.0.weight"][1],
        latent_channels=latent_channels,
        mask_channels=in_channels - latent_channels,
        patch_size=patch_size,
    )


def heads_beside(path: Path) -> int | None:
    """`num_heads` of the `config.json` in a file's folder, as the `wan` branch writes it."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    num_heads = config.get("num_heads") if isinstance(config, dict) else None
    return num_heads if isinstance(num_heads, int) and num_heads > 0 else None


def vae_config(shapes: Shapes) -> VaeConfig:
    """Of the VAE."""
    return VaeConfig(base_size=shapes["encoder.conv_in.weight"][0], latent_channels=shapes["post_quant_conv.weight"][0])


def text_encoder_config(shapes: Shapes) -> TextEncoderConfig:
    """Of the text encoder."""
    vocab_size, hidden_size = shapes["encoder.embed_tokens.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return TextEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        attention_size=shapes[f"{attention}.q.weight"][0],
        ffn_size=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_heads=num_heads,
        num_layers=num_blocks_of(shapes, "encoder.block.N.layer"),
        num_buckets=num_buckets,
    )


def image_encoder_config(shapes: Shapes, num_heads: int | None) -> ImageEncoderConfig:
    """Of the image encoder; `num_heads` None: heads of 80.

    Raises:
        CheckpointError: If the hidden size is no multiple of them.
    """
    hidden_size, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
    num_patches = shapes["embeddings.position_embedding.weight"][0] - 1
    if num_heads is None and hidden_size % _IMAGE_HEAD_SIZE:
        raise CheckpointError(
            f"the image encoder's hidden size is {hidden_size}, no multiple of {_IMAGE_HEAD_SIZE}: say how many heads "
            "it has."
        )
    return ImageEncoderConfig(
        image_size=patch_size * math.isqrt(num_patches),
        patch_size=patch_size,
        hidden_size=hidden_size,
        ffn_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_heads=num_heads or hidden_size // _IMAGE_HEAD_SIZE,
        num_layers=num_blocks_of(shapes, "encoder.layers.N") + 1,  # the last is not run and was left out
    )
