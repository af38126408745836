from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from scail.config import SCAIL_TINY
from scail.models.image_encoder import ImageEncoder

CONFIG = SCAIL_TINY.image_encoder
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder.from_config(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_states_are_those_before_the_librarys_last_block(encoder, pixels):
    library = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=CONFIG.image_size,
            patch_size=CONFIG.patch_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.ffn_size,
            num_attention_heads=CONFIG.num_heads,
            num_hidden_layers=CONFIG.num_layers,
            hidden_act="gelu",
        )
    ).eval()
    tower = getattr(library, "vision_model", library)
    missing, unexpected = tower.load_state_dict(encoder.state_dict(), strict=False)
    square = F.interpolate(pixels, size=(CONFIG.image_size,) * 2, mode="bicubic", antialias=False)

    expected = library((square / 2 + 0.5 - MEAN) / STD, output_hidden_states=True).hidden_states[-2]

    assert not unexpected
    assert all(key.startswith(("encoder.layers.3.", "post_layernorm.")) for key in missing)
    torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=1e-5)


def test_every_size_gives_one_token_a_patch_and_one_for_the_class(encoder):
    assert encoder(torch.zeros(2, 3, 96, 64)).shape == (2, 1 + 4 * 4, 40)


def test_states_are_in_the_dtype_of_the_weights(encoder, pixels):
    assert encoder.to(torch.bfloat16)(pixels).dtype == torch.bfloat16


def test_position_ids_are_real_in_a_model_built_on_the_meta_device():
    with torch.device("meta"):
        encoder = ImageEncoder.from_config(CONFIG)

    assert encoder.embeddings.position_ids.tolist() == [list(range(17))]
