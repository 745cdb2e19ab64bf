"""The laws of drawn steps: as many as asked for, as often as said, and without bias."""

import pytest
import torch

from flowopd.core import LinearSchedule, ShiftedSchedule
from flowopd.rollouts.steps import BetaSteps, SpreadSteps

RULES = [
    SpreadSteps(1),
    SpreadSteps(2),
    SpreadSteps(3),
    SpreadSteps(8),
    BetaSteps(1, 2.0, 5.0),
    BetaSteps(2, 5.0, 2.0),
    BetaSteps(3, 1.0, 8.0),
    BetaSteps(7, 2.0, 2.0),
]
GRIDS = [LinearSchedule().sigmas(8), ShiftedSchedule().sigmas(10)[:-1]]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{rule.count}")
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=["linear", "shifted"])


def draws(rule, grid, times):
    generator = torch.Generator().manual_seed(0)
    return [rule.draw(grid, generator) for _ in range(times)]


@every_rule
@every_grid
def test_every_draw_has_as_many_different_steps_as_asked_for_in_order(rule, grid):
    for steps in draws(rule, grid, 200):
        assert steps == sorted(set(steps))
        assert len(steps) == rule.count
        assert set(steps) <= set(range(len(grid) - 1))


@every_rule
@every_grid
def test_a_step_is_drawn_as_often_as_its_probability_says(rule, grid):
    times, n = 4000, len(grid) - 1
    counts = torch.tensor(
        [sum(j in steps for steps in drawn) for drawn in [draws(rule, grid, times)] for j in range(n)]
    )
    chances = rule.probabilities(grid)
    assert chances.sum() == pytest.approx(rule.count)
    error = (chances * (1 - chances) / times).sqrt()
    assert ((counts / times - chances).abs() <= 4.5 * error + 1e-9).all()


@every_rule
@every_grid
def test_the_weighted_mean_of_drawn_losses_is_expected_to_be_the_mean_of_all(rule, grid):
    losses = torch.rand(len(grid) - 1, dtype=torch.float64)
    expected = (rule.probabilities(grid) * rule.weights(grid) * losses).sum() / rule.count
    assert expected == pytest.approx(losses.mean().item(), rel=1e-12)


def test_without_weights_drawn_steps_count_alike():
    assert (SpreadSteps(3, weighted=False).weights(GRIDS[0]) == 1).all()


def test_one_step_comes_from_each_part():
    for first, second in draws(SpreadSteps(2), GRIDS[0], 100):
        assert first in range(4)
        assert second in range(4, 8)


def test_as_many_steps_as_there_are_is_every_step():
    for rule in (SpreadSteps(8), BetaSteps(8, 2.0, 5.0)):
        assert draws(rule, GRIDS[0], 3) == [list(range(8))] * 3
        assert (rule.weights(GRIDS[0]) == 1).all()


def test_beta_leans_to_the_side_that_it_is_told():
    noise, clean = (BetaSteps(1, a, b).probabilities(GRIDS[0]) for a, b in ((5.0, 2.0), (2.0, 5.0)))
    assert noise[:4].sum() > 0.8
    assert clean[4:].sum() > 0.8


@pytest.mark.parametrize(
    "wrong", [lambda: SpreadSteps(0), lambda: BetaSteps(1, 0.0, 1.0), lambda: BetaSteps(-1, 1.0, 1.0)]
)
def test_numbers_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


def test_more_steps_than_there_are_is_refused():
    with pytest.raises(ValueError, match="draws 9 steps, but only 8 may be trained"):
        SpreadSteps(9).check(8)
