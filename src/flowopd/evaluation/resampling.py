"""How sure a mean is: bootstrap over prompts.

Models that drew the same prompts are resampled alike, so that their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flowopd.core.seeds import seed_of

RESAMPLES = 2000
COVERAGE = 0.95
WORST = 0.1
"""Share of the prompts that ``worst_tenth`` averages."""


class Interval(NamedTuple):
    """A figure and the interval around it, of 95 % coverage.

    >>> f"{Interval(0.65, 0.6, 0.7):.2f}"
    '0.65 [0.60, 0.70]'
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample of prompts, and the same figure of every resample; estimates are added and subtracted.

    The difference of two estimates over the same prompts is paired, since both are of the same resamples.

    Args:
        value: of the sample.
        samples: (R,) float64, of the resamples.
    """

    value: float
    samples: Tensor

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.samples - other.samples)

    def __truediv__(self, number: float) -> Estimate:
        return Estimate(self.value / number, self.samples / number)

    def interval(self) -> Interval:
        """The figure between the 2.5 % and the 97.5 % quantile of its resamples."""
        tail = self.samples.new_tensor([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        found = self.samples[~self.samples.isnan()]
        low, high = found.quantile(tail).tolist() if len(found) else (math.nan, math.nan)
        return Interval(self.value, low, high)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several figures, NaN left out.

    Benchmarks are resampled independently of one another, and what is of the same benchmark, together.
    """
    values = torch.tensor([one.value for one in estimates], dtype=torch.float64)
    return Estimate(values.nanmean().item(), torch.stack([one.samples for one in estimates]).nanmean(0))


Statistic = Callable[[Tensor, Tensor], Tensor]
"""A figure (R,) of scores (P, n), n of every prompt, NaN where there is none, under weights of the prompts (R, P)."""


def estimate(scores: Tensor, statistic: Statistic, name: str) -> Estimate:
    """A statistic of scores (P, n) and of their resamples over prompts.

    Args:
        scores: of P prompts, NaN where there is none.
        statistic: what to compute.
        name: of the benchmark; the resamples are the same for all models and scores of one.
    """
    scores = scores.double()
    whole = statistic(scores, torch.ones(1, len(scores), dtype=torch.float64))
    return Estimate(whole.item(), statistic(scores, resamples(len(scores), name)))


@lru_cache(maxsize=8)
def resamples(prompts: int, name: str, count: int = RESAMPLES) -> Tensor:
    """How often each of P prompts is in a resample, (R, P) float64: P draws with replacement."""
    noise = torch.Generator().manual_seed(seed_of("bootstrap", name, prompts))
    drawn = torch.randint(prompts, (count, prompts), generator=noise)
    return torch.zeros(count, prompts, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1).double().expand_as(drawn)
    )


def mean(scores: Tensor, weights: Tensor) -> Tensor:
    """Mean over all pictures,  Σ_p w_p Σ_i s_pi / Σ_p w_p n_p."""
    return weights @ scores.nansum(1) / (weights @ (~scores.isnan()).double().sum(1))


def best_of_n(scores: Tensor, weights: Tensor) -> Tensor:
    """Mean over prompts of the best of their pictures,  max_i s_pi.

    Where a picture is right or wrong, 1 or 0, the share of prompts with any right one.
    """
    best = scores.nan_to_num(nan=-math.inf).amax(1, keepdim=True)
    return mean(best.where(best > -math.inf, math.nan), weights)


def spread(scores: Tensor, weights: Tensor) -> Tensor:
    """How much the scores of a prompt differ from one seed to another,  mean over prompts of std_i s_pi."""
    centre = scores.nanmean(1, keepdim=True)
    return mean((scores - centre).square().nanmean(1, keepdim=True).sqrt(), weights)


def worst_tenth(scores: Tensor, weights: Tensor) -> Tensor:
    """Mean over the tenth of the prompts whose pictures score least on average."""
    prompts = scores.nanmean(1)
    order = prompts.argsort()[: int((~prompts.isnan()).sum())]  # NaN comes last
    weight, ranked = weights[:, order], prompts[order]
    wanted = WORST * weight.sum(1, keepdim=True)
    taken = (wanted - (weight.cumsum(1) - weight)).clamp(min=0).minimum(weight)
    return taken @ ranked / wanted[:, 0]


def macro(groups: Sequence[Sequence[int]]) -> Statistic:
    """Mean of the means of groups of prompts, by their rows: each group counts alike."""

    def statistic(scores: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([mean(scores[rows], weights[:, rows]) for rows in map(list, groups)]).nanmean(0)

    return statistic
