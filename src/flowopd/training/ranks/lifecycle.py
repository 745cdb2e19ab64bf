"""How a run lives among many: one folder for all ranks, whole checkpoints, an orderly end when the scheduler asks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_first() -> bool:
    """Whether this process is rank zero, by what torchrun, SLURM or Lightning told it; known before ranks have met."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def check_launch(trainer: Trainer) -> None:
    """Raise unless the trainer has a rank for every process of the launcher; processes beyond would train alone.

    Raises:
        ValueError: with both numbers.
    """
    known = {"torchrun": TorchElasticEnvironment.detect(), "SLURM": SLURMEnvironment.detect()}
    launcher = next((name for name, detected in known.items() if detected), None)
    if launcher is None:
        return
    started = int(os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_NTASKS"])
    if started != (ranks := trainer.num_devices * trainer.num_nodes):
        raise ValueError(
            f"{launcher} starts {started} processes, but the trainer has {ranks} ranks ({trainer.num_nodes} nodes of "
            f"{trainer.num_devices} devices); set trainer.num_nodes and trainer.devices, and start one process per rank"
        )


class SharedFolder(Callback):
    """Every rank works in the folder that rank zero chose, on other nodes too."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Be told, as soon as the ranks have met."""
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]


class OrderlyEnd(Callback):
    """Ends a fit after the running iteration when the scheduler sends SIGUSR1.

    Nothing is saved inside the signal's handler, where the other ranks could be anywhere: the iteration is finished by
    all, and its checkpoint goes on bit for bit. ``#SBATCH --signal=USR1@600`` sends it ten minutes before the end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen."""
        self.asked, self._before = False, signal.signal(signal.SIGUSR1, self._hear)

    def _hear(self, *_: Any) -> None:
        self.asked = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop all ranks if one of them was asked to."""
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer.should_stop = True
            rank_zero_info(f"SIGUSR1: stopping after iteration {trainer.current_epoch + 1}; go on from its checkpoint")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no longer."""
        signal.signal(signal.SIGUSR1, self._before)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete: a full disk harms no older one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write it.

        Raises:
            OSError: saying that it could not be written, and why.
        """
        partial = Path(f"{path}.partial")
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"checkpoint {path} could not be written ({error}); older ones are untouched") from error


def plugins() -> list[Any]:
    """What a trainer of ours is given besides its strategy.

    Under SLURM Lightning must not requeue a job by itself: it would save within the handler of a signal.
    """
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [WholeCheckpoints(), *([SLURMEnvironment(auto_requeue=False)] if slurm else [])]
