"""The laws of every dynamics: the ODE at noise 0, the published formulas, the marginals it claims to keep."""

import math
from dataclasses import dataclass

import pytest
import torch

from flowopd.core import CPS, ODE, DanceSDE, Dynamics, FlowSDE, ShiftedSchedule

DYNAMICS = [FlowSDE(0.7), CPS(0.7), DanceSDE(0.3)]  # a new dynamics joins here
SILENT = [FlowSDE(0.0), CPS(0.0), DanceSDE(0.0)]
every_dynamics = pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
GRID = ShiftedSchedule().sigmas(10).double()
SHAPE = (2, 3, 3)


def states(rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, rows, *SHAPE, dtype=torch.float64).unbind()


def column(per_row: torch.Tensor) -> torch.Tensor:
    return per_row[:, None, None, None]


@pytest.mark.parametrize("dynamics", SILENT, ids=lambda d: type(d).__name__)
def test_without_noise_every_dynamics_is_the_ode(dynamics):
    (x, v), sigma, sigma_next = states(10), GRID[:-1], GRID[1:]
    step = dynamics.step(x, v, sigma, sigma_next)
    torch.testing.assert_close(step.mean, x + column(sigma_next - sigma) * v)
    assert (step.std == 0).all()


def test_flow_sde_is_its_published_formula():
    (x, v), a = states(), 0.7
    s, s1 = GRID[:-2].clone(), GRID[1:-1]
    g = a * torch.sqrt(s / (1 - torch.where(s == 1, s1, s)))
    dt = s1 - s
    mean = x * column(1 + g**2 * dt / (2 * s)) + v * column((1 + g**2 * (1 - s) / (2 * s)) * dt)
    step = FlowSDE(a).step(x, v, s, s1)
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, g * torch.sqrt(-dt))


def test_cps_is_its_published_formula():
    (x, v), a = states(10), 0.7
    s, s1 = column(GRID[:-1]), column(GRID[1:])
    std = s1 * math.sin(a * math.pi / 2)
    mean = (1 - s1) * (x - s * v) + torch.sqrt(s1**2 - std**2) * (x + (1 - s) * v)
    step = CPS(a).step(x, v, GRID[:-1], GRID[1:])
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(column(step.std), std)


def test_dance_sde_has_constant_diffusion():
    (x, v), eta = states(), 0.3
    s, s1 = GRID[:-2], GRID[1:-1]
    dt = s1 - s
    mean = x * column(1 + eta**2 * dt / (2 * s)) + v * column((1 + eta**2 * (1 - s) / (2 * s)) * dt)
    step = DanceSDE(eta).step(x, v, s, s1)
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, eta * torch.sqrt(-dt))


def test_the_step_from_pure_noise_takes_its_diffusion_at_the_next_grid_point():
    one, below = torch.ones(1, dtype=torch.float64), GRID[1:2]
    assert FlowSDE(0.7).diffusion(one, below).item() == pytest.approx(0.7 * math.sqrt(1 / (1 - below.item())))


@every_dynamics
def test_every_step_of_the_grid_is_finite(dynamics):
    (x, v), s, s1 = states(10), GRID[:-1], GRID[1:]
    step = dynamics.step(x, v, s, s1)
    assert step.mean.isfinite().all()
    assert (step.std[:-1] > 0).all()
    assert step.std.isfinite().all()


@every_dynamics
def test_two_velocities_at_one_state_differ_by_the_gain(dynamics):
    (x, v), other = states(), torch.randn(9, *SHAPE, dtype=torch.float64)
    step, direct = (dynamics.step(x, velocity, GRID[:-2], GRID[1:-1]) for velocity in (v, other))
    torch.testing.assert_close(step.shifted_to(other).mean, direct.mean)
    torch.testing.assert_close(direct.mean - step.mean, column(step.gain) * (other - v))


@every_dynamics
def test_rows_outside_the_noise_window_take_the_step_of_the_ode(dynamics):
    (x, v), s, s1 = states(), GRID[:-2], GRID[1:-1]
    noisy = torch.arange(9) % 2 == 0
    mixed = dynamics.step(x, v, s, s1, noisy)
    sde, ode = dynamics.step(x, v, s, s1), ODE().step(x, v, s, s1)
    for row in range(9):
        source = sde if noisy[row] else ode
        assert torch.equal(mixed.mean[row], source.mean[row])
        assert mixed.std[row] == source.std[row]
        assert mixed.gain[row] == source.gain[row]


@every_dynamics
def test_samples_have_the_declared_mean_and_width(dynamics):
    (x, v), count = torch.randn(2, 1, dtype=torch.float64).unbind(), 20_000
    step = dynamics.step(x.expand(count, 1), v.expand(count, 1), GRID[5].expand(count), GRID[6].expand(count))
    samples = step.sample(torch.randn(count, 1, dtype=torch.float64))
    std = step.std[0].item()
    assert samples.mean().item() == pytest.approx(step.mean[0].item(), abs=4 * std / math.sqrt(count))
    assert samples.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count))


def test_the_kl_of_two_flow_sde_steps_is_the_paper_s_weighted_velocity_distance():
    """Flow-OPD writes dt/2 · (g(1 - σ)/2σ + 1/g)²; with Flow-SDE's g the gain is (1 + a²/2)·dt, and dt at σ = 1."""
    a, s, s1 = 0.7, GRID[:-2], GRID[1:-1]
    dt, g = s - s1, FlowSDE(a).diffusion(s, s1)
    step = FlowSDE(a).step(*states(), s, s1)
    torch.testing.assert_close(step.gain**2 / (2 * step.std**2), dt / 2 * (g * (1 - s) / (2 * s) + 1 / g) ** 2)
    torch.testing.assert_close(step.gain[1:], -(1 + a**2 / 2) * dt[1:])
    torch.testing.assert_close(step.gain[0], -dt[0])


@pytest.mark.parametrize("dynamics", [FlowSDE, DanceSDE, CPS])
def test_a_negative_noise_level_is_refused(dynamics):
    with pytest.raises(ValueError, match="noise_level"):
        dynamics(-0.1)


@dataclass(frozen=True)
class GaussianFlow:
    """Solvable by hand: clean ~ N(centre, spread²) and noise ~ N(0, 1).

    E[noise - clean | x] is linear in x, so that every step maps a Gaussian to a Gaussian, followed here exactly.
    """

    centre: float = 0.8
    spread: float = 0.5

    def marginal(self, sigma: float) -> tuple[float, float]:
        """Mean and variance of x_σ."""
        return (1 - sigma) * self.centre, (1 - sigma) ** 2 * self.spread**2 + sigma**2

    def velocity(self, sigma: float) -> tuple[float, float]:
        """Offset and slope of E[noise - clean | x]."""
        mean, variance = self.marginal(sigma)
        slope = (sigma - (1 - sigma) * self.spread**2) / variance
        return -self.centre - slope * mean, slope

    def arrive(self, dynamics: Dynamics, first: float, last: float, steps: int) -> tuple[float, float]:
        """Mean and variance at σ = last, having left σ = first with the marginal's."""
        mean, variance = self.marginal(first)
        levels = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        coefficients = dynamics.coefficients(levels[:-1], levels[1:])
        for sigma, state, gain, std in zip(levels[:-1].tolist(), *(c.tolist() for c in coefficients), strict=True):
            offset, slope = self.velocity(sigma)
            mean = state * mean + gain * (offset + slope * mean)
            variance = (state + gain * slope) ** 2 * variance + std**2
        return mean, variance

    def error(self, dynamics: Dynamics, first: float, last: float, steps: int) -> float:
        found, true = self.arrive(dynamics, first, last, steps), self.marginal(last)
        return max(abs(a - b) for a, b in zip(found, true, strict=True))


SDES = [ODE(), *(FlowSDE(a) for a in (0.2, 0.7, 1.0, 1.5)), *(DanceSDE(a) for a in (0.1, 0.3, 1.0))]
every_sde = pytest.mark.parametrize("dynamics", SDES, ids=lambda d: type(d).__name__)


@every_sde
def test_sde_keeps_the_ode_marginal_for_every_noise_level(dynamics):
    errors = [GaussianFlow().error(dynamics, 0.95, 0.05, steps) for steps in (500, 1000, 2000)]
    assert errors[-1] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)  # a method of first order
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("noise_level", [0.7, 1.0, 1.5])
def test_flow_sde_forgets_its_large_first_step_from_pure_noise(noise_level):
    """Its g² is singular at σ = 1: one step is always off by a⁴/4 in variance, and shorter ones make up for it."""
    errors = [GaussianFlow().error(FlowSDE(noise_level), 1.0, 0.05, steps) for steps in (10, 100, 1000, 10_000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
def test_cps_keeps_the_total_noise(noise_level):
    """Of the predicted noise and the fresh one together, σ' stands in x', and 1 - σ' of the predicted clean."""
    s, s1 = GRID[:-1], GRID[1:]
    state, gain, std = CPS(noise_level).coefficients(s, s1)
    clean = (1 - s) * state - gain  # x = (1 - σ)·clean + σ·noise and v = noise - clean, collected
    noise = s * state + gain
    torch.testing.assert_close(clean, 1 - s1)
    torch.testing.assert_close(noise**2 + std**2, s1**2)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
def test_cps_is_exact_in_any_number_of_steps_where_its_prediction_is(noise_level):
    one_image = GaussianFlow(spread=0.0)  # clean and noise are known from x
    assert one_image.error(CPS(noise_level), 1.0, 0.2, steps=3) < 1e-12
