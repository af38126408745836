"""Every shortcut that we offer, as data: in what it differs from the exact path. A new one is a line.

The exact path is float32 throughout, PyTorch's own attention, nothing compiled, nothing quantised, Euler's method in
the recipe's number of steps, the library's pass through the VAE, every encoding made anew, everything resident, one
process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scail.config import DEFAULT_PROFILE, PROFILES, RuntimeConfig
from scail.models.attention import BACKENDS, EXACT

Precision = Literal["float32", "bfloat16"]

PLAIN = RuntimeConfig(attention="sdpa", memory="resident")
DEFAULT_PRECISION: Precision = "bfloat16"  # of `ScailPipeline.from_pretrained`, and of `SCAIL_DTYPE=auto` on a GPU


@dataclass(frozen=True)
class Shortcut:
    """What differs from the exact path.

    Attributes:
        runtime: Fields of `RuntimeConfig`.
        sampling: Fields of `SamplingParams`.
        vae_precision: Of the VAE alone.
        own_vae: Our pass through the VAE, in pieces, instead of the library's.
        cached: The encodings are those of an earlier render.
        num_processes: That share the clips.
        needs_gpu: It does not run on a CPU, or is nothing there.
    """

    name: str
    group: str
    precision: Precision = "float32"
    runtime: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    vae_precision: Precision | None = None
    own_vae: bool = False
    cached: bool = False
    num_processes: int = 1
    needs_gpu: bool = False

    def runtime_config(self) -> RuntimeConfig:
        return replace(PLAIN, **self.runtime)

    @property
    def is_default(self) -> bool:
        """Whether whoever sets nothing gets it: on a GPU, with the default profile."""
        profile = PROFILES[DEFAULT_PROFILE]
        defaults = {**vars(RuntimeConfig()), "quantization": profile.quantization}
        return (
            self.num_processes == 1
            and self.precision in ("float32", DEFAULT_PRECISION)
            and (self.vae_precision or DEFAULT_PRECISION) == DEFAULT_PRECISION
            and all(getattr(profile.sampling, name) == value for name, value in self.sampling.items())
            and all(_may_be_chosen(name, value, defaults[name]) for name, value in self.runtime.items())
        )


def _may_be_chosen(name: str, value: Any, default: Any) -> bool:
    """Whether a field of RuntimeConfig has this value by default, or may get it where the default is to choose."""
    if name == "attention":
        return value in (None, *EXACT)
    return value == default or (name == "memory" and default == "auto")


SHORTCUTS = (
    *(Shortcut(f"{num} steps", "steps", sampling={"num_inference_steps": num}) for num in (32, 16, 8, 4)),
    *(
        Shortcut(f"{num} steps, {solver}", "solvers", sampling={"num_inference_steps": num, "solver": solver})
        for solver in ("dpm++", "unipc")
        for num in (32, 16, 8)
    ),
    Shortcut("no guidance", "guidance", sampling={"guidance_scale": 1.0}),
    Shortcut("encodings kept from an earlier clip", "sharing", cached=True),
    Shortcut("two processes share the clips", "sharing", num_processes=2),
    Shortcut("our VAE pass, streamed", "VAE", own_vae=True),
    Shortcut("VAE in bfloat16", "VAE", vae_precision="bfloat16"),
    Shortcut("our VAE pass, streamed, in bfloat16", "VAE", own_vae=True, vae_precision="bfloat16"),
    Shortcut("bfloat16", "precision", precision="bfloat16"),
    *(
        Shortcut(f"bfloat16, {kind} products", "precision", precision="bfloat16", runtime={"quantization": kind})
        for kind in ("fp8", "int8")
    ),
    *(
        Shortcut(f"bfloat16, {name}", "attention", precision="bfloat16", runtime={"attention": name}, needs_gpu=True)
        for name in BACKENDS
        if name != "sdpa"
    ),
    Shortcut("bfloat16, compiled", "compiler", precision="bfloat16", runtime={"compiled": True}, needs_gpu=True),
    *(
        Shortcut(f"bfloat16, {policy}", "memory", precision="bfloat16", runtime={"memory": policy}, needs_gpu=True)
        for policy in ("balanced", "low")
    ),
    Shortcut(
        "as installed",
        "together",
        precision="bfloat16",
        runtime={"attention": None, "memory": "auto"},
        own_vae=True,
        cached=True,
        needs_gpu=True,
    ),
    Shortcut(
        "as installed, profile quality: fp8 products and attention",
        "together",
        precision="bfloat16",
        runtime={"attention": "flash_attention_3_float8", "quantization": "fp8"},
        own_vae=True,
        cached=True,
        needs_gpu=True,
    ),
)
