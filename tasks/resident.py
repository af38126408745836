"""What stays in the process: the model, loaded by the first clip or before it, and the last clips' encodings.

A module of its own, without a `@task`: a task's function travels to a Dask worker by value when its module is not
installed there, and with it would travel an empty cache, so that every clip loaded the model again.
"""

from __future__ import annotations

import gc
import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from scail import ScailPipeline
    from scail.encodings import EncodingCache

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def load_pipeline(checkpoint: str, fingerprint: str, device: str, dtype: str, compiled: bool = False) -> ScailPipeline:
    """The resident pipeline; a second call with the same arguments costs nothing.

    Args:
        checkpoint: A local checkpoint folder.
        fingerprint: What the folder's fingerprint must be.
        device: `auto`, or a torch device.
        dtype: `auto`, `bfloat16` or `float32`.
        compiled: Let the compiler fuse the transformer's blocks; the first clip waits for it.

    Raises:
        CheckpointError: If the folder cannot be loaded or holds another model.
    """
    from scail import CheckpointError, ScailPipeline
    from scail.config import RuntimeConfig
    from scail.fingerprint import checkpoint_fingerprint

    if (found := checkpoint_fingerprint(Path(checkpoint))) != fingerprint:
        raise CheckpointError(f"{checkpoint} on this machine has the fingerprint {found}; expected {fingerprint}.")
    start = time.perf_counter()
    torch_device, torch_dtype = choose_device(device, dtype)
    pipeline = ScailPipeline.from_pretrained(
        checkpoint, device=torch_device, dtype=torch_dtype, runtime=RuntimeConfig(compiled=compiled)
    )
    logger.info("loaded %s on %s as %s in %.1f s", checkpoint, device, torch_dtype, time.perf_counter() - start)
    return pipeline


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `auto` means here: a GPU in bfloat16 if there is one, otherwise the CPU in float32."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return torch.device(device), getattr(torch, dtype)


@lru_cache(maxsize=1)
def load_encodings(fingerprint: str, max_bytes: int) -> EncodingCache:  # noqa: ARG001 another model, other encodings
    """The resident encodings of a model; for the clip whose turn on the GPU it is."""
    from scail.encodings import EncodingCache

    return EncodingCache(max_bytes)


def release_memory() -> None:
    """Give back to the GPU what no clip holds."""
    import torch

    load_encodings.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
