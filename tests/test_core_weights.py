"""The laws of the weights over steps: what the published figures say they are worth, and what KL they are."""

import pytest
import torch

from flowopd.core import (
    ODE,
    Anchored,
    CleanPicture,
    DanceSDE,
    Dynamics,
    ExactKL,
    FlowSDE,
    ODEDistance,
    Released,
    ShiftedSchedule,
    Transition,
    TransitionKL,
    Uniform,
    clean_from_velocity,
)

GRID = ShiftedSchedule().sigmas(10).double()


def trained_steps(dynamics: Dynamics) -> Transition:
    """The nine trained steps of the SD3.5 grid, one row each."""
    x, v = torch.randn(2, 9, 3, 4, 4, dtype=torch.float64).unbind()
    return dynamics.step(x, v, GRID[:-2], GRID[1:-1])


@pytest.mark.parametrize(
    ("weighting", "first_five", "step_7", "step_8"),
    [(Released(), 1.2, 16, 76), (ExactKL(), 3.8, 20, 64), (ODEDistance(), 11.7, 22, 47), (Uniform(), 56, 11, 11)],
    ids=["released", "exact", "ode", "uniform"],
)
def test_shares_of_the_loss_are_those_of_the_table(weighting, first_five, step_7, step_8):
    """Percent of the loss at equal velocity error; steps are counted from 0, so step 7 starts at σ = .465."""
    weight = weighting.weight(trained_steps(FlowSDE(0.7)))
    share = 100 * weight / weight.sum()
    assert share[:5].sum().item() == pytest.approx(first_five, rel=0.01)
    assert share[7].item() == pytest.approx(step_7, abs=0.5)
    assert share[8].item() == pytest.approx(step_8, abs=0.5)


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), FlowSDE(0.2), DanceSDE(0.3)], ids=["flow", "quiet", "dance"])
def test_the_exact_weight_makes_the_distance_a_kl(dynamics):
    student, velocity = trained_steps(dynamics), torch.randn(9, 3, 4, 4, dtype=torch.float64)
    distance = ((student.velocity - velocity) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(ExactKL().weight(student) * distance, student.kl(student.shifted_to(velocity)))


def test_the_exact_weight_is_the_papers():
    """Δt/2 · (σ_t (1 - t) / 2t + 1/σ_t)², t being our σ and σ_t the diffusion g; so the paper's λ goes with it."""
    step = trained_steps(FlowSDE(0.7))
    t, g = step.sigma[1:], FlowSDE(0.7).diffusion(step.sigma, step.sigma_next)[1:]  # g diverges at t = 1
    paper = (t - step.sigma_next[1:]) / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2
    torch.testing.assert_close(ExactKL().weight(step)[1:], paper)
    assert isinstance(Anchored(TransitionKL()).weighting, ExactKL)


def test_the_released_weight_leaves_out_the_step_size():
    step = trained_steps(FlowSDE(0.7))
    g = FlowSDE(0.7).diffusion(step.sigma, step.sigma_next)
    torch.testing.assert_close(Released().weight(step), step.gain**2 / (2 * g**2))
    factor = ExactKL().weight(step) / Released().weight(step)
    assert factor.min().item() == pytest.approx(3.7, abs=0.05)
    assert factor.max().item() == pytest.approx(25, abs=0.5)


@pytest.mark.parametrize("weighting", [ExactKL(), Released()], ids=["exact", "released"])
def test_a_deterministic_step_has_no_kl_weight(weighting):
    with pytest.raises(ValueError, match=r"deterministic step is infinite; add noise .* or weight steps by Uniform"):
        weighting.weight(trained_steps(ODE()))


def test_the_clean_weight_makes_the_distance_that_of_the_predicted_pictures():
    student, velocity, x = trained_steps(FlowSDE(0.7)), *torch.randn(2, 9, 3, 4, 4, dtype=torch.float64)
    distance = ((student.velocity - velocity) ** 2).mean((1, 2, 3))
    clean, other = (clean_from_velocity(x, v, student.sigma) for v in (student.velocity, velocity))
    torch.testing.assert_close(CleanPicture().weight(student) * distance, ((clean - other) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize("weighting", [Uniform(), ODEDistance(), CleanPicture()], ids=["uniform", "ode", "clean"])
def test_the_other_weights_do_without_noise(weighting):
    assert (weighting.weight(trained_steps(ODE())) > 0).all()
