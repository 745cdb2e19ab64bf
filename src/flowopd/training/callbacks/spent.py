"""What a run has spent so far."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from flowopd.training.callbacks.around import data_of
from flowopd.training.policy import FlowPolicy


class Spent(Callback):
    """Counts what training takes, and logs it with every iteration as totals since the start.

        spent/pictures     trajectories that were begun
        spent/forwards     rows of the backbone's network, guidance and the teachers that it carries included
        spent/backwards    those of them that were trained on

    Evaluations and models that teachers bring along are not counted. Over all ranks.
    """

    def __init__(self) -> None:
        self.total = dict.fromkeys(("pictures", "forwards", "backwards"), 0)
        self._handle: RemovableHandle | None = None
        self._counting = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, FlowPolicy) or pl_module.network is None:
            return
        ranks = trainer.world_size

        def count(module: nn.Module, inputs: Any, options: Any, output: Any) -> None:  # noqa: ANN401
            if self._counting and trainer.training:
                rows = ranks * _rows([*inputs, *options.values()])
                self.total["forwards"] += rows
                self.total["backwards"] += rows if torch.is_grad_enabled() else 0

        self._handle = pl_module.network.register_forward_hook(count, with_kwargs=True)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counting = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counting = False  # callbacks draw pictures now
        if self._handle is not None:
            data = data_of(trainer)
            self.total["pictures"] += data.prompts_per_iteration * data.group_size
            totals = {f"spent/{name}": float(total) for name, total in self.total.items()}
            pl_module.log_dict(totals, sync_dist=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._count_no_longer()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._count_no_longer()

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self.total)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = dict(state_dict)

    def _count_no_longer(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def _rows(given: list[Any]) -> int:
    return next((len(one) for one in given if isinstance(one, Tensor)), 0)
