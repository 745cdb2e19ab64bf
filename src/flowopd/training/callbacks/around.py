"""What a callback finds around it: the policy, its data, and the folder of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer

from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps everything."""
    return Path(trainer.default_root_dir)


def policy_of(module: Any) -> FlowPolicy:  # noqa: ANN401
    """The module that is trained."""
    return cast(FlowPolicy, module)


def data_of(trainer: Trainer) -> RolloutDataModule:
    """The data module of the trainer."""
    return cast(RolloutDataModule, trainer.datamodule)  # type: ignore[attr-defined]


def on_device(trainer: Trainer, module: LightningModule) -> FlowPolicy:
    """The policy where it was trained; lightning moves it to the CPU before it says that the fit ends."""
    return policy_of(module.to(trainer.strategy.root_device))
