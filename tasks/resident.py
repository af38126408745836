"""What stays in the process: the model, loaded by the first clip or before it, and the last clips' encodings.

A module of its own, without a `@task`: a task's function travels to a Dask worker by value when its module is not
installed there, and with it would travel an empty cache, so that every clip loaded the model again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from scail.config import DEFAULT_PROFILE, POLICIES, PROFILES, PlacementPolicy, RuntimeConfig
from tasks import thrift
from tasks.checkpoint import opened
from tasks.errors import RefusedError
from tasks.settings import Settings

if TYPE_CHECKING:
    import torch

    from scail import ScailPipeline
    from scail.encodings import EncodingCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline that may be resident.

    Attributes:
        checkpoint: A checkpoint folder, or its URI.
        fingerprint: What the fingerprint of the folder and the LoRAs must be.
        device: `auto`, or a torch device.
        dtype: `auto`, `bfloat16` or `float32`.
        runtime: How it runs; a quantisation that the device is not fast at is left out.
    """

    checkpoint: str
    fingerprint: str
    device: str
    dtype: str
    runtime: RuntimeConfig

    def on_the_exact_path(self) -> PipelineSpec:
        """The same weights in the same place, with PyTorch's own attention, nothing compiled and nothing rounded."""
        exact = replace(self.runtime, attention="sdpa", compiled=False, quantization="none")
        return replace(self, runtime=exact)


def pipeline_spec(
    checkpoint: str, fingerprint: str, *, profile: str = DEFAULT_PROFILE, settings: Settings
) -> PipelineSpec:
    """The pipeline for a clip of a profile, as this machine's settings and its memory allow."""
    runtime = RuntimeConfig(compiled=settings.compiled, memory=room.policy or settings.memory, loras=settings.loras())
    return PipelineSpec(checkpoint, fingerprint, settings.device, settings.dtype, PROFILES[profile].applied_to(runtime))


class ResidentPipeline:
    """Keeps the pipeline used last. Another one is loaded only when this one has left the device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spec: PipelineSpec | None = None
        self._pipeline: ScailPipeline | None = None

    def __call__(self, spec: PipelineSpec) -> ScailPipeline:
        """The pipeline; a second call with the same spec costs nothing. Call it when no clip computes.

        Raises:
            CheckpointError: If the folder cannot be loaded or holds another model.
            OutOfMemoryError: If it does not fit on the device.
            StorageError: If it lies in a bucket and cannot be fetched.
        """
        with self._lock:
            if self._pipeline is None or spec != self._spec:
                self._drop()
                self._pipeline = _load(spec)
                self._spec = spec
                thrift.keep()
            return self._pipeline

    def cache_clear(self) -> None:
        """Let go of it."""
        with self._lock:
            self._drop()

    @property
    def policy(self) -> PlacementPolicy | None:
        """Under which it is placed; None without one."""
        return None if self._pipeline is None else self._pipeline.memory

    def _drop(self) -> None:
        if self._pipeline is not None:
            self._pipeline = self._spec = None
            _empty_device_cache()


load_pipeline = ResidentPipeline()


def _load(spec: PipelineSpec) -> ScailPipeline:
    from scail import CheckpointError, ScailPipeline
    from scail.pipeline import attainable

    settings, runtime = Settings(), spec.runtime
    start = time.perf_counter()
    with opened(spec.checkpoint, runtime.loras, settings) as checkpoint:
        folder = checkpoint.folder
        if checkpoint.fingerprint != spec.fingerprint:
            loras = f" with LoRA {', '.join(map(str, runtime.loras))}" if runtime.loras else ""
            raise CheckpointError(
                f"{folder}{loras} has the fingerprint {checkpoint.fingerprint} on this machine; expected "
                f"{spec.fingerprint}. Checkpoint and SCAIL_LORA are those of whoever planned the clips."
            )
        keep_compiled(settings.cache_dir)
        device, dtype = choose_device(spec.device, spec.dtype)
        runtime = attainable(runtime, folder, device)
        pipeline = ScailPipeline.from_pretrained(
            folder, device=device, dtype=dtype, runtime=runtime, wait_for=checkpoint.wait_for
        )
    logger.info(
        "loaded %s on %s as %s, %s, %s in %.1f s",
        folder,
        device,
        dtype,
        pipeline.quantization,
        pipeline.memory,
        time.perf_counter() - start,
    )
    return pipeline


class Room:
    """What this process has learned about its device's memory.

    After a clip found too little, it is tried again with all that can be freed; if that is not enough, the next
    cheaper memory policy is taken, for this clip and all that follow.

    Attributes:
        policy: That was fallen back to; None while that of the settings does.
        note: For the metrics of the clips that are rendered under it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take the policy of the settings again."""
        self.policy: PlacementPolicy | None = None
        self.note: str | None = None
        self._failures = 0

    def was_too_small(self) -> None:
        """Make more of it."""
        self._failures += 1
        policy = load_pipeline.policy or self.policy or POLICIES[0]
        cheaper = POLICIES[POLICIES.index(policy) + 1 :]
        if self._failures > 1 and cheaper:
            self.policy = cheaper[0]
            self.note = f"out of memory as {policy}: {self.policy} since"
            logger.warning("out of device memory twice as %s: this process goes on as %s", policy, self.policy)
            load_pipeline.cache_clear()
        release_memory()

    def was_enough(self) -> None:
        self._failures = 0


room = Room()


def keep_compiled(cache_dir: Path) -> None:
    """Let the compilers keep their work where the next worker of this machine finds it; whoever set a place has it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "compiled"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "compiled" / "triton"))


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `auto` means here: a GPU in bfloat16 if there is one, otherwise the CPU in float32."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if device.startswith("cuda"):
        check_visible_gpus()
    return torch.device(device), getattr(torch, dtype)


def check_visible_gpus() -> None:
    """CUDA reads once, when a process first looks at a GPU, which GPUs it may see; importing our kernels does that.

    Raises:
        RefusedError: If the variable came later: workers that were given a GPU each would share the first one.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not torch.cuda.is_available():  # whoever needs a GPU that is not there says so better
        return
    # Not torch's count, which goes by the variable as it is now.
    if (found := torch._C._cuda_getDeviceCount()) > len(named.split(",")):
        raise RefusedError(
            f"CUDA_VISIBLE_DEVICES is {named!r}, but CUDA sees {found} GPUs: "
            "it was loaded before the variable was set. Import torch and scail's pipeline inside functions of the "
            "script that starts the workers"
        )


@lru_cache(maxsize=1)
def load_encodings(fingerprint: str, max_bytes: int) -> EncodingCache:  # noqa: ARG001 another model, other encodings
    """The resident encodings of a model; for the clip whose turn on the GPU it is."""
    from scail.encodings import EncodingCache

    return EncodingCache(max_bytes)


def release_memory() -> None:
    """Give back to the GPU what no clip holds."""
    load_encodings.cache_clear()
    _empty_device_cache()


def _empty_device_cache() -> None:
    import torch

    thrift.collect_all()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
