"""What a figure of the benchmark is held against, measured on the same device in the same run.

Ceilings are what one operation reaches alone; peers are diffusers' networks of the same sizes at the same work.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from scail.config import TransformerConfig
from scail.kernels.reference import FLOAT8
from scail.models.attention import BACKENDS

PEER_LAYERS = 3  # of 40: a layer is a layer, and the rest of the network is nothing beside them


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 9, warm_up: int = 2) -> float:
    """Median time of a call, the device's queue empty before and after."""
    times = []
    for _ in range(warm_up + repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most memory of a GPU that is held while a call runs, what was held before it included; None on a CPU."""
    if device.type != "cuda":
        return None
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) / 1024**3


def release(device: torch.device) -> None:
    """Give back what is no longer used: what was measured before is not to be held against what comes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flop_per_second(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of the MLP's first matrix product, the largest one of a block."""
    rows = _num_rows(device)
    x = torch.randn(rows, config.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(config.ffn_size, config.hidden_size, device=device, dtype=dtype)
    seconds = median_seconds(lambda: F.linear(x, weight), device)
    return 2 * rows * config.hidden_size * config.ffn_size / seconds


def float8_flop_per_second(config: TransformerConfig, device: torch.device) -> float | None:
    """The same in float8 with a scale for each row; None where the device has none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    rows = _num_rows(device)
    x = torch.randn(rows, config.hidden_size, device=device).to(FLOAT8)
    weight = torch.randn(config.ffn_size, config.hidden_size, device=device).to(FLOAT8).t()
    row_scales = torch.ones(rows, 1, device=device)
    column_scales = torch.ones(1, config.ffn_size, device=device)

    def multiply() -> Tensor:
        return torch._scaled_mm(x, weight, row_scales, column_scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * rows * config.hidden_size * config.ffn_size / median_seconds(multiply, device)


def attention_flop_per_second(
    config: TransformerConfig, length: int, backend: str, device: torch.device, dtype: torch.dtype
) -> float:
    """Rate of one self-attention over all tokens of a clip."""
    query, key, value = (
        torch.randn(1, length, config.num_heads, config.head_size, device=device, dtype=dtype) for _ in range(3)
    )
    seconds = median_seconds(lambda: BACKENDS[backend](query, key, value), device, repeats=3, warm_up=1)
    return 4 * length * length * config.hidden_size / seconds


@torch.inference_mode()
def library_forward_seconds(
    config: TransformerConfig, length: int, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> float:
    """One forward of diffusers' Wan transformer over `length` tokens; timed with few layers and scaled to all."""
    num_layers = min(PEER_LAYERS, config.num_layers)
    with torch.device(device):
        network = WanTransformer3DModel(
            patch_size=(1, config.patch_size, config.patch_size),
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_size,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            text_dim=config.text_size,
            freq_dim=config.time_freq_size,
            ffn_dim=config.ffn_size,
            num_layers=num_layers,
            image_dim=config.image_size,
            added_kv_proj_dim=config.hidden_size,
        )
    network.to(dtype).eval()
    if compiled:
        network.compile_repeated_blocks()
    rows = max(divisor for divisor in range(1, math.isqrt(length) + 1) if length % divisor == 0)
    grid = (1, config.latent_channels, 1, rows * config.patch_size, length // rows * config.patch_size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    latents, text, image = draw(*grid), draw(1, 512, config.text_size), draw(1, 257, config.image_size)
    timestep = torch.tensor([500.0], device=device)

    def forward() -> object:
        return network(latents, timestep, text, image, return_dict=False)

    return median_seconds(forward, device, repeats=3, warm_up=1) / num_layers * config.num_layers


def _num_rows(device: torch.device) -> int:
    return 32768 if device.type == "cuda" else 1024
