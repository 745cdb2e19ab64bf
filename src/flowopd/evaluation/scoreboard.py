"""Means of scores, exact over ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from flowopd.evaluation.metrics import Tally

logger = logging.getLogger(__name__)
TOLERATED = 0.01  # share of failed scores beyond which a mean is not to be trusted


@dataclass(frozen=True)
class Column:
    """Scores of B images.

    Args:
        values: (B,), NaN where scoring failed.
        asked: (B,) bool, rows that were to be scored.
    """

    values: Tensor
    asked: Tensor


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

    def update(self, scores: Mapping[str, Tensor | Column], counted: Tensor) -> None:
        """Add scores (B,) by column; NaN and rows that only pad the batch are left out."""
        for number, name in enumerate(self.columns):
            score = scores[name]
            column = score if isinstance(score, Column) else Column(score, torch.ones_like(counted))
            group = torch.full(counted.shape, number, device=counted.device)
            self.add(column.values, group, counted & column.asked)

    def compute(self) -> dict[str, float]:
        """Means by column, NaN for one without a score, and ``average``; too many failures are told in the log."""
        self._tell_failures()
        means = dict(zip(self.columns, (self.total / self.count).tolist(), strict=True))
        means |= {name: _mean([means[part] for part in parts]) for name, parts in self.macro.items()}
        if not self.averaged:
            return means
        return means | {"average": sum(means[name] for name in self.averaged) / len(self.averaged)}

    def _tell_failures(self) -> None:
        if distributed.is_initialized() and distributed.get_rank():
            return
        for name, failed, count in zip(self.columns, self.failed.tolist(), self.count.tolist(), strict=True):
            if failed > TOLERATED * (failed + count):
                logger.warning(
                    "%d of %d scores of %r failed; its mean is over the others", failed, failed + count, name
                )


def _mean(means: Sequence[float]) -> float:
    """Mean of those that are there."""
    return torch.tensor(means, dtype=torch.float64).nanmean().item()
