"""What a checkpoint says of the run that made it, who may go on from it, and what then takes effect."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flowopd.models.adapters.lora import Adapter, Factors
from flowopd.training.ranks.strategies import FSDP2, is_sharded

MADE_BY = "made_by"
OPTIMIZER = "optimizer_as_built"
AVERAGE = "EMA"
SCALES = "scales"
STUDENT = "student"
"""The adapter that is trained."""
KEYS = {"state_dict", "loops", "global_step", "pytorch-lightning_version"}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, mapped from the disk.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not one of a run.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    content: Any = None
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # whatever torch finds in it, it is none of ours
            content = None
    if not isinstance(content, dict) or not content.keys() >= KEYS or not isinstance(content["state_dict"], dict):
        raise ValueError(f"checkpoint {str(path)!r} is not one of lightning; expected <run>/checkpoints/last.ckpt")
    return content


@dataclass(frozen=True)
class CheckpointAdapter:
    """The adapter in a checkpoint of a fit.

    Args:
        path: ``<run>/checkpoints/last.ckpt``, for example.
        average: the moving average of its weights, if the run kept one, or else the weights themselves.
    """

    path: str
    average: bool = True

    def adapter(self) -> Adapter:
        """Read it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no checkpoint, or has no average though one is asked for.
        """
        content = read_checkpoint(Path(self.path))
        if SCALES not in content:
            raise ValueError(
                f"checkpoint {self.path!r} does not say how strong its adapter is; name <run>/adapter instead"
            )
        if self.average and not average_in(content):
            raise ValueError(
                f"checkpoint {self.path!r} holds no average; say average: false, or train with flowopd.EMA"
            )
        tensors = average_in(content) if self.average else trained_in(content)
        factors: dict[tuple[str, str], Tensor] = {}
        for key, value in tensors.items():
            module, _, letter = key.removeprefix("network.").partition(".lora_")
            factors[module, letter[0]] = value.float()
        parts = {m: Factors(factors[m, "A"], factors[m, "B"], scale) for m, scale in content[SCALES].items()}
        return Adapter(parts)


def made_by(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint tells of the ranks that made it."""
    strategy = trainer.strategy
    name = "ddp" if isinstance(strategy, DDPStrategy) else getattr(strategy, "strategy_name", type(strategy).__name__)
    return {"strategy": name, "world_size": trainer.world_size}


def check_resumable(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raise unless a fit can go on from a checkpoint: there is something left, and the optimiser finds its state again.

    ``fsdp2`` saves it by name and in whole tensors, which every strategy reads; the others by number, which shards
    would mix up.

    Raises:
        ValueError: saying how many iterations are done, or who made the checkpoint.
    """
    done = iterations_of(checkpoint)
    if 0 <= (asked := trainer.max_epochs if trainer.max_epochs is not None else -1) < done:
        raise ValueError(
            f"the checkpoint has done {done} iterations, but trainer.max_epochs is {asked}; give {done} or more"
        )
    maker = checkpoint.get(MADE_BY, {"strategy": "unknown", "world_size": "unknown"})
    if is_sharded(trainer) and maker["strategy"] != FSDP2.strategy_name:
        raise ValueError(
            f"the checkpoint was made by strategy {maker['strategy']!r} (ranks: {maker['world_size']}); fsdp2 would "
            f"give its optimiser state to the wrong parameters; go on without fsdp2, or start anew from its adapter"
        )


def iterations_of(checkpoint: Mapping[str, Any]) -> int:
    """How many iterations a checkpoint has done."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def trained_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained parameters that a checkpoint holds, by name."""
    return {key: value for key, value in checkpoint["state_dict"].items() if f".{STUDENT}." in key}


def average_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The average that a checkpoint holds, by the names of the trained parameters; empty if it holds none."""
    state = checkpoint.get("callbacks", {}).get(AVERAGE) or {}
    return dict(zip(trained_in(checkpoint), state["shadow_params"], strict=True)) if state else {}


def as_built(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser was asked for, before its first step: its class, and the settings of every group."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups}


class Resumed:
    """Optimiser and schedule of a run that goes on, as the configuration asks for them now.

    What is unchanged goes on to the bit. Of what was changed, a setting of the optimiser holds from here on; and the
    schedule is made anew and stepped as often as the run was, so that the learning rate is the one that the new
    schedule has at this update.

    Args:
        checkpoint: of the run.
        optimizer, schedule: just built.

    Raises:
        ValueError: if the optimiser is another one, or the new schedule does not reach so far.
    """

    def __init__(self, checkpoint: Mapping[str, Any], optimizer: Optimizer, schedule: LRScheduler | None) -> None:
        asked = as_built(optimizer)
        before = checkpoint.get(OPTIMIZER, {"class": asked["class"], "groups": [{}] * len(asked["groups"])})
        if before["class"] != asked["class"]:
            raise ValueError(
                f"model.optimizer was {before['class']}, now {asked['class']}, which cannot read its state; give "
                f"{before['class']}, or start anew from the exported adapter"
            )
        self.schedule = _stepped(schedule, int(checkpoint["global_step"]))
        self.settings = [
            {name: value for name, value in now.items() if _moves(name, old, new, now)}
            for old, new, now in zip(before["groups"], asked["groups"], as_built(optimizer)["groups"], strict=True)
        ]

    def take_effect(self, trainer: Trainer) -> None:
        """Put them in place of what the checkpoint brought."""
        for group, settings in zip(trainer.optimizers[0].param_groups, self.settings, strict=True):
            group.update(settings)
        if self.schedule is not None:
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.schedule)


def _moves(name: str, before: Mapping[str, Any], asked: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting follows the schedule or was changed; others are left to the optimiser, which may adapt them."""
    return name in ("lr", "initial_lr") or before.get(name) != asked[name] or asked[name] != now[name]


def _stepped(schedule: LRScheduler | None, steps: int) -> dict[str, Any] | None:
    if schedule is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no optimiser step came between
        try:
            for _ in range(steps):
                schedule.step()
        except ValueError as error:
            raise ValueError(
                f"model.scheduler does not reach update {steps}, where the checkpoint stands: {error}"
            ) from error
    return dict(schedule.state_dict())
