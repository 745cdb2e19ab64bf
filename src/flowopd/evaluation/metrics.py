"""Means by group, exact over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric


class Tally(Metric):
    """Sums, counts and failures of G groups in float64, added over ranks.

    Args:
        size: G.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    failed: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("total", "count", "failed"):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor, group: Tensor, weight: Tensor) -> None:
        """Add values (B,), the numbers of their groups (B,) and their weights (B,); what is not finite failed."""
        members = one_hot(group, len(self.total)).double() * weight.double()[:, None]
        scored = values.isfinite()
        self.total = self.total + (members * values.double()[:, None])[scored].sum(0)
        self.count = self.count + members[scored].sum(0)
        self.failed = self.failed + members[~scored].sum(0)


class GroupedMean(Tally):
    """Means of scores by group, and over all,  m_g = Σ w · r / Σ w  over the rows of group g that have a score.

    A NaN is a score that failed: left out, and counted. A weight of 0 makes a row count for nothing, such as those that
    only fill a rank's last batch. States are float64 sums, added over ranks: however the rows are dealt out, the means
    are the same.

    Args:
        groups: names, in order.
        macro: ``overall`` is the mean of the groups' means (GenEval); otherwise, of all rows.

    Raises:
        ValueError: if a group is called ``overall``.

    >>> metric = GroupedMean(["counting", "colors"], macro=True)
    >>> metric.update(torch.tensor([1.0, 0.0, 0.5, torch.nan]), ["colors", "colors", "counting", "counting"])
    >>> {name: float(value) for name, value in metric.compute().items()}
    {'counting': 0.5, 'colors': 0.5, 'overall': 0.5, 'counting/failed': 1.0}
    """

    def __init__(self, groups: Sequence[str], macro: bool = False) -> None:
        super().__init__(len(groups))
        if "overall" in groups:
            raise ValueError("a group is called 'overall', as is the mean over all groups; rename it")
        self.groups = list(groups)
        self.macro = macro

    def update(self, values: Tensor, group: Sequence[str] | Tensor, weight: Tensor | None = None) -> None:
        """Add scores.

        Args:
            values: (B,), NaN where scoring failed.
            group: B names, or their numbers (B,) long.
            weight: (B,), 0 for rows that do not count; default: 1.

        Raises:
            ValueError: on an unknown group.
        """
        numbers = group if isinstance(group, Tensor) else torch.tensor([self._number(name) for name in group])
        self.add(values, numbers.long().to(values.device), torch.ones_like(values) if weight is None else weight)

    def _number(self, name: str) -> int:
        if name not in self.groups:
            raise ValueError(f"there is no group {name!r}; expected one of {', '.join(self.groups)}")
        return self.groups.index(name)

    def compute(self) -> dict[str, Tensor]:
        """Means by group and ``overall``, without groups that have no score; ``<group>/failed`` where some failed."""
        scored = [number for number in range(len(self.groups)) if self.count[number]]
        means = {self.groups[number]: self.total[number] / self.count[number] for number in scored}
        failed = {f"{name}/failed": n for name, n in zip(self.groups, self.failed, strict=True) if n}
        if not means:
            return failed
        overall = torch.stack(list(means.values())).mean() if self.macro else self.total.sum() / self.count.sum()
        return means | {"overall": overall} | failed
