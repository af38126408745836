"""How much a clip's character is that of its reference, as the resident image encoder sees it.

States of a transformer have much in common whatever the picture is. A plain grey picture stands for that part, and is
taken off both sides before their cosine; otherwise everything is 0.9 alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scail import preprocess

if TYPE_CHECKING:
    from scail.pipeline import ScailPipeline
    from scail.quality import Frames

NUM_FRAMES = 4  # spread over the clip


@torch.inference_mode()
def identity(pipeline: ScailPipeline, reference: Frames, frames: Frames) -> float:
    """Mean cosine in -1 … 1 between a reference (H', W', 3) of any size and frames (F, H, W, 3)."""
    height, width = frames.shape[1:3]
    chosen = frames[np.linspace(0, len(frames) - 1, min(NUM_FRAMES, len(frames))).round().astype(int)]
    own = preprocess.reference_pixels(reference, height, width)[:, :, 0]
    shown = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 127.5 - 1
    pictures = torch.cat((torch.zeros_like(own), own, shown)).to(pipeline.device, pipeline.dtype)
    states: Tensor = pipeline.image_encoder(pictures)[:, 0].float()  # (B, D), the class tokens
    states = states[1:] - states[:1]
    return float(torch.cosine_similarity(states[:1], states[1:]).mean())
