"""Rectified flow: x = (1 - sigma) · data + sigma · noise, and the network predicts noise - data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scail.config import Solver
from scail.errors import GenerationError, InvalidInputError

NUM_TRAIN_TIMESTEPS = 1000

# latents, the velocity there and the number of the step → latents of the next noise level, in float32
Stepper = Callable[[Tensor, Tensor, int], Tensor]


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
    solver: Solver = "euler",
) -> Tensor:
    """Integrate from noise to latents along `sigmas`.

    Args:
        predict_velocity: Takes float32 latents and the timestep, a 0-dimensional float32 tensor on their device.
        noise: Float32 (B, C, F, H, W), where sigma is 1.
        sigmas: (N + 1,), from `flow_sigmas`.
        on_step: Called after each step with the steps done and N; what it raises ends the loop.
        solver: Euler's method, the official one, or one that also looks at the step before.

    Raises:
        GenerationError: If the result is not finite.
    """
    latents, sigmas = noise, sigmas.to(noise.device)
    num_steps = len(sigmas) - 1
    take_step = _STEPPERS[solver](sigmas)
    for step in range(num_steps):
        velocity = predict_velocity(latents, NUM_TRAIN_TIMESTEPS * sigmas[step])
        latents = take_step(latents, velocity, step)
        if on_step:
            on_step(step + 1, num_steps)
    if not torch.isfinite(latents).all():
        raise GenerationError(f"latents are not finite after {num_steps} steps.")
    return latents


def _euler(sigmas: Tensor) -> Stepper:
    return lambda latents, velocity, step: euler_step(latents, velocity, sigmas[step], sigmas[step + 1])


def _dpm_plus_plus(sigmas: Tensor) -> Stepper:
    """DPM-Solver++(2M) for rectified flow: the data that is seen now, extrapolated by what was seen one step before.

    Written without logarithms where noise is all or nothing, so that the first step needs no noise level of its own.
    The first and the last step are of first order.

    Source: Lu et al., DPM-Solver++, algorithm 2, with alpha = 1 - sigma.
    """
    levels = sigmas.tolist()
    before: list[Tensor] = []

    def take_step(latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        sigma, sigma_next = levels[step], levels[step + 1]
        data = latents - sigma * velocity
        extrapolated = data
        if before and sigma_next > 0:
            share = _log_step(sigma, sigma_next) / (2 * _log_step(levels[step - 1], sigma))
            extrapolated = data + share * (data - before[0])
        before[:] = [data]
        shrink = sigma_next / sigma
        return shrink * latents + (1 - sigma_next - shrink * (1 - sigma)) * extrapolated

    return take_step


def _log_step(sigma: float, sigma_next: float) -> float:
    """Growth of the logarithm of signal to noise; infinite from pure noise."""
    if sigma >= 1:
        return math.inf
    return math.log((1 - sigma_next) / sigma_next) - math.log((1 - sigma) / sigma)


def _unipc(sigmas: Tensor) -> Stepper:
    """UniPC of second order, of diffusers; on our noise levels, where its own start at 0.9998."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(sigmas=sigmas[:-1].cpu().double().numpy(), device=sigmas.device)
    scheduler.set_begin_index(0)

    def take_step(latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        out: Tensor = scheduler.step(velocity, scheduler.timesteps[step], latents, return_dict=False)[0]
        return out

    return take_step


_STEPPERS: dict[Solver, Callable[[Tensor], Stepper]] = {"euler": _euler, "dpm++": _dpm_plus_plus, "unipc": _unipc}
