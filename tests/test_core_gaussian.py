"""The laws of a step's Gaussian: known densities, KL as a mean log-ratio, determinism at width 0."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowopd.core import Gaussian

SHAPE = (3, 4, 5)


def gaussian(rows: int = 6, seed: int = 0) -> Gaussian:
    noise = torch.Generator().manual_seed(seed)
    mean = torch.randn(rows, *SHAPE, generator=noise, dtype=torch.float64)
    return Gaussian(mean, 0.1 + torch.rand(rows, generator=noise, dtype=torch.float64))


def normal(g: Gaussian) -> Normal:
    return Normal(g.mean, g.std[:, None, None, None].expand_as(g.mean))


def test_log_prob_is_the_mean_over_dimensions_of_the_normal_density():
    g, x = gaussian(), gaussian(seed=1).mean
    torch.testing.assert_close(g.log_prob(x), normal(g).log_prob(x).mean((1, 2, 3)))


def test_kl_is_the_mean_over_dimensions_of_the_normal_kl():
    p, q = gaussian(), gaussian(seed=1)
    torch.testing.assert_close(p.kl(q), kl_divergence(normal(p), normal(q)).mean((1, 2, 3)))


def test_kl_is_the_mean_log_ratio_under_samples():
    p, q = gaussian(2), gaussian(2, seed=1)
    rows = [Gaussian(g.mean.repeat(5000, 1, 1, 1), g.std.repeat(5000)) for g in (p, q)]
    x = rows[0].sample(torch.randn(10_000, *SHAPE, dtype=torch.float64))
    ratios = (rows[0].log_prob(x) - rows[1].log_prob(x)).reshape(5000, 2)
    error = ratios.std(0) / math.sqrt(5000)
    assert ((ratios.mean(0) - p.kl(q)).abs() < 4 * error).all()


def test_kl_to_itself_is_zero():
    p = gaussian()
    torch.testing.assert_close(p.kl(p), torch.zeros(6, dtype=torch.float64))


def test_a_sample_is_mean_plus_std_times_noise():
    g, noise = gaussian(), gaussian(seed=1).mean
    assert torch.equal(g.sample(noise), g.mean + g.std[:, None, None, None] * noise)


def test_a_row_of_width_zero_is_deterministic_and_has_log_prob_zero():
    g = Gaussian(gaussian(2).mean, torch.tensor([0.0, 0.5], dtype=torch.float64))
    x = g.sample(torch.randn(2, *SHAPE, dtype=torch.float64))
    assert torch.equal(x[0], g.mean[0])
    assert not torch.equal(x[1], g.mean[1])
    assert g.log_prob(x)[0] == 0
    assert g.log_prob(x)[1] != 0


def test_kl_of_deterministic_rows_is_zero_where_means_agree_and_infinite_elsewhere():
    mean, zero, one = gaussian(3).mean, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    moved = mean + torch.tensor([0.0, 1.0, 0.0])[:, None, None, None]
    assert Gaussian(mean, zero).kl(Gaussian(moved, zero)).tolist() == [0, math.inf, 0]
    assert Gaussian(mean, zero).kl(Gaussian(mean, one)).tolist() == [math.inf] * 3


def test_a_deterministic_row_gives_no_nan_gradient():
    mean = gaussian(2).mean.requires_grad_()
    g = Gaussian(mean, torch.tensor([0.0, 0.5], dtype=torch.float64))
    g.log_prob(torch.zeros_like(mean)).sum().backward()
    assert (mean.grad[0] == 0).all()
    assert mean.grad[1].isfinite().all()


def test_shapes_that_disagree_are_named():
    g = gaussian(2)
    wrong = torch.zeros(2, 3, dtype=torch.float64)
    for verb in (g.log_prob, g.sample, lambda x: g.kl(Gaussian(x, g.std))):
        with pytest.raises(ValueError, match=r"expected equal shapes, got .*\(2, 3, 4, 5\).*\(2, 3\)"):
            verb(wrong)
