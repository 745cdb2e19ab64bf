"""The laws of rollouts: noise that belongs to its row, one place where steps are taken, ratios of exactly 1."""

import pytest
import tiny
import torch

from flowopd.core import CPS, ODE, FlowSDE, Labels, LinearSchedule
from flowopd.core.objectives import importance_ratio
from flowopd.core.tensors import picks
from flowopd.records import Conditioning, Prompt
from flowopd.rollouts import RowNoise, Sampler
from flowopd.training import FlowPolicy

SHAPE = (4, 3, 3)
PROMPTS = [Prompt(f"red {i}", "red") for i in range(4)]
COND = Conditioning(torch.zeros(4, 1, 1), torch.zeros(4, 1))


def noise(rows="abcd", starts=None) -> RowNoise:
    return RowNoise(SHAPE, starts or rows, rows)


def swirl(x, sigma, cond):
    """A velocity field without a network, row by row."""
    return torch.sin(3 * x) - x.roll(1, -1) * sigma[:, None, None, None]


def test_the_noise_of_a_row_does_not_depend_on_its_batch():
    together = noise()
    for row, key in enumerate("abcd"):
        alone = noise(key)
        assert torch.equal(together.start()[row], alone.start()[0])
        assert torch.equal(together.step(2)[row], alone.step(2)[0])
        assert torch.equal(together.named("level")[row], alone.named("level")[0])
    assert torch.equal(noise("dcba").start(), together.start().flip(0))


def test_rows_steps_and_names_have_noise_of_their_own():
    drawn = torch.cat([noise().start(), noise().step(0), noise().step(1), noise().named("fresh", SHAPE)])
    assert len(torch.unique(drawn, dim=0)) == 16
    assert drawn.std().item() == pytest.approx(1, abs=0.1)


def test_siblings_share_the_start_and_nothing_else():
    siblings = noise("abcd", starts="ppqq")
    assert torch.equal(siblings.start()[0], siblings.start()[1])
    assert not torch.equal(siblings.start()[1], siblings.start()[2])
    assert len(torch.unique(siblings.step(0), dim=0)) == 4


def rollout(sampler: Sampler, rows="abcd", starts=None):
    return sampler.rollout(swirl, PROMPTS[: len(rows)], COND[: len(rows)], noise(rows, starts))


def test_a_rollout_is_the_same_whenever_it_is_drawn():
    first, again = rollout(Sampler(5)), rollout(Sampler(5))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.log_probs, again.log_probs)


def test_a_rollout_does_not_depend_on_how_it_is_split():
    whole, halves = rollout(Sampler(5)), [rollout(Sampler(5), rows) for rows in ("ab", "cd")]
    torch.testing.assert_close(whole.latents, torch.cat([half.latents for half in halves]))
    torch.testing.assert_close(whole.log_probs, torch.cat([half.log_probs for half in halves]))


def test_a_rollout_begins_with_its_noise_and_follows_the_grid():
    drawn = rollout(Sampler(5, schedule=LinearSchedule()))
    assert torch.equal(drawn.latents[:, 0], noise().start())
    assert drawn.sigmas.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert drawn.latents.shape == (4, 6, *SHAPE)
    assert drawn.latents.dtype == torch.float32


def test_noise_is_injected_inside_the_window_only():
    drawn = rollout(Sampler(5, window=(1, 3)), starts="pppp")
    differ = [len(torch.unique(drawn.latents[:, j], dim=0)) > 1 for j in range(6)]
    assert differ == [False, False, True, True, True, True]  # siblings part at step 1
    assert drawn.noisy.tolist() == [False, True, True, False, False]
    assert (drawn.log_probs != 0).any(0).tolist() == [False, True, True, False, False]
    for j in (0, 3, 4):
        dt = drawn.sigmas[j + 1] - drawn.sigmas[j]
        torch.testing.assert_close(drawn.latents[:, j + 1], drawn.latents[:, j] + dt * drawn.velocities[:, j])


@pytest.mark.parametrize("dynamics", [FlowSDE(), CPS()], ids=["flow", "cps"])
def test_log_probs_are_those_of_scoring_the_states_again(dynamics):
    sampler = Sampler(5, dynamics=dynamics)
    drawn = rollout(sampler)
    for j in sampler.trained_steps():
        batch = sampler.batch_at(drawn.latents[:, j], j, COND, ["red"] * 4)
        step = sampler.transition(batch, swirl(batch.x, batch.sigma, COND))
        assert torch.equal(step.log_prob(drawn.latents[:, j + 1]), drawn.log_probs[:, j])
        assert torch.equal(step.velocity, drawn.velocities[:, j])


def test_a_grid_that_an_evaluation_asked_for_first_serves_training_too():
    sampler, x = Sampler(5), noise().start().requires_grad_()
    with torch.inference_mode():
        sampler.batch_at(x, 1, COND, ["red"] * 4)
    batch = sampler.batch_at(x, 1, COND, ["red"] * 4)
    sampler.transition(batch, x).log_prob(x.detach()).sum().backward()
    assert x.grad.isfinite().all()


def test_rows_are_picked_alike_by_slice_and_by_index():
    numbers = torch.arange(12).reshape(6, 2)
    for rows in ([2, 3, 4], [0], [4, 1, 1], [5, 4], []):
        assert torch.equal(numbers[picks(rows, numbers.device)], numbers[rows])
    assert isinstance(picks([2, 3, 4], numbers.device), slice)
    assert picks([4, 1], numbers.device) is picks([4, 1], numbers.device)


def test_an_ode_rollout_is_what_evaluation_draws():
    sampler = Sampler(5, dynamics=ODE())
    assert not sampler.noisy().any()
    assert torch.equal(rollout(sampler).latents[:, -1], sampler.draw(swirl, COND, noise().start()))


def test_all_steps_but_the_last_are_noisy_and_trained_unless_told_otherwise():
    assert Sampler(10).noisy().tolist() == [True] * 9 + [False]
    assert Sampler(10).trained_steps() == range(9)
    assert Sampler(10, dynamics=ODE()).trained_steps() == range(9)
    assert Sampler(10, window=(2, 5)).trained_steps() == range(2, 5)
    assert Sampler(10, window=(2, 5), trained=(0, 6)).trained_steps() == range(6)


@pytest.mark.parametrize("window", [(3, 3), (-1, 2), (2, 6), (4, 2)])
@pytest.mark.parametrize("name", ["window", "trained"])
def test_a_window_outside_the_steps_is_refused(name, window):
    with pytest.raises(
        ValueError, match=rf"{name} \[.*\) does not lie inside the 5 steps; expected 0 ≤ first < last ≤ 5"
    ):
        Sampler(5, **{name: window})


class Recorder:
    """An objective that only looks."""

    needs = frozenset({"x_next", "log_prob_old"})

    def __init__(self):
        self.log_ratios = []
        self.ratios = []

    def loss(self, student, labels: Labels):
        ratio, log_ratio = importance_ratio(student, labels)
        self.ratios += ratio.tolist()
        self.log_ratios += log_ratio.tolist()
        return ratio.mean(), {}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_on_policy_ratio_is_one(tiny_pipeline, tmp_path, scale, precision):
    """To the bit, and in every step: nothing is trained here."""
    recorder, start = Recorder(), tiny.expert(tmp_path / "start", tiny_pipeline, lora_dropout=0.5)
    sampler = Sampler(num_steps=4, guidance_scale=scale)
    policy = tiny.policy(FlowPolicy, tiny_pipeline, recorder, lr=0.0, sampler=sampler, start=start)
    tiny.trainer(tmp_path, precision=precision).fit(policy, tiny.data())
    assert recorder.ratios == [1] * 8 * 3
    assert recorder.log_ratios == [0] * 8 * 3
