"""The folder of a run, made when everything was accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from flowopd.training.callbacks.tracking import track_settings
from flowopd.training.ranks.folders import CHECKPOINTS, Claim

CONFIG = "config"
"""What a checkpoint calls the settings of the run that made it."""


class RunFolder(Callback):
    """Makes the folder of a run at the last moment: a refused command leaves none, and changes nothing in one.

    Every rank works in the folder that rank zero chose, on other nodes too.

    Args:
        wanted: the folder, if nobody has it; the next free number, if somebody does.
        of_run: whether it is the folder of a checkpoint that goes on, instead.
        write_config: writes the run's configuration to a file.
        loggers: makes the loggers, given the folder and the optimiser steps that its log shall keep.
        settings: of the run, by name; every checkpoint tells them.
        notice: said when the run begins.
    """

    def __init__(
        self,
        wanted: Path,
        of_run: bool = False,
        write_config: Callable[[Path], None] | None = None,
        loggers: Callable[[Path, int], list[Logger]] | None = None,
        settings: Mapping[str, Any] | None = None,
        notice: str = "",
    ) -> None:
        self.wanted = wanted
        self.of_run = of_run
        self.write_config = write_config
        self.loggers = loggers
        self.settings = dict(settings or {})
        self.notice = notice
        self.folder: Path | None = None
        """Once there is one; on rank zero alone."""
        self._claim: Claim | None = None
        self._begun = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)  # there was nothing to train: a merge, or a run that had ended

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG] = self.settings

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def _begin(self, trainer: Trainer) -> None:
        if self._begun:
            return
        self._begun = True
        folder = Path(trainer.strategy.broadcast(str(self._take(trainer)) if trainer.is_global_zero else ""))
        trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]
        if self.loggers is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.loggers = self.loggers(folder, trainer.global_step)
        if trainer.is_global_zero:
            self.folder = folder
            track_settings(trainer, self.settings)
            print("\n".join(filter(None, [f"run folder: {folder}", self.notice])), flush=True)

    def _take(self, trainer: Trainer) -> Path:
        self._claim = Claim.of_run(self.wanted) if self.of_run else Claim.fresh(self.wanted)
        folder = self._claim.folder
        if trainer.state.fn == TrainerFn.FITTING:
            (folder / CHECKPOINTS).mkdir(exist_ok=True)  # before all else: by it a fit that was killed is known
        if self.write_config is not None:
            partial = folder / "config.yaml.partial"
            self.write_config(partial)
            partial.replace(folder / "config.yaml")
        return folder

    def _let_go(self) -> None:
        if self._claim is not None:
            self._claim.release()
        self._begun = False
