"""An exponential moving average of the adapter, by diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.training_utils import EMAModel
from lightning import Callback, LightningModule, Trainer
from torch import nn


class EMA(Callback):
    """Averages the trained parameters after every optimiser step; evaluation and export use the average.

    Args:
        decay: the largest decay; it grows as (1 + n) / (10 + n) over the first n steps.
        every: optimiser steps between two averagings.
    """

    def __init__(self, decay: float = 0.99, every: int = 1) -> None:
        self.decay = decay
        self.every = every
        self._model: EMAModel | None = None
        self._restored: dict[str, Any] | None = None
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average at the current parameters, or where the checkpoint left it."""
        self._model = EMAModel(_trained(pl_module), decay=self.decay)
        if self._restored is not None:
            self._model.load_state_dict(self._restored)
            self._step = self._model.optimization_step * self.every
        self._model.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Average after an optimiser step, not after every micro-batch."""
        if trainer.global_step > self._step and trainer.global_step % self.every == 0:
            self._step = trainer.global_step
            self._averaged().step(_trained(pl_module))

    def swap_in(self, pl_module: LightningModule) -> None:
        """Put the average in place of the parameters."""
        if self._model is not None:
            self._model.store(_trained(pl_module))
            self._model.copy_to(_trained(pl_module))

    def swap_out(self, pl_module: LightningModule) -> None:
        """Put the parameters back."""
        if self._model is not None:
            self._model.restore(_trained(pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average."""
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the parameters."""
        self.swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the average: what follows evaluates and exports it."""
        self.swap_in(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what is trained, also while the average is in its place (lightning may save after the last step)."""
        if self._model is not None and self._model.temp_stored_params is not None:
            names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
            checkpoint["state_dict"] |= dict(zip(names, self._model.temp_stored_params, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The average, its step and its settings."""
        return {} if self._model is None else self._model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the average until the parameters are there."""
        self._restored = state_dict or None

    def _averaged(self) -> EMAModel:
        assert self._model is not None
        return self._model


def _trained(module: LightningModule) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
