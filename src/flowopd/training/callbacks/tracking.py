"""Pictures, tables and the configuration, for whichever loggers a run has; numbers are Lightning's own work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from flowopd.evaluation import markdown_table
from flowopd.evaluation.pictures import to_uint8
from flowopd.evaluation.tables import Table, cells, columns
from flowopd.training.callbacks.around import run_folder


def track_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Tell every logger how the run was configured: its settings by name, and ``config.yaml`` where files are kept."""
    file = run_folder(trainer) / "config.yaml"
    for logger in trainer.loggers:
        if not (isinstance(logger, MLFlowLogger) and trainer.global_step):  # there they may never change
            logger.log_hyperparams({name: _plain(value) for name, value in settings.items()})
        if file.is_file():
            _keep(logger, file)


def track_pictures(
    trainer: Trainer, images: Mapping[str, Tensor], captions: Sequence[str], sheet: Path, step: int
) -> None:
    """Show every logger pictures of some models.

    Args:
        trainer: of the run.
        images: (B, 3, H, W) in [0, 1] of each model.
        captions: B prompts.
        sheet: the PNG that has all of them, for loggers that keep files.
        step: iteration after which they were drawn.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for model, drawn in images.items():
                logger.log_image(f"images/{model}", [*map(to_uint8, drawn)], step=step, caption=[*captions])
        elif isinstance(logger, TensorBoardLogger):
            for model, drawn in images.items():
                logger.experiment.add_images(f"images/{model}", drawn.cpu(), step)
        else:
            _keep(logger, sheet, "images")


def track_table(trainer: Trainer, name: str, table: Table) -> None:
    """Show every logger a table that lies as ``<name>.md`` in the folder of the run."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, ["model", *columns(table)], cells(table), step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(table), trainer.global_step)
        else:
            _keep(logger, run_folder(trainer) / f"{name}.md")


def _keep(logger: Any, file: Path, folder: str | None = None) -> None:  # noqa: ANN401
    """Give a file to a logger that keeps files."""
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file), folder)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_asset(str(file), f"{folder}/{file.name}" if folder else file.name)


def _plain(value: Any) -> Any:  # noqa: ANN401
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
