"""Where the curves of a run begin."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flowopd.training.callbacks.around import data_of
from flowopd.training.callbacks.bars import say_scores
from flowopd.training.callbacks.log import MetricsFile
from flowopd.training.callbacks.results import ResultsTable, evaluate
from flowopd.training.policy import FlowPolicy


class StartScores(Callback):
    """Validates what a run starts from, says it, and logs it as the iteration 0.

    In ``metrics.csv`` its epoch and step are -1; other loggers know it as step 0. Where ``ResultsTable`` has scored the
    cold start, its scores are taken. A run that validates nothing has none.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            not trainer.loggers
            or trainer.global_step
            or not isinstance(pl_module, FlowPolicy)
            or not _validates(trainer)
        ):
            return
        tables = [one for one in trainer.callbacks if isinstance(one, ResultsTable)]  # type: ignore[attr-defined]
        known = [row for table in tables for row in table.rows.values()]
        scores = known[0] if known else evaluate(pl_module, pl_module.velocity, "start")
        named = {name if name.startswith("fixed_kl/") else f"val/{name}": value for name, value in scores.items()}
        for logger in trainer.loggers:
            own = isinstance(logger, MetricsFile)
            logger.log_metrics({"epoch": -1, **named} if own else named, step=-1 if own else 0)
            logger.save()
        if trainer.is_global_zero:
            say_scores("start", scores, pl_module.scoreboard.averaged)


def _validates(trainer: Trainer) -> bool:
    every, last = trainer.check_val_every_n_epoch or 1, trainer.max_epochs
    begun = last is None or last < 0 or every <= last
    return bool(begun and trainer.limit_val_batches and data_of(trainer).evaluation_count)
