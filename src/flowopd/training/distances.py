"""How far every task still is from its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning import LightningModule
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.objectives import squared_error
from flowopd.records import StepBatch
from flowopd.training.ranks.sums import added_over_ranks


class _Noted(NamedTuple):
    """Squared errors (B,) of the rows of a batch."""

    step: int
    tasks: Sequence[str]
    errors: Tensor


class Distances:
    """Squared distances of velocities to the teachers', by task and step, over the rows of an iteration.

    Args:
        num_steps: of a rollout.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._noted: list[_Noted] = []

    def note(self, student: Transition, batch: StepBatch) -> None:
        """Remember the rows of a batch, if they are of a step of a rollout and know their teacher's velocity."""
        if batch.step is not None and batch.labels.target is not None:
            errors = squared_error(student.detach(), batch.labels.target)  # stays on the device until the end
            self._noted.append(_Noted(batch.step, batch.tasks, errors))

    def taken(self, module: LightningModule) -> dict[str, dict[int, float]]:
        """Means over the rows of all ranks, by task and step; forgets them."""
        own: dict[str, list[float]] = {}
        for step, tasks, errors in self._noted:
            for task, error in zip(tasks, errors.tolist(), strict=True):
                sums = own.setdefault(task, [0.0] * 2 * self.num_steps)  # of errors, then of rows, at every step
                sums[step] += error
                sums[self.num_steps + step] += 1
        self.forget()
        return {task: self._means(sums) for task, sums in added_over_ranks(module, own).items()} if own else {}

    def forget(self) -> None:
        """Forget what an iteration left that did not end."""
        self._noted = []

    def _means(self, sums: Sequence[float]) -> dict[int, float]:
        steps = range(self.num_steps)
        return {j: sums[j] / rows for j in steps if (rows := sums[self.num_steps + j])}
