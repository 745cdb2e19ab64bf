"""How a run lives among many: whole checkpoints, an orderly end when the scheduler asks."""

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
from typing_extensions import override

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


class OrderlyEnd(Callback):
    """Ends a fit after the running iteration when the scheduler sends SIGUSR1; SIGTERM ends any run at once.

    Nothing is saved inside a signal's handler, where the other ranks could be anywhere. At SIGUSR1 the iteration is
    finished by all, and its checkpoint goes on bit for bit; ``#SBATCH --signal=USR1@600`` sends it ten minutes before
    the end. SIGTERM leaves seconds: the run stops where it is, as at Ctrl-C, and ends with exit code 143.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.asked = False
        self._before = signal.signal(signal.SIGUSR1, self._hear)

    def _hear(self, *_: Any) -> None:
        self.asked = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heed_sigterm(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heed_sigterm(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heed_sigterm(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heed_sigterm(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer.should_stop = True
            rank_zero_info(f"SIGUSR1: stopping after iteration {trainer.current_epoch + 1}; go on from its checkpoint")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._listen_no_longer()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._listen_no_longer()

    def _listen_no_longer(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def _heed_sigterm(self, trainer: Trainer) -> None:
        """Replace Lightning's own handler, until the trainer puts back what was before both.

        That one asks the other ranks from inside the handler, and ends with exit code 0.
        """

        def terminate(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if (launcher := trainer.strategy.launcher) is not None:
                launcher.kill(signal.SIGTERM)  # the ranks that it has started
            raise SystemExit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, terminate)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete: a full disk harms no older one."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it.

        Raises:
            OSError: saying that it could not be written, and why.
        """
        partial = Path(f"{path}.partial")
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            partial.replace(path)
        except OSError as error:
            raise OSError(f"checkpoint {path} could not be written ({error}); older ones are untouched") from error
        finally:
            partial.unlink(missing_ok=True)


def plugins() -> list[Any]:
    """What a trainer of ours is given besides its strategy.

    Under SLURM Lightning must not requeue a job by itself: it would save within the handler of a signal.
    """
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [WholeCheckpoints(), *([SLURMEnvironment(auto_requeue=False)] if slurm else [])]
