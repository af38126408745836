"""Architectures and sampling defaults: the one place where their numbers are.

Importing this module costs nothing: no torch, so that a process that only plans can read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Literal

Quantization = Literal["none", "fp8", "int8"]
Solver = Literal["euler", "dpm++", "unipc"]
PlacementPolicy = Literal["resident", "balanced", "low"]
MemoryPolicy = Literal["auto", "resident", "balanced", "low"]
POLICIES: tuple[PlacementPolicy, ...] = ("resident", "balanced", "low")  # each needs less of the device than the last

# Part of every clip's content key. Raise it when a change to the code changes pixels at equal inputs.
NUMERICS_VERSION = 5

DEFAULT_SIZE = (512, 896)  # short and long side in pixels; the reference's orientation decides which is the height
SIZE_MULTIPLE = 32  # VAE stride 8, pose at half size, patches of 2: other sizes fail in the official network
MAX_FRAMES = 81  # 21 latent frames: the longest clip SCAIL was trained on
TEMPORAL_STRIDE = 4  # the VAE turns 1 + 4k frames into 1 + k latent frames
SPATIAL_STRIDE = 8


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the diffusion transformer. Source: `keymap_14b` and the official class, zai-org/SCAIL."""

    num_layers: int = 40
    hidden_size: int = 5120
    num_heads: int = 40
    ffn_size: int = 13824
    text_size: int = 4096  # width of the text encoder's states
    image_size: int = 1280  # width of the image encoder's states
    time_freq_size: int = 256
    latent_channels: int = 16
    mask_channels: int = 4  # appended to the latents; 1 marks what is given, 0 what is to be generated
    patch_size: int = 2  # in height and width; 1 in time
    eps: float = 1e-6
    rope_theta: float = 10000.0
    pose_rope_offset: int = 120  # pose tokens sit 120 columns to the right of the video tokens

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the Wan 2.1 video VAE."""

    base_size: int = 96
    latent_channels: int = 16
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the UMT5 encoder; the defaults are umt5-xxl."""

    vocab_size: int = 256384
    hidden_size: int = 4096
    attention_size: int = 4096  # all heads together; not the hidden size in a small model
    ffn_size: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_length: int = 512


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of the CLIP visual tower; the defaults are ViT-H/14."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1280
    ffn_size: int = 5120
    num_heads: int = 16
    num_layers: int = 32


@dataclass(frozen=True)
class ModelConfig:
    """A whole SCAIL model; two models of ours differ in nothing but such numbers."""

    name: str = "SCAIL_14B"
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)


SCAIL_14B = ModelConfig()
SCAIL_TINY = ModelConfig(  # tests and the first demo, runs on a CPU; its weights are random
    name="SCAIL_TINY",
    transformer=replace(
        SCAIL_14B.transformer,
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        ffn_size=96,
        text_size=32,
        image_size=40,
        time_freq_size=64,
    ),
    vae=replace(SCAIL_14B.vae, base_size=4),
    text_encoder=replace(
        SCAIL_14B.text_encoder,
        vocab_size=384,
        hidden_size=32,
        attention_size=24,
        ffn_size=56,
        num_heads=3,
        num_layers=2,
    ),
    image_encoder=replace(
        SCAIL_14B.image_encoder, image_size=56, hidden_size=40, ffn_size=80, num_heads=4, num_layers=4
    ),
)

SCAIL_MINI = ModelConfig(  # the same network, trained by `scail.mini`; 20 MB in half precision
    name="SCAIL_MINI",
    transformer=replace(
        SCAIL_14B.transformer,
        num_layers=5,
        hidden_size=224,
        num_heads=4,
        ffn_size=384,
        text_size=64,
        image_size=64,
        time_freq_size=128,
    ),
    vae=replace(SCAIL_14B.vae, base_size=24, num_res_blocks=1),
    text_encoder=replace(
        SCAIL_14B.text_encoder,
        vocab_size=384,
        hidden_size=64,
        attention_size=64,
        ffn_size=128,
        num_heads=4,
        num_layers=2,
        max_length=128,
    ),
    image_encoder=replace(
        SCAIL_14B.image_encoder, image_size=112, hidden_size=64, ffn_size=128, num_heads=4, num_layers=3
    ),
)


@dataclass(frozen=True)
class SamplingParams:
    """How one clip is sampled; everything here changes its pixels."""

    num_inference_steps: int = 50
    guidance_scale: float = 4.0  # 1.0 or less: the unconditional pass is skipped
    shift: float = 5.0
    seed: int = 0
    solver: Solver = "euler"  # the official one; the others are of second order, for few steps


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to be fused into the transformer's weights."""

    path: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """`FILE:STRENGTH`, or `FILE` alone for a strength of 1."""
        path, colon, strength = text.strip().rpartition(":")
        try:
            number = float(strength) if colon else math.nan
        except ValueError:
            number = math.nan
        return cls(path, number) if math.isfinite(number) else cls(text.strip())

    @property
    def name(self) -> str:
        """File name and strength, for the record."""
        return f"{PurePath(self.path).name}:{self.strength:g}"

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}"


@dataclass(frozen=True)
class RuntimeConfig:
    """How a model is run on its device. The defaults change no number beyond the rounding of the dtype.

    Attributes:
        attention: A backend of `scail.models.attention`, or `float8` for the fastest in that precision; absent, and
            where that one does not fit the device or fails its check there: the fastest exact one that passes.
        quantization: `fp8` computes the blocks' matrix products in float8 (Hopper, Ada), `int8` in whole numbers
            (Ampere too). A checkpoint that is quantised already stays as it is.
        compiled: Fuse what lies between the matrix products; the first clip of a process waits for the compiler.
        memory: How much of the model stays on the device, see `scail.memory`; it changes no number. `auto` takes the
            fastest policy for which the device has room.
        loras: Fused into the weights while they are loaded, before they are quantised.
    """

    attention: str | None = None
    quantization: Quantization = "none"
    compiled: bool = False
    memory: MemoryPolicy = "auto"
    loras: tuple[LoraFile, ...] = ()


EXACT = RuntimeConfig()

OFFICIAL = SamplingParams()  # the official recipe


@dataclass(frozen=True)
class Profile:
    """A named way to render: how a clip is sampled, and what its arithmetic may cost in exactness.

    Attributes:
        sampling: A row of the manifest may replace single values.
        quantization: Of the transformer's matrix products; where the device cannot do it, they stay exact.
        attention: `float8`, likewise; exact if absent.
        step_distilled: Right only for weights into which a step-distilled LoRA was fused.
    """

    sampling: SamplingParams = OFFICIAL
    quantization: Quantization = "none"
    attention: str | None = None
    step_distilled: bool = False

    def applied_to(self, runtime: RuntimeConfig) -> RuntimeConfig:
        """`runtime` with this profile's arithmetic."""
        return replace(runtime, quantization=self.quantization, attention=self.attention)


_FLOAT8 = Profile(quantization="fp8", attention="float8")  # what each of them costs is in docs/fidelity.md

PROFILES: dict[str, Profile] = {
    "exact": Profile(),
    "quality": _FLOAT8,
    "fast": replace(
        _FLOAT8, sampling=replace(OFFICIAL, num_inference_steps=4, guidance_scale=1.0), step_distilled=True
    ),
}
DEFAULT_PROFILE = "exact"  # float8 products and attention together leave less than docs/fidelity.md asks of a default
