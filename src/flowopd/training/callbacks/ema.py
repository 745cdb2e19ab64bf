"""An exponential moving average of the adapter, by diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from flowopd.core.ranges import at_least, within
from flowopd.models.shards import shard_like, whole
from flowopd.training.checkpoints import AVERAGE


class EMA(Callback):
    """Averages the trained parameters after every optimiser step; evaluation and export use the average.

    Sharded ranks average their own parts; a checkpoint holds the whole.

    Args:
        decay: the largest decay; it grows as (1 + n) / (10 + n) over the first n steps.
        every: optimiser steps between two averagings.
    """

    def __init__(self, decay: float = 0.99, every: int = 1) -> None:
        within(0.0, 1.0, decay=decay)
        at_least(1, every=every)
        self.decay = decay
        self.every = every
        self._model: EMAModel | None = None
        self._restored: dict[str, Any] | None = None
        self._step = 0

    @property
    def state_key(self) -> str:
        """Where ``average_in`` finds the average."""
        return AVERAGE

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average at the current parameters, or where the checkpoint left it."""
        parameters = list(_trained(pl_module).values())
        self._model = EMAModel(parameters, decay=self.decay)
        if self._restored is not None:
            self._model.load_state_dict(self._restored)
            self._model.shadow_params = list(map(shard_like, self._model.shadow_params, parameters))
            self._step = self._model.optimization_step * self.every
        self._model.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Average after an optimiser step, not after every micro-batch."""
        if trainer.global_step > self._step and trainer.global_step % self.every == 0:
            self._step = trainer.global_step
            self._averaged().step(_trained(pl_module).values())

    def swap_in(self, pl_module: LightningModule) -> None:
        """Put the average in place of the parameters."""
        if self._model is not None:
            self._model.store(_trained(pl_module).values())
            self._model.copy_to(_trained(pl_module).values())

    def swap_out(self, pl_module: LightningModule) -> None:
        """Put the parameters back."""
        if self._model is not None:
            self._model.restore(_trained(pl_module).values())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average."""
        if trainer.state.fn == TrainerFn.FITTING:  # elsewhere the policy found it in the checkpoint
            self.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the parameters."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the average: what follows evaluates and exports it."""
        self.swap_in(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what is trained, also while the average is in its place (lightning may save after the last step)."""
        if self._model is not None and self._model.temp_stored_params is not None:
            stored = map(whole, self._model.temp_stored_params)
            checkpoint["state_dict"] |= dict(zip(_trained(pl_module), stored, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The average, its step and its settings."""
        if self._model is None:
            return {}
        return {**self._model.state_dict(), "shadow_params": list(map(whole, self._model.shadow_params))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the average until the parameters are there."""
        self._restored = state_dict or None

    def _averaged(self) -> EMAModel:
        assert self._model is not None
        return self._model


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """The average in place of the parameters for a while, if the trainer keeps one."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    for ema in averages:
        ema.swap_in(trainer.lightning_module)
    try:
        yield
    finally:
        for ema in averages:
            ema.swap_out(trainer.lightning_module)


def _trained(module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
