"""Means of scores, exact over ranks."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric


class Scoreboard(nn.Module):
    """The mean of each column over all images and ranks, and the average of some columns.

    Args:
        columns: names, in order.
        averaged: the columns whose mean is called ``average``.
    """

    def __init__(self, columns: Sequence[str], averaged: Sequence[str]) -> None:
        super().__init__()
        self.columns = list(columns)
        self.averaged = list(averaged)
        self._means = nn.ModuleList(MeanMetric(nan_strategy="ignore") for _ in self.columns)

    def means(self) -> list[MeanMetric]:
        """One running mean per column."""
        return [cast(MeanMetric, mean) for mean in self._means]

    def update(self, scores: Mapping[str, Tensor], counted: Tensor) -> None:
        """Add scores (B,) by column; NaN and rows that only pad the batch are left out."""
        for name, mean in zip(self.columns, self.means(), strict=True):
            rows = counted & ~scores[name].isnan()
            mean.update(scores[name].nan_to_num(), rows.float())

    def compute(self) -> dict[str, float]:
        """Means by column, and ``average``."""
        means = {name: float(mean.compute()) for name, mean in zip(self.columns, self.means(), strict=True)}
        if not self.averaged:
            return means
        return means | {"average": sum(means[name] for name in self.averaged) / len(self.averaged)}

    def reset(self) -> None:
        """Forget every score."""
        for mean in self.means():
            mean.reset()
