"""Measures a render of random weights: every stage of a clip, one forward of the transformer, the memory.

Speed does not depend on the numbers in the weights, so that the 14B can be measured where nobody can download it.
Every figure is reported beside the ceiling of this very device, measured in the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scail.bench_peers import matmul_flop_per_second, median_seconds
from scail.checkpoint import on_meta
from scail.config import EXACT, ModelConfig, Quantization, RuntimeConfig, SamplingParams, TransformerConfig
from scail.memory import Placement
from scail.mini.motion import joints_of_motion
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import TextEncoder
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.pipeline import ScailPipeline, prepare_transformer
from scail.pose.render import render_pose
from scail.pose.skeleton import PoseSequence
from scail.quantization import quantize_blocks
from scail.types import Conditioning, LatentShape, num_tokens


def bench_clip(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_frames: int,
    height: int,
    width: int,
    num_steps: int,
    runtime: RuntimeConfig = EXACT,
    pipeline: ScailPipeline | None = None,
) -> dict[str, Any]:
    """Render one clip twice, and measure the second; with `pipeline`, if there is one of these sizes already.

    Returns:
        Seconds by stage, seconds and FLOP of one forward, its rate against the device's best matrix product, the
        peak memory: plain numbers, ready for JSON.
    """
    pipeline = pipeline or random_pipeline(config, device=device, dtype=dtype, runtime=runtime)
    reference, pose = random_frames(num_frames, height, width)
    params = SamplingParams(num_inference_steps=num_steps)
    outputs = [  # the first one compiles, picks convolution algorithms and fills the allocator
        pipeline(reference, pose, "a dancer in the rain", params=params, size=(height, width)) for _ in range(2)
    ]
    output = outputs[-1]
    shape = LatentShape.of_clip(num_frames, height, width)
    forward_seconds = output.seconds["denoise"] / (2 * num_steps)  # two guidance passes; one `prepare` is in it
    ceiling = matmul_flop_per_second(config.transformer, device, dtype)
    flop = forward_flop(config.transformer, shape)
    return {
        "model": config.name,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "clip": {"num_frames": num_frames, "height": height, "width": width, **asdict(params)},
        "num_tokens": num_tokens(config.transformer, shape),
        "attention": pipeline.attention,
        "memory": pipeline.memory,
        "runtime": asdict(runtime) | {"loras": list(map(str, runtime.loras))},
        "seconds": output.seconds,
        "first_clip_extra_seconds": sum(outputs[0].seconds.values()) - sum(output.seconds.values()),
        "forward_seconds": forward_seconds,
        "forward_flop": flop,
        "forward_flop_per_second": flop / forward_seconds,
        "matmul_flop_per_second": ceiling,
        "share_of_matmul_ceiling": flop / forward_seconds / ceiling,
        "peak_memory_gib": output.peak_memory_gib,
        "frames_finite": bool(torch.isfinite(output.latents).all()),
    }


def bench_pose(*, device: torch.device, num_frames: int = 65, height: int = 512, width: int = 896) -> dict[str, Any]:
    """Milliseconds a frame of the pose renderer, one walking person; the median of three clips."""
    frames_per_chunk = num_frames if device.type == "cuda" else 32  # a GPU wants the whole clip at once
    joints = joints_of_motion("walk", num_frames, cycles=2.0, centre=(0.0, 0.0, 2600.0))
    sequence = PoseSequence(joints[:, None], height, width)
    seconds = median_seconds(
        lambda: render_pose(sequence, device=device, frames_per_chunk=frames_per_chunk), device, repeats=3
    )
    return {
        "device": device_name(device),
        "clip": {"num_frames": num_frames, "height": height, "width": width, "frames_per_chunk": frames_per_chunk},
        "milliseconds_per_frame": 1000 * seconds / num_frames,
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def random_frames(num_frames: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A reference (H, W, 3) and a pose video (F, H, W, 3) of noise."""
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (height, width, 3), np.uint8)
    return reference, rng.integers(0, 256, (num_frames, height, width, 3), np.uint8)


def random_pipeline(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, runtime: RuntimeConfig = EXACT
) -> ScailPipeline:
    """A pipeline of the given sizes whose weights are drawn on the device; deterministic for each kind of device."""
    transformer = random_transformer(config, device, dtype, runtime.quantization)
    vae = _randomised(lambda: VideoVae.from_config(config.vae), device, dtype)
    text_encoder = _randomised(lambda: TextEncoder.from_config(config.text_encoder), device, dtype)
    image_encoder = _randomised(lambda: ImageEncoder.from_config(config.image_encoder), device, dtype)
    placement = Placement(
        transformer,
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        device=device,
        policy=runtime.memory,
    )
    placement.pin()
    return ScailPipeline(
        transformer=transformer,
        attention=prepare_transformer(transformer, device, dtype, runtime),
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        quantization=runtime.quantization,
        placement=placement,
        tokenizer=FixedTokens(config.text_encoder.max_length, config.text_encoder.vocab_size),
        device=device,
        dtype=dtype,
    )


def random_transformer(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, quantization: Quantization = "none"
) -> ScailTransformer:
    """The network of `random_pipeline`, everything on the device."""
    transformer: ScailTransformer = _randomised(lambda: ScailTransformer(config.transformer), device, dtype)
    if quantization != "none":
        quantize_blocks(transformer, quantization)
    return transformer


def random_vae(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> VideoVae:
    """A VAE of random weights, as `random_pipeline` has it."""
    vae: VideoVae = _randomised(lambda: VideoVae.from_config(config.vae), device, dtype)
    return vae


def random_conditioning(
    config: ModelConfig, shape: LatentShape, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Encodings of nothing, of the shapes that a clip's have."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    image = config.image_encoder
    return Conditioning(
        context=draw(1, config.text_encoder.max_length, config.transformer.text_size),
        image_embeds=draw(1, 1 + (image.image_size // image.patch_size) ** 2, config.transformer.image_size),
        reference_latents=draw(1, 16, 1, shape.height, shape.width),
        pose_latents=draw(1, 16, shape.num_frames, shape.height // 2, shape.width // 2),
    )


class FixedTokens:
    """Stands in for the tokenizer, whose files come with the weights: one token for each character."""

    def __init__(self, max_length: int, vocab_size: int) -> None:
        self.max_length, self.vocab_size = max_length, vocab_size

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        ids = [ord(character) % self.vocab_size for character in prompt][: self.max_length]
        token_ids = torch.zeros(1, self.max_length, dtype=torch.int64)
        token_ids[0, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return token_ids, (torch.arange(self.max_length) < len(ids)).long()[None]


def forward_flop(config: TransformerConfig, shape: LatentShape) -> float:
    """Multiplications and additions of one forward; keys and values of the cross-attentions are not part of it."""
    length = num_tokens(config, shape)
    num_video = shape.num_frames * shape.height * shape.width // config.patch_size**2
    last = _block_flop(config, length, num_queries=num_video)
    return float((config.num_layers - 1) * _block_flop(config, length, num_queries=length) + last)


def linear_flop(config: TransformerConfig, shape: LatentShape) -> float:
    """The part of it that is matrix products with weights; the rest is attention."""
    length = num_tokens(config, shape)
    num_video = shape.num_frames * shape.height * shape.width // config.patch_size**2
    last = _block_linear_flop(config, length, num_queries=num_video)
    return float((config.num_layers - 1) * _block_linear_flop(config, length, num_queries=length) + last)


def _block_flop(config: TransformerConfig, length: int, *, num_queries: int) -> int:
    num_context = 512 + 257
    attentions = 4 * num_queries * config.hidden_size * (length + num_context)
    return _block_linear_flop(config, length, num_queries=num_queries) + attentions


def _block_linear_flop(config: TransformerConfig, length: int, *, num_queries: int) -> int:
    size = config.hidden_size
    return 2 * length * size * 3 * size + 2 * num_queries * size * (3 * size + 2 * config.ffn_size)


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    total = sum(result["seconds"].values())
    lines = [f"{result['model']} on {result['device']}, {result['dtype']}, {result['num_tokens']} tokens"]
    lines += [f"{stage:<16} {taken:8.2f} s {taken / total:6.1%}" for stage, taken in result["seconds"].items()]
    lines += [
        f"{'one forward':<16} {result['forward_seconds']:8.2f} s, {result['share_of_matmul_ceiling']:.0%} of the "
        f"{result['matmul_flop_per_second'] / 1e12:.1f} TFLOP/s that a matrix product reaches here",
        f"{'peak memory':<16} {result['peak_memory_gib']:8.1f} GiB",
    ]
    if pose := result.get("pose"):
        lines.append(f"{'pose renderer':<16} {pose['milliseconds_per_frame']:8.2f} ms a frame")
    return "\n".join(lines)


def to_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2) + "\n"


def _randomised(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    module = on_meta(build)
    generator = torch.Generator(device).manual_seed(0)
    state = {
        name: _random_weight(name, torch.empty(parameter.shape, device=device, dtype=dtype), generator)
        for name, parameter in module.state_dict().items()
    }
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device)


def _random_weight(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    if name.endswith("bias"):
        return weight.zero_()
    if "norm" in name or "gamma" in name:
        return weight.fill_(1.0)
    return weight.normal_(std=(weight.numel() // weight.shape[0]) ** -0.5, generator=generator)
