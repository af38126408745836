"""SCAIL: one reference image and one pose video become one clip.

Public are the names below and nothing else. They are imported on first use, so that a process that only plans,
and needs no more than the errors and the sampling parameters, never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scail.config import PROFILES, RuntimeConfig, SamplingParams
from scail.errors import (
    CheckpointError,
    EncodeError,
    GenerationError,
    Interrupted,
    InvalidInputError,
    OutOfMemoryError,
    ScailError,
)
from scail.types import ScailOutput

if TYPE_CHECKING:
    from scail.pipeline import ScailPipeline

__version__ = "0.1.0"
__all__ = [
    "PROFILES",
    "CheckpointError",
    "EncodeError",
    "GenerationError",
    "Interrupted",
    "InvalidInputError",
    "OutOfMemoryError",
    "RuntimeConfig",
    "SamplingParams",
    "ScailError",
    "ScailOutput",
    "ScailPipeline",
]


def __getattr__(name: str) -> Any:
    if name == "ScailPipeline":
        from scail.pipeline import ScailPipeline

        return ScailPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
