"""The laws of the straight path, of guidance and of group-relative advantages."""

import math

import pytest
import torch

from flowopd.core import (
    GroupAdvantage,
    clean_from_velocity,
    guided,
    interpolate,
    noise_from_velocity,
    velocity_from,
)

SCALES = ["group", "batch", "none"]


@pytest.fixture
def path():
    clean, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    return clean, noise, sigma


def test_the_path_leads_from_noise_to_clean(path):
    clean, noise, sigma = path
    x = interpolate(clean, noise, sigma)
    assert torch.equal(x[0], clean[0])
    assert torch.equal(x[-1], noise[-1])
    torch.testing.assert_close(x[2], (clean[2] + noise[2]) / 2)


def test_the_velocity_is_the_derivative_of_the_path(path):
    clean, noise, sigma = path
    slope = (interpolate(clean, noise, sigma + 0.1) - interpolate(clean, noise, sigma)) / 0.1  # it is straight
    torch.testing.assert_close(velocity_from(clean, noise), slope)


def test_both_ends_are_recovered_from_any_point_and_its_velocity(path):
    clean, noise, sigma = path
    x, v = interpolate(clean, noise, sigma), velocity_from(clean, noise)
    torch.testing.assert_close(clean_from_velocity(x, v, sigma), clean)
    torch.testing.assert_close(noise_from_velocity(x, v, sigma), noise)


def test_guidance_of_one_is_conditional_and_of_zero_unconditional(path):
    conditional, unconditional, _ = path
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)


def test_guidance_extrapolates_linearly(path):
    conditional, unconditional, _ = path
    expected = 4.5 * conditional - 3.5 * unconditional
    torch.testing.assert_close(guided(conditional, unconditional, 4.5), expected)


def test_guidance_names_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"conditional.*\(2, 3\).*unconditional.*\(1, 3\)"):
        guided(torch.zeros(2, 3), torch.zeros(1, 3), 2.0)


REWARDS = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.3, 0.6])


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_centred_in_every_group(scale):
    groups = GroupAdvantage(scale)(REWARDS, 3).reshape(2, 3)
    torch.testing.assert_close(groups.mean(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_advantages_are_their_formulas():
    groups = REWARDS.reshape(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    batch = centred / (REWARDS.std(correction=0) + 1e-4)
    group = centred / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    for scale, expected in {"none": centred, "batch": batch, "group": group}.items():
        torch.testing.assert_close(GroupAdvantage(scale)(REWARDS, 3), expected.flatten())


def test_advantages_are_clipped_on_both_sides():
    rewards = torch.tensor([0.0] * 99 + [1.0, 1.0] + [2.0] * 98 + [1.0])
    advantage = GroupAdvantage("none", clip=0.4)(rewards * 3, 100)
    assert (advantage.min().item(), advantage.max().item()) == pytest.approx((-0.4, 0.4))


@pytest.mark.parametrize("scale", SCALES)
def test_a_failed_score_gets_no_advantage_and_leaves_its_siblings_alone(scale):
    failed = torch.tensor([0.1, math.nan, 0.9, 0.3, 0.3, 0.6])
    advantage = GroupAdvantage(scale)(failed, 3)
    assert advantage[1] == 0
    assert advantage.isfinite().all()
    assert advantage[0].item() == pytest.approx(-advantage[2].item())
    assert GroupAdvantage(scale)(torch.full((4,), math.nan), 2).tolist() == [0] * 4


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 23.08])
def test_groups_of_equal_rewards_get_exactly_nothing(scale, reward):
    rewards = torch.cat([torch.full((24,), reward), torch.rand(24)])
    assert GroupAdvantage(scale)(rewards, 24)[:24].tolist() == [0] * 24
    assert GroupAdvantage(scale)(rewards[:24], 24).tolist() == [0] * 24


@pytest.mark.parametrize("rewards", [torch.zeros(10), torch.zeros(8, 1)])
def test_rewards_that_do_not_fill_groups_are_refused(rewards):
    with pytest.raises(ValueError, match="do not fill groups of 4; expected"):
        GroupAdvantage()(rewards, 4)
