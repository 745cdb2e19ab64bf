"""How far a run is: a bar over its iterations, and a line for every score on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from flowopd.core.ranges import at_least
from flowopd.evaluation.tables import show
from flowopd.training.callbacks.bars import bar, say_scores
from flowopd.training.callbacks.results import ResultsTable
from flowopd.training.policy import FlowPolicy

SCORES = ("val/", "test/")
EQUAL = "reward/equal_groups"


class Progress(Callback):
    """A bar over the rollout iterations with the latest rewards or losses by task, and a line for every validation.

    Whatever else goes over held-out prompts has a bar of its own. ``flowopd validate``, and a test without
    ``ResultsTable``, end with their scores.

    Args:
        figures: how many of the latest figures to show.
    """

    def __init__(self, figures: int = 3) -> None:
        at_least(0, figures=figures)
        self.figures = figures
        self._bar: Any = None
        self._inner: Any = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is None:  # not before what is told at the start
            total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
            name, shown = _name(pl_module), trainer.is_global_zero
            self._bar = bar(total, name, shown, "it", trainer.current_epoch, leave=True)
        self._bar.set_postfix_str(_latest(trainer.callback_metrics, self.figures))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.update()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()  # so that the message stands on its own line

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, trainer.num_val_batches, "validating")

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._inner.update()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inner.close()
        scores = scores_in(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or not scores:
            return
        if trainer.state.fn == TrainerFn.FITTING and isinstance(pl_module, FlowPolicy):
            say_scores(f"iteration {trainer.current_epoch + 1}", scores, pl_module.scoreboard.averaged)
        else:
            show({_name(pl_module): scores})

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, trainer.num_test_batches, "testing")

    @override
    def on_test_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._inner.update()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inner.close()
        tables = [one for one in trainer.callbacks if isinstance(one, ResultsTable)]  # type: ignore[attr-defined]
        if trainer.is_global_zero and not tables and (scores := scores_in(trainer)):
            show({_name(pl_module): scores})

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, trainer.num_predict_batches, "drawing")

    @override
    def on_predict_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._inner.update()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inner.close()

    def _begin(self, trainer: Trainer, batches: Iterable[int | float], what: str) -> None:
        total = sum(batches)
        self._inner = bar(int(total) if math.isfinite(total) else None, what, trainer.is_global_zero)

    def _close(self) -> None:
        for one in (self._inner, self._bar):
            if one is not None:
                one.close()
        self._bar = None


def scores_in(trainer: Trainer) -> dict[str, float]:
    """What the latest evaluation logged, by score; distances to teachers keep their stage."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {name.removeprefix(stage): v for stage in SCORES for name, v in metrics.items() if name.startswith(stage)}
    average = {name: found.pop(name) for name in ("average",) if name in found}
    return found | average


def _name(module: LightningModule) -> str:
    return str(getattr(module, "name", type(module).__name__))


def _latest(metrics: Mapping[str, Any], count: int) -> str:
    """The first few rewards of the rollouts, else the losses by task, else whatever losses there are."""
    plain = {name: f"{float(value):.2g}" for name, value in metrics.items() if name.count("/") == 1}
    kinds = {
        "reward": [
            (name.removeprefix("reward/"), v)
            for name, v in plain.items()
            if name.startswith("reward/") and name != EQUAL
        ],
        "loss": [
            (name.removeprefix("loss_by_task/"), v) for name, v in plain.items() if name.startswith("loss_by_task/")
        ],
        "": [(name, v) for name, v in plain.items() if name.endswith("/loss")],
    }
    word, figures = next(((word, found) for word, found in kinds.items() if found), ("", []))
    return f"{word} {', '.join(f'{name} {value}' for name, value in figures[:count])}".strip() if count else ""
