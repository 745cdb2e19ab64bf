"""Scorers together: one training reward, and the columns of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from flowopd.core.names import refuse_duplicates
from flowopd.records import Prompt
from flowopd.rewards.base import Scores
from flowopd.rewards.scorer import Column, Scorer

Tally = dict[str, list[float]]
"""Of every reward and part: the sum of its scores, how many there are, and how many failed."""


class Judging:
    """Scorers as one training reward,  r = Σ weight · score  over those of a row's task, and as columns.

    Args:
        scorers: in the order of their columns.

    Raises:
        ValueError: if two columns have one name.

    >>> class Redness:
    ...     def score(self, images, prompts):
    ...         return images[:, 0].mean((1, 2))
    >>> judging = Judging([Scorer("red", Redness(), ["red"], weight=0.8), Scorer("any", Redness(), weight=0.2)])
    >>> images, prompts = torch.ones(2, 3, 4, 4), [Prompt("a rose", "red"), Prompt("grass", "green")]
    >>> judging.total(judging.detail(images, prompts), prompts)
    tensor([1.0000, 0.2000])
    """

    def __init__(self, scorers: Sequence[Scorer] = ()) -> None:
        refuse_duplicates("reward", [scorer.name for scorer in scorers])
        refuse_duplicates("column", [*(name for scorer in scorers for name in scorer.column_names()), "average"])
        self.scorers = list(scorers)
        self.training = [scorer for scorer in scorers if scorer.weight]

    def trains(self, task: str) -> bool:
        """Whether a reward with a weight scores the task."""
        return any(scorer.covers(task) for scorer in self.training)

    def begin(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Future[Scores]]:
        """Begin to score finished images (B, 3, H, W); what is not done in the background is done when this returns."""
        return {scorer.name: scorer.begin(images, prompts) for scorer in self.training}

    def gather(self, begun: Sequence[Mapping[str, Future[Scores]]], device: torch.device) -> dict[str, Scores]:
        """Scores (B,) of every training reward, of consecutive parts of a batch, awaited."""
        names = [scorer.name for scorer in self.training]
        return {name: Scores.cat([part[name].result() for part in begun]).to(device) for name in names}

    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Scores]:
        """Scores (B,) of every training reward, of images (B, 3, H, W)."""
        return self.gather([self.begin(images, prompts)], images.device)

    def total(self, scores: Mapping[str, Scores], prompts: Sequence[Prompt]) -> Tensor:
        """Training rewards,  Σ weight · score  over the rewards of each row's task, (B,); NaN where one failed."""
        shares = []
        for scorer in self.training:
            share = scorer.weight * scores[scorer.name].value
            shares.append(share.where(scorer.asked(prompts).to(share.device), 0.0))
        return torch.stack(shares).sum(0)

    def tally(self, scores: Mapping[str, Scores], prompts: Sequence[Prompt]) -> Tally:
        """What training rewards gave, in numbers that may be added over batches and ranks."""
        tally: Tally = {}
        for scorer in self.training:
            value, parts = scores[scorer.name].value, scores[scorer.name].parts
            asked = scorer.asked(prompts).to(value.device)
            tally[scorer.name] = [*_sum_and_count(value), int((value.isnan() & asked).sum())]
            tally |= {f"{scorer.name}/{part}": [*_sum_and_count(values), 0] for part, values in parts.items()}
        return tally

    def columns(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Column]:
        """Every column of an evaluation of images (B, 3, H, W), (B,) each."""
        return {name: column for scorer in self.scorers for name, column in scorer.evaluate(images, prompts).items()}


def means(tally: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means of scores and parts, NaN where there is none, and ``<name>/failed`` where some failed.

    >>> means({"red": [1.5, 3, 1], "red/exact": [0.0, 0, 0]})
    {'red': 0.5, 'red/exact': nan, 'red/failed': 1.0}
    """
    failed = {f"{name}/failed": float(lost) for name, (_, _, lost) in tally.items() if lost}
    return {name: total / count if count else math.nan for name, (total, count, _) in tally.items()} | failed


def refuse_unscored(tally: Mapping[str, Sequence[float]]) -> None:
    """Refuse to go on with a reward of which every score failed.

    Raises:
        ValueError: naming the reward.
    """
    for name, (_, count, failed) in tally.items():
        if failed and not count:
            raise ValueError(
                f"reward {name!r} failed for all {int(failed)} pictures that it was asked about, so there is nothing "
                "to learn from; look at the reward, or at its server"
            )


def _sum_and_count(values: Tensor) -> tuple[float, int]:
    return float(values.double().nansum()), int((~values.isnan()).sum())
