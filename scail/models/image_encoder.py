"""What the reference shows: the states of CLIP's visual tower before its last block.

Source: zai-org/SCAIL, the CLIP wrapper; the picture is squeezed to a square, its aspect is not kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from scail.config import ImageEncoderConfig

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """CLIP's visual tower without its last block and last norm, on the device of its input."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        library_config = CLIPVisionConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_attention_heads=config.num_heads,
            num_hidden_layers=config.num_layers - 1,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
        tower = CLIPVisionModel(library_config)
        tower = getattr(tower, "vision_model", tower)  # a level of its own in older releases of transformers
        self.image_size = config.image_size
        self.embeddings = tower.embeddings
        self.pre_layrnorm = tower.pre_layrnorm  # sic: the library's and the checkpoints' spelling
        self.encoder = tower.encoder
        # No checkpoint holds this buffer, so that a model built on the meta device has to keep it elsewhere.
        self.embeddings.position_ids = torch.arange(self.embeddings.num_positions, device="cpu").unsqueeze(0)

    @classmethod
    def from_config(cls, config: ImageEncoderConfig) -> ImageEncoder:
        return cls(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Image states.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], cropped as the clip is.

        Returns:
            (B, 1 + patches, D) in the dtype of the weights, class token first.
        """
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (_MEAN, _STD))
        pixels = (pixels * 0.5 + 0.5 - mean) / std
        states = self.pre_layrnorm(self.embeddings(pixels.to(self.pre_layrnorm.weight.dtype)))
        return self.encoder(inputs_embeds=states).last_hidden_state
