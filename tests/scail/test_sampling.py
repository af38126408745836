from __future__ import annotations

import math

import pytest
import torch

from scail.errors import GenerationError, Interrupted, InvalidInputError
from scail.sampling import denoise, flow_sigmas, guide

SHAPE = (1, 16, 3, 4, 6)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data() -> torch.Tensor:
    return 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_sigmas_fall_from_one_to_zero(num_steps, shift):
    sigmas = flow_sigmas(num_steps, shift)

    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_a_shift_of_one_is_linear():
    torch.testing.assert_close(flow_sigmas(10, 1.0), torch.linspace(1, 0, 11), rtol=0, atol=1e-6)


def test_a_larger_shift_stays_longer_at_high_noise():
    low, high = flow_sigmas(10, 3.0), flow_sigmas(10, 5.0)

    assert (high[1:-1] > low[1:-1]).all()
    assert high[5] == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_schedule_without_steps_is_refused(num_steps):
    with pytest.raises(InvalidInputError, match=f"num_inference_steps is {num_steps}"):
        flow_sigmas(num_steps, 5.0)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_the_exact_velocity_recovers_the_data(num_steps, noise, data):
    latents = denoise(lambda _latents, _timestep: noise - data, noise, flow_sigmas(num_steps, 5.0))

    torch.testing.assert_close(latents, data, rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_timesteps_are_a_thousand_times_the_noise_in_the_latents(num_steps, noise, data):
    def predict_velocity(latents, timestep):
        sigma = timestep / 1000
        torch.testing.assert_close(latents, (1 - sigma) * data + sigma * noise, rtol=0, atol=1e-4)
        return (latents - data) / sigma

    latents = denoise(predict_velocity, noise, flow_sigmas(num_steps, 5.0))

    torch.testing.assert_close(latents, data, rtol=0, atol=1e-4)


def test_timesteps_are_not_rounded_and_zero_is_never_asked_for(noise):
    timesteps = []

    def predict_velocity(latents, timestep):
        timesteps.append(timestep)
        return torch.zeros_like(latents)

    denoise(predict_velocity, noise, flow_sigmas(8, 5.0))

    assert all(timestep.shape == () and timestep.dtype == torch.float32 for timestep in timesteps)
    assert timesteps[1].item() == pytest.approx(972.2222, abs=1e-3)
    assert min(timesteps) > 0


def test_the_noise_given_is_left_as_it_is(noise, data):
    before = noise.clone()

    denoise(lambda _latents, _timestep: noise - data, noise, flow_sigmas(4, 5.0))

    assert torch.equal(noise, before)


def test_on_step_is_called_once_after_every_step(noise):
    events: list[str | tuple[int, int]] = []

    def predict_velocity(latents, _timestep):
        events.append("velocity")
        return torch.zeros_like(latents)

    denoise(predict_velocity, noise, flow_sigmas(3, 5.0), lambda done, total: events.append((done, total)))

    assert events == ["velocity", (1, 3), "velocity", (2, 3), "velocity", (3, 3)]


def test_what_on_step_raises_ends_the_loop_at_once(noise):
    asked = []

    def predict_velocity(latents, timestep):
        asked.append(timestep)
        return torch.zeros_like(latents)

    def stop_after_two(done, _total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        denoise(predict_velocity, noise, flow_sigmas(50, 5.0), stop_after_two)
    assert len(asked) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_an_error(noise, value):
    def predict_velocity(latents, _timestep):
        velocity = torch.zeros_like(latents)
        velocity[0, 3, 1, 2, 1] = value
        return velocity

    with pytest.raises(GenerationError, match="not finite after 4 steps"):
        denoise(predict_velocity, noise, flow_sigmas(4, 5.0))


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional_velocity(noise, data):
    torch.testing.assert_close(guide(noise, data, 1.0), data, rtol=0, atol=1e-6)
    assert torch.equal(guide(noise, data, 0.0), noise)


def test_guidance_goes_on_beyond_the_conditional_velocity(noise, data):
    torch.testing.assert_close(guide(noise, data, 4.0) - data, 3 * (data - noise), rtol=0, atol=1e-5)


def test_guidance_cannot_move_what_both_sides_agree_on(noise):
    assert torch.equal(guide(noise, noise, 7.5), noise)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 20])
def test_every_solver_recovers_the_data_of_the_exact_velocity(solver, num_steps, noise, data):
    latents = denoise(lambda _latents, _timestep: noise - data, noise, flow_sigmas(num_steps, 5.0), solver=solver)

    torch.testing.assert_close(latents, data, rtol=0, atol=2e-4)  # UniPC begins at 1 - 1e-6


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_a_solver_of_second_order_needs_fewer_steps_than_euler(solver, noise):
    def velocity(latents, timestep):  # of data that are Gaussian with deviation 0.5: x0 = x · 0.25 α / (0.25 α² + σ²)
        sigma = timestep / 1000
        alpha = 1 - sigma
        seen = latents * 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
        return (latents - seen) / sigma

    errors = {
        name: float((denoise(velocity, noise, flow_sigmas(24, 3.0), solver=name) - 0.5 * noise).norm())
        for name in ("euler", solver)
    }

    assert errors[solver] < 0.2 * errors["euler"]


def test_solvers_ask_at_the_same_noise_levels(noise, data):
    asked = {}
    for solver in ("euler", "dpm++", "unipc"):
        asked[solver] = []
        denoise(
            lambda _latents, timestep, solver=solver: asked[solver].append(float(timestep)) or noise - data,
            noise,
            flow_sigmas(6, 5.0),
            solver=solver,
        )

    assert asked["dpm++"] == asked["unipc"] == asked["euler"]
