"""The laws of drawn steps: as many as asked for, as often as said, and without bias."""

import pytest
import tiny
import torch

from flowopd.core import LinearSchedule, ShiftedSchedule, TransitionKL
from flowopd.preflight.forwards import SAMPLED, TRAINED, count_forwards
from flowopd.rollouts import BetaSteps, Sampler, SpreadSteps
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import OPDStudent, TeacherCallback

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


@pytest.fixture(scope="module")
def expert(tiny_pipeline, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("experts") / "red", tiny_pipeline)


class Only(SpreadSteps):
    """Draws one step that is known beforehand."""

    def __init__(self, step, rule):
        super().__init__(1)
        self.step, self.rule = step, rule

    def probabilities(self, sigmas):
        return self.rule.probabilities(sigmas)

    def draw(self, sigmas, generator):
        return [self.step]


def updated(pipeline, folder, expert, steps, fused=True, iterations=1):
    """The student's B factors after plain gradient descent; one update per iteration."""
    policy = tiny.policy(OPDStudent, pipeline, TransitionKL(), lr=1.0, sampler=Sampler(4, steps=steps))
    batches = 2 * policy.batches_per_rollout()
    callbacks = [TeacherCallback(["red"], LoRATeacher(expert))]
    torch.manual_seed(0)
    tiny.trainer(folder, callbacks, max_epochs=iterations, accumulate_grad_batches=batches).fit(
        policy, tiny.data(fused=fused)
    )
    return torch.cat([value.flatten() for key, value in policy.student().tensors.items() if "lora_B" in key])


@pytest.mark.parametrize("rule", [SpreadSteps(1), BetaSteps(1, 2.0, 5.0)], ids=["spread", "beta"])
def test_the_expected_update_of_drawn_steps_is_that_of_all(tiny_pipeline, tmp_path, expert, rule):
    chances = rule.probabilities(Sampler(4).sigmas()[:4])
    single = [updated(tiny_pipeline, tmp_path, expert, Only(j, rule), fused=False) for j in range(3)]
    expected = sum(chance * update for chance, update in zip(chances.float(), single, strict=True))
    torch.testing.assert_close(
        expected, updated(tiny_pipeline, tmp_path, expert, None, fused=False), rtol=1e-4, atol=1e-7
    )


def test_drawn_steps_give_one_gradient_on_both_roads(tiny_pipeline, tmp_path, expert):
    whole, fused = (updated(tiny_pipeline, tmp_path, expert, SpreadSteps(2), fused) for fused in (False, True))
    torch.testing.assert_close(whole, fused, rtol=0, atol=1e-6)
    assert whole.abs().max() > 1e-5


def test_every_iteration_draws_anew_and_every_row_and_rank_alike(tiny_pipeline, tmp_path, expert):
    sampler = Sampler(10, steps=SpreadSteps(2))
    drawn = [sampler.draw_steps(f"0 {iteration}") for iteration in range(20)]
    assert drawn == [sampler.draw_steps(f"0 {iteration}") for iteration in range(20)]
    assert len({tuple(steps) for steps in drawn}) > 5


def test_the_plan_counts_what_drawn_steps_take(tiny_pipeline):
    """One forward without gradient per step before the last trained one, and nothing after it."""
    policy = tiny.policy(OPDStudent, tiny_pipeline, sampler=Sampler(8, window=(0, 8), steps=SpreadSteps(2)))
    counts = count_forwards(
        policy, tiny.data(group_size=1, fused=True), [TeacherCallback(["red"], BaseTeacher())], 1, 2
    )
    assert counts[TRAINED] == 2 * 4
    assert counts["teacher-red"] == 2 * 4
    assert counts[SAMPLED] / 4 == pytest.approx(5.5 + 1 - 2, abs=0.7)
