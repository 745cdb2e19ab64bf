"""Losses of an iteration by task and by step of the grid."""

from __future__ import annotations

import torch
from lightning import LightningModule
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.objectives import Objective
from flowopd.core.tensors import picks
from flowopd.records import StepBatch
from flowopd.training.ranks.sums import added_over_ranks


class Losses:
    """Means of an iteration's losses, ``loss_by_task/<task>`` and ``loss_by_step/<step>``.

    Of a task: the objective on its rows alone. Nothing is sampled for it, and no device is waited for before the end.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def see(self, objective: Objective, student: Transition, batch: StepBatch, loss: Tensor) -> None:
        """Remember a batch.

        Args:
            objective: what it is trained on.
            student: its steps; no gradient is followed.
            batch: as it was labelled.
            loss: of all its rows, without gradient.
        """
        for task in dict.fromkeys(batch.tasks):
            rows = [row for row, other in enumerate(batch.tasks) if other == task]
            own = loss
            if len(rows) < len(batch.tasks):
                chosen = picks(rows, batch.x.device)
                own, _ = objective.loss(student[chosen], batch.labels[chosen])
            self._add(f"loss_by_task/{task}", own, len(rows))
        if batch.step is not None:
            self._add(f"loss_by_step/{batch.step}", loss, len(batch.tasks))

    def _add(self, name: str, loss: Tensor, rows: int) -> None:
        total, count = self._seen.get(name, (torch.zeros_like(loss), 0))
        self._seen[name] = (total + rows * loss, count + rows)

    def means(self, module: LightningModule) -> dict[str, float]:
        """What was seen since the last call, over all ranks."""
        own = {name: [float(total), float(count)] for name, (total, count) in self._seen.items()}
        self._seen = {}
        return {name: total / count for name, (total, count) in sorted(added_over_ranks(module, own).items())}
