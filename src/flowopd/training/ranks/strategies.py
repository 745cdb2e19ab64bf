"""Strategies of several ranks: which ones work here, the sharded one, and who may go on from whose checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flowopd.models.shards import shard

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


class FSDP2(ModelParallelStrategy):
    """Every rank keeps its part of the backbone, of all adapters and of the optimiser's state.

    Chosen by ``trainer.strategy: fsdp2``. A forward gathers one block at a time, so all ranks must run the same number
    of forwards. Checkpoints are one file of whole tensors, of what is trained alone.

    Args:
        timeout: how long a rank waits for the others.
    """

    strategy_name = "fsdp2"

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: in the order of every other strategy."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: when every other strategy does it."""
        return True

    def setup_environment(self) -> None:
        """Shard over all ranks; Lightning's own default would train every rank for itself."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse a module that is not sharded: its ranks would drift apart.

        Raises:
            ValueError: naming the module.
        """
        assert self.lightning_module is not None
        if not any(isinstance(parameter, DTensor) for parameter in self.lightning_module.parameters()):
            name = type(self.lightning_module).__name__
            raise ValueError(f"{name} has nothing that strategy 'fsdp2' could shard; use ddp")
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False  # what is gathered first inside of it could never be trained
        super().setup(trainer)

    def shard(self, network: nn.Module) -> None:
        """Spread a network that carries all of its adapters over the ranks."""
        shard(network, self.device_mesh["data_parallel"])

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module calls its state, whole, on rank zero."""
        assert self.lightning_module is not None
        return get_model_state_dict(self.lightning_module, options=WHOLE)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ANN401
        """Read the file; nothing is loaded before the module has looked at it."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every rank its part."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state by the parameters' names, whole, on rank zero."""
        assert self.lightning_module is not None
        inner = getattr(optimizer, "_optimizer", optimizer)
        return dict(get_optimizer_state_dict(self.lightning_module, inner, options=WHOLE))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its part."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.lightning_module, optimizer, state, options=options)


StrategyRegistry.register(FSDP2.strategy_name, FSDP2, "Shards backbone, adapters and optimiser", override=True)


def is_sharded(trainer: Trainer) -> bool:
    """Whether a forward of one rank waits for the others."""
    return isinstance(trainer.strategy, FSDP2)


def check_name(name: Any) -> None:  # noqa: ANN401 - a name, a strategy, or its class_path in a namespace
    """Raise for a strategy that this package cannot train under, before Lightning builds it.

    Raises:
        ValueError: naming the one to use instead.
    """
    name = str(getattr(name, "class_path", name)).rpartition(".")[2]
    if name.lower().startswith(("fsdp", "deepspeed", "xla", "hpu")) and name not in ("fsdp2", "FSDP2"):
        raise ValueError(
            f"strategy {name!r} is not supported: it knows no rollouts, and most weights here are frozen; use fsdp2 "
            f"to shard, or ddp"
        )


def check_trainer(trainer: Trainer) -> None:
    """Raise for a strategy, however it was built, or a precision that this package cannot train under.

    Raises:
        ValueError: naming those that work.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | FSDP2):
        name = type(trainer.strategy).__name__
        raise ValueError(f"strategy {name} is not supported; use ddp, fsdp2 to shard, or a single device")
    if trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"precision {trainer.precision!r} would round the adapter after every update; use bf16-mixed, and the "
            f"backbone's own dtype for the frozen weights"
        )
    if trainer.precision == "16-mixed" and is_sharded(trainer):
        raise ValueError(
            "precision '16-mixed' does not work under strategy 'fsdp2', whose gradients are in parts; "
            "use bf16-mixed, or ddp"
        )


def check_halves(precision: str, dtype: torch.dtype | None) -> None:
    """Raise where every frozen weight would be cast in every forward, from one half precision to the other.

    Args:
        precision: of the trainer.
        dtype: of the frozen weights, if that is known.

    Raises:
        ValueError: naming what fits.
    """
    halves = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    computed = halves.get(precision)
    if computed is not None and dtype in halves.values() and dtype != computed:
        fits = next(name for name, half in halves.items() if half == dtype)
        raise ValueError(
            f"precision {precision!r} would cast every frozen weight from {str(dtype)[6:]} in every forward; give "
            f"trainer.precision {fits}, or the backbone dtype {str(computed)[6:]}"
        )


def check_places(places: Iterable[tuple[str, str | None]], ranks: int) -> None:
    """Raise for a teacher on a card of its own that every rank of a machine would fill.

    Args:
        places: teachers by name, and the device that each asks for.
        ranks: on a machine.

    Raises:
        ValueError: naming teacher and card.
    """
    for name, place in places:
        if ranks > 1 and place is not None and torch.device(place).type != "cpu" and ":" in place:
            raise ValueError(
                f"teacher {name!r} lives on {place}, where all {ranks} ranks of a machine would put it; leave its "
                "device out, so that each has it on its own card, or say cpu"
            )
