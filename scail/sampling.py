"""Rectified flow: x = (1 - sigma) · data + sigma · noise, and the network predicts noise - data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from scail.errors import GenerationError, InvalidInputError

NUM_TRAIN_TIMESTEPS = 1000


def flow_sigmas(num_inference_steps: int, shift: float) -> Tensor:
    """Noise levels of a flow-matching schedule, shifted towards high noise.

    Args:
        num_inference_steps: Number of Euler steps N, at least 1.
        shift: Resolution shift; 1.0 leaves the schedule linear, SCAIL uses 5.0.

    Returns:
        Float32 tensor of shape (N + 1,), falling from 1.0 to 0.0.

    Raises:
        InvalidInputError: If `num_inference_steps` or `shift` is not positive.

    Source: `make_flow_timesteps` in zai-org/SCAIL, sgm/modules/diffusionmodules/sampling.py:888.
    """
    if num_inference_steps < 1:
        raise InvalidInputError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed.")
    if not shift > 0:
        raise InvalidInputError(f"shift is {shift}; it must be positive, 1 leaves the schedule as it is.")
    time = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)  # 0 is noise, 1 is data
    return 1 - (time / (shift - (shift - 1) * time)).float()  # this order of rounding gives the official bits


def guide(velocity_uncond: Tensor, velocity_cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, in float32."""
    return velocity_uncond + guidance_scale * (velocity_cond - velocity_uncond)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """From noise level `sigma` to `sigma_next`, in float32."""
    return latents + (sigma_next - sigma) * velocity


def denoise(
    predict_velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate from noise to latents along `sigmas` by Euler's method.

    Args:
        predict_velocity: Takes float32 latents and the timestep, a 0-dimensional float32 tensor on their device.
        noise: Float32 (B, C, F, H, W), where sigma is 1.
        sigmas: (N + 1,), from `flow_sigmas`.
        on_step: Called after each step with the steps done and N; what it raises ends the loop.

    Raises:
        GenerationError: If the result is not finite.
    """
    latents, sigmas = noise, sigmas.to(noise.device)
    num_steps = len(sigmas) - 1
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        velocity = predict_velocity(latents, NUM_TRAIN_TIMESTEPS * sigma)
        latents = euler_step(latents, velocity, sigma, sigma_next)
        if on_step:
            on_step(step + 1, num_steps)
    if not torch.isfinite(latents).all():
        raise GenerationError(f"latents are not finite after {num_steps} steps.")
    return latents
