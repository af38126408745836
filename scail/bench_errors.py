"""How far each fast path is from the exact one: a forward, and the latents at the end of a whole trajectory.

Few layers of the real network stand for all: how errors add up over forty of them, each with gates of its own, only
the whole network on trained weights would tell; what each path rounds, and what a sampler makes of it, they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scail.bench import random_conditioning, random_pipeline, random_transformer
from scail.bench_goals import Row, Workload
from scail.config import OFFICIAL, Quantization, RuntimeConfig
from scail.models.attention import FLOAT8_BACKENDS, fits
from scail.pipeline import ScailPipeline, prepare_transformer, seeded_noise
from scail.quantization import is_fast_on
from scail.sampling import flow_sigmas
from scail.types import Conditioning, LatentShape

NUM_LAYERS = 4


@dataclass(frozen=True)
class FastPath:
    """One way to compute the network.

    Attributes:
        name: For the row.
        quantization: Of the matrix products.
        attention: Of the self-attention; absent: the fastest exact one.
    """

    name: str
    quantization: Quantization = "none"
    attention: str | None = None


@torch.inference_mode()
def error_rows(work: Workload) -> list[Row]:
    """Relative errors of every path that this device is made for, in percent, against its exact one.

    The exact one has the dtype of the run, PyTorch's own attention and is not compiled.
    """
    few = replace(work.config.transformer, num_layers=min(NUM_LAYERS, work.config.transformer.num_layers))
    config = replace(work.config, transformer=few)
    pipeline = random_pipeline(config, device=work.device, dtype=work.dtype, runtime=RuntimeConfig(attention="sdpa"))
    torch.manual_seed(0)  # of the conditioning; the weights have a seed of their own
    sides = [random_conditioning(config, work.shape, work.device, work.dtype) for _ in range(2)]
    exact = _computed(pipeline, work.shape, *sides)
    note = f"{few.num_layers} layers of random weights, {work.num_frames} frames of {work.height} x {work.width}"
    rows = []
    for path in _paths(work):
        runtime = RuntimeConfig(attention=path.attention, quantization=path.quantization, compiled=work.compiled)
        transformer = random_transformer(config, work.device, work.dtype, path.quantization)
        attention = prepare_transformer(transformer, work.device, work.dtype, runtime)
        forward, latents = _computed(
            replace(pipeline, transformer=transformer, attention=attention), work.shape, *sides
        )
        steps = OFFICIAL.num_inference_steps
        rows += [
            Row(f"error of a forward, {path.name}", "%", 100 * relative(forward, exact[0]), note=note),
            Row(f"error after {steps} steps, {path.name}", "%", 100 * relative(latents, exact[1]), note=note),
        ]
    return rows


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def _paths(work: Workload) -> Iterator[FastPath]:
    yield FastPath("compiled" if work.compiled else "fastest attention")
    kinds: tuple[Quantization, ...] = ("fp8", "int8")
    for kind in kinds:
        if work.device.type == "cpu" or is_fast_on(work.device, kind):
            yield FastPath(f"{kind} products", kind)
    for attention in FLOAT8_BACKENDS:
        if fits(attention, work.device, work.dtype):
            yield FastPath("float8 attention", attention=attention)
            yield FastPath("fp8 products, float8 attention", "fp8", attention)


def _computed(
    pipeline: ScailPipeline, shape: LatentShape, conditioning: Conditioning, other: Conditioning
) -> tuple[Tensor, Tensor]:
    """Velocity of pure noise, and what the official recipe makes of it under another text on the other side."""
    noise = seeded_noise(shape, 0).to(pipeline.device)
    prepared = pipeline.transformer.prepare(conditioning)
    forward = pipeline.transformer(noise.to(pipeline.dtype), torch.tensor([1000.0], device=pipeline.device), prepared)
    latents = pipeline.generate(
        conditioning,
        other.context,
        noise,
        flow_sigmas(OFFICIAL.num_inference_steps, OFFICIAL.shift),
        guidance_scale=OFFICIAL.guidance_scale,
    )
    return forward, latents
