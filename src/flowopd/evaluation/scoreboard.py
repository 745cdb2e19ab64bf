"""Means of scores, exact over ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from flowopd.evaluation.metrics import Tally
from flowopd.rewards.judging import Judging
from flowopd.rewards.scorer import Column

logger = logging.getLogger(__name__)
TOLERATED = 0.01  # share of failed scores beyond which a mean is not to be trusted


class Scoreboard(Tally):
    """The mean of each column over all images and ranks, and the average of some columns.

    Args:
        columns: names, in order.
        averaged: the columns whose mean is called ``average``.
        macro: columns whose mean is that of other columns' means, each of which counts alike, by name.
    """

    def __init__(
        self, columns: Sequence[str], averaged: Sequence[str], macro: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(len(columns))
        self.columns = list(columns)
        self.averaged = list(averaged)
        self.macro = dict(macro or {})
        self.unscored: list[str] = []
        """Columns of which every score failed, as ``compute`` found."""

    @staticmethod
    def of(judging: Judging) -> Scoreboard:
        """An empty scoreboard with a column per reward, and one per part that was asked for."""
        return Scoreboard(
            columns=[name for scorer in judging.scorers for name in scorer.column_names()],
            averaged=[scorer.name for scorer in judging.scorers if scorer.in_average],
            macro={scorer.name: scorer.column_names()[1:] for scorer in judging.scorers if scorer.macro},
        )

    def update(self, scores: Mapping[str, Tensor | Column], counted: Tensor) -> None:
        """Add scores (B,) by column; NaN and rows that only pad the batch are left out."""
        for number, name in enumerate(self.columns):
            score = scores[name]
            column = score if isinstance(score, Column) else Column(score, torch.ones_like(counted))
            group = torch.full(counted.shape, number, device=counted.device)
            self.add(column.values, group, counted & column.asked)

    def compute(self) -> dict[str, float]:
        """Means by column, NaN for one without a score, and ``average``; too many failures are told in the log."""
        self.unscored = self._failures_told()
        means = dict(zip(self.columns, (self.total / self.count).tolist(), strict=True))
        means |= {name: _mean([means[part] for part in parts]) for name, parts in self.macro.items()}
        if not self.averaged:
            return means
        return means | {"average": sum(means[name] for name in self.averaged) / len(self.averaged)}

    def _failures_told(self) -> list[str]:
        """Say which columns are not to be trusted; returns those that say nothing at all."""
        unscored = []
        tell = logger.warning if not (distributed.is_initialized() and distributed.get_rank()) else logger.debug
        for name, failed, count in zip(self.columns, self.failed.tolist(), self.count.tolist(), strict=True):
            if failed and not count:
                unscored.append(name)
                tell("all %d scores of %r failed; its mean is NaN", failed, name)
            elif failed > TOLERATED * (failed + count):
                tell("%d of %d scores of %r failed; its mean is over the others", failed, failed + count, name)
            elif not count:
                tell("there is no score of %r; its mean is NaN", name)
        return unscored


def _mean(means: Sequence[float]) -> float:
    """Mean of those that are there."""
    return torch.tensor(means, dtype=torch.float64).nanmean().item()
