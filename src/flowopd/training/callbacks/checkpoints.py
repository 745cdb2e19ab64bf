"""When a run is saved, and how to go on with it."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's, and one at the last iteration whatever its number."""

    @property
    def state_key(self) -> str:
        """The same whatever the rhythm, which may change between two halves of a run."""
        return "Checkpoints"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when it is time, or never again."""
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            self._every_n_epochs = 1
        super().on_train_epoch_end(trainer, pl_module)


class Farewell(Callback):
    """Says how to go on with a run that was interrupted."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the last checkpoint."""
        folder = Path(trainer.default_root_dir)
        last = folder / "checkpoints" / "last.ckpt"
        if not trainer.is_global_zero or not isinstance(exception, KeyboardInterrupt):
            return
        if last.exists():
            print(f"interrupted; go on with: flowopd fit --config {folder / 'config.yaml'} --ckpt_path {last}")
        else:
            print("interrupted before the first checkpoint; start again with the same command")
