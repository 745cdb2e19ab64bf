"""The laws of the grids: SD3's own numbers, and diffusers' scheduler to the last bit that matters."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowopd.core import FlowSchedule, LinearSchedule, ShiftedSchedule

SD35 = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]


def test_ten_steps_of_the_shifted_grid_are_those_of_sd3():
    torch.testing.assert_close(ShiftedSchedule().sigmas(10), torch.tensor(SD35), atol=5e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 40])
def test_the_shifted_grid_is_that_of_diffusers(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(ShiftedSchedule(shift).sigmas(num_steps), scheduler.sigmas, atol=2e-7, rtol=0)


@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("mu", [None, 0.5, 1.15])
@pytest.mark.parametrize("num_steps", [2, 4, 10, 28])
def test_the_grid_of_equal_steps_is_that_of_diffusers(num_steps, mu, terminal):
    """By a constant shift, or by e^μ, stretched or not."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=mu is not None, shift_terminal=terminal)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
    ours = FlowSchedule(6.0 if mu is None else math.exp(mu), terminal)
    torch.testing.assert_close(ours.sigmas(num_steps), scheduler.sigmas, atol=2e-7, rtol=0)


def test_the_grid_of_equal_steps_is_not_sd3_s():
    """The trap: SD3 shifts twice, so that its last step starts at 0.009 instead of 0.25."""
    assert (FlowSchedule(3.0).sigmas(10) - ShiftedSchedule(3.0).sigmas(10)).abs().max() > 0.2


def test_the_linear_grid_has_equal_steps():
    torch.testing.assert_close(LinearSchedule().sigmas(8), 1 - torch.arange(9) / 8)


GRIDS = [
    LinearSchedule(),
    ShiftedSchedule(),
    ShiftedSchedule(1.0),
    ShiftedSchedule(6.0),
    FlowSchedule(),
    FlowSchedule(6.0),
    FlowSchedule(2.0, terminal=0.02),
]


@pytest.mark.parametrize("schedule", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_a_grid_falls_strictly_from_one_to_zero(schedule, num_steps):
    sigmas = schedule.sigmas(num_steps)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()
