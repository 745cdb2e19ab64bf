"""When a run is saved, and how to go on with it."""

from __future__ import annotations

import copy
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from flowopd.training.callbacks.around import run_folder
from flowopd.training.callbacks.guard import Alarm
from flowopd.training.ranks.folders import CHECKPOINTS


class Checkpoints(Checkpoint):
    """Writes the end of an iteration to ``<run>/checkpoints/last.ckpt``: now and then, at the end, and when stopped.

    The state at the end of every iteration is kept in memory, and whatever ends the run, that of the last whole
    iteration is written: no finished work is lost. It is written after the iteration was logged, so that the log of a
    run that goes on has no hole.

    Args:
        every: iterations between two files.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.last_model_path = ""
        self._state: dict[str, Any] | None = None
        self._iteration = 0

    @property
    @override
    def state_key(self) -> str:
        return "Checkpoints"  # whatever the rhythm, which may change between two halves of a run

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._state = None
        self.last_model_path = str(trainer.ckpt_path or "")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # all ranks gather what is sharded
        self._state = _copied(state) if trainer.is_global_zero else None
        self._iteration = trainer.current_epoch + 1

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._iteration % self.every == 0:
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not trainer.is_global_zero or isinstance(exception, Alarm):  # an alarm has said what is kept
            return
        with _undisturbed():
            self._write(trainer)
        if isinstance(exception, KeyboardInterrupt | SystemExit):
            self._say_how_to_go_on(trainer, "interrupted" if isinstance(exception, KeyboardInterrupt) else "terminated")

    def _write(self, trainer: Trainer) -> None:
        if self._state is None:
            return
        for logger in trainer.loggers:
            logger.save()
        path = run_folder(trainer) / CHECKPOINTS / "last.ckpt"
        trainer.strategy.checkpoint_io.save_checkpoint(self._state, path)
        self._state, self.last_model_path = None, str(path)

    def _say_how_to_go_on(self, trainer: Trainer, how: str) -> None:
        last, config = self.last_model_path, run_folder(trainer) / "config.yaml"
        if last and Path(last).exists():
            words = shlex.join(["flowopd", "fit", "--config", str(config), "--ckpt_path", last])
            print(f"{how}; go on with: {words}", flush=True)
        else:
            print(f"{how} before the first iteration was done; start again with the same command", flush=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No second signal breaks off what is written at the first."""
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _copied(state: Any) -> Any:  # noqa: ANN401
    """A state that later updates do not reach, off the device."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return copy.deepcopy(state)
