"""An exponential moving average of the adapter, by diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from flowopd.core.ranges import at_least, within
from flowopd.models.shards import shard_like, whole
from flowopd.training.checkpoints import AVERAGE


class EMA(Callback):
    """Averages the trained parameters after every optimiser step; evaluation and export use the average.

    Sharded ranks average their own parts; a checkpoint holds the whole.

    Args:
        decay: the largest decay; after n optimiser steps it is (1 + n) / (10 + n), if that is smaller.
        every: optimiser steps between two averagings.
    """

    def __init__(self, decay: float = 0.99, every: int = 1) -> None:
        within(0.0, 1.0, decay=decay)
        at_least(1, every=every)
        self.decay = decay
        self.every = every
        self._model: EMAModel | None = None
        self._restored: dict[str, Any] | None = None

    @property
    @override
    def state_key(self) -> str:
        return AVERAGE  # where ``average_in`` looks for it

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = list(_trained(pl_module).values())
        self._model = EMAModel(parameters, decay=self.decay)
        if self._restored is not None:  # its settings are those of this run, whatever they were before
            self._model.shadow_params = list(map(shard_like, self._restored["shadow_params"], parameters))
            self._model.optimization_step = self._restored["optimization_step"]
        self._model.to(pl_module.device)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        model, steps = self._averaged(), trainer.global_step
        if steps > model.optimization_step and steps % self.every == 0:  # not after every micro-batch
            model.optimization_step = steps - 1  # it counts this one itself; those without averaging count too
            model.step(_trained(pl_module).values())

    def swap_in(self, pl_module: LightningModule) -> None:
        """Put the average in place of the parameters."""
        if self._model is not None:
            self._model.store(_trained(pl_module).values())
            self._model.copy_to(_trained(pl_module).values())

    def is_in(self) -> bool:
        """Whether the average is in place of the parameters."""
        return self._model is not None and self._model.temp_stored_params is not None

    def swap_out(self, pl_module: LightningModule) -> None:
        """Put the parameters back."""
        if self._model is not None:
            self._model.restore(_trained(pl_module).values())

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # elsewhere the policy found the average in the checkpoint
            self.swap_in(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.swap_out(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap_in(pl_module)  # whoever looks at the module after a fit finds the average

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what is trained, also while the average is in its place (lightning may save after the last step)."""
        if self.is_in():
            assert self._model is not None
            stored = map(whole, self._model.temp_stored_params)
            checkpoint["state_dict"] |= dict(zip(_trained(pl_module), stored, strict=True))

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._model is None:
            return {}
        return {**self._model.state_dict(), "shadow_params": list(map(whole, self._model.shadow_params))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None  # until the parameters are there

    def _averaged(self) -> EMAModel:
        assert self._model is not None
        return self._model


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """The average in place of the parameters for a while, if the trainer keeps one and it is not there already."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averages = [callback for callback in callbacks if isinstance(callback, EMA) and not callback.is_in()]
    for ema in averages:
        ema.swap_in(trainer.lightning_module)
    try:
        yield
    finally:
        for ema in averages:
            ema.swap_out(trainer.lightning_module)


def _trained(module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
