"""A bar over the rollout iterations."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from tqdm.auto import tqdm
from typing_extensions import override

from flowopd.core.ranges import at_least


class Progress(Callback):
    """One bar over the rollout iterations, with rate, time left and the latest figures.

    Args:
        figures: how many of the latest metrics to show.
    """

    def __init__(self, figures: int = 4) -> None:
        at_least(0, figures=figures)
        self.figures = figures
        self._bar: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self._bar = tqdm(
            total=total,
            initial=trainer.current_epoch,
            unit="it",
            desc=type(pl_module).__name__,
            disable=not trainer.is_global_zero,
            dynamic_ncols=True,
        )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        telling = sorted(trainer.callback_metrics.items(), key=lambda metric: _rank_of(metric[0]))
        self._bar.set_postfix({name: f"{float(v):.3g}" for name, v in telling[: self.figures]}, refresh=False)
        self._bar.update()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()  # so that the message stands on its own line


def _rank_of(metric: str) -> int:
    """What is learnt comes first, then how, last what the optimiser does."""
    ranks = {
        "reward/": 0,
        "distill/": 0,
        "val/average": 1,
        "val/": 2,
        "policy/": 4,
        "lr-": 5,
        "loss_by_": 6,
        "spent/": 6,
    }
    return next((rank for start, rank in ranks.items() if metric.startswith(start)), 3)
