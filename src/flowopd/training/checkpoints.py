"""What a checkpoint says of the ranks that made it, and who may go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from flowopd.training.ranks.strategies import FSDP2, is_sharded

MADE_BY = "made_by"
AVERAGE = "EMA"


def made_by(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint tells of the ranks that made it."""
    strategy = trainer.strategy
    name = "ddp" if isinstance(strategy, DDPStrategy) else getattr(strategy, "strategy_name", type(strategy).__name__)
    return {"strategy": name, "world_size": trainer.world_size}


def check_resumable(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raise unless the optimiser's state in a checkpoint finds its parameters again.

    ``fsdp2`` saves it by name and in whole tensors, which every strategy reads; the others by number, which shards
    would mix up.

    Raises:
        ValueError: saying who made the checkpoint.
    """
    maker = checkpoint.get(MADE_BY, {"strategy": "unknown", "world_size": "unknown"})
    if is_sharded(trainer) and maker["strategy"] != FSDP2.strategy_name:
        raise ValueError(
            f"the checkpoint was made by strategy {maker['strategy']!r} (ranks: {maker['world_size']}); fsdp2 would "
            f"give its optimiser state to the wrong parameters; go on without fsdp2, or start anew from its adapter"
        )


def average_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The average that a checkpoint holds, by the names of its trained parameters; empty if it holds none."""
    state = checkpoint.get("callbacks", {}).get(AVERAGE) or {}
    return dict(zip(checkpoint["state_dict"], state["shadow_params"], strict=True)) if state else {}
