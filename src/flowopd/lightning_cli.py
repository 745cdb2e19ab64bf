"""LightningCLI with run folders, sentences for errors, and no surprises at resume."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

import flowopd
from flowopd.tiles import asset
from flowopd.training import AdapterExport, Progress

PACKAGE = str(Path(flowopd.__file__).parent)


class FlowCLI(LightningCLI):
    """``flowopd fit | validate | test | predict``: any module and data module by ``class_path``."""

    def __init__(self) -> None:
        options = {"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False},
            parser_kwargs={"prog": "flowopd", **options, **{name: options for name in self.subcommands()}},
        )

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values: Lightning would let those in the checkpoint win, silently."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its folder, its loggers and the callbacks that every run has."""
        folder = self._run_folder()
        print(f"run folder: {folder}", flush=True)
        self.trainer_defaults["callbacks"] = _standard_callbacks(folder, str(self.subcommand))
        kwargs = {"default_root_dir": str(folder), "enable_progress_bar": self.subcommand != "fit"} | kwargs
        kwargs.setdefault("logger", _loggers(folder) if self._chosen("trainer.logger") is None else None)
        return super().instantiate_trainer(**{key: value for key, value in kwargs.items() if value is not None})

    def _chosen(self, key: str) -> Any:  # noqa: ANN401
        return self._get(self.config, key, default=None)

    def _run_folder(self) -> Path:
        """The folder of the checkpoint when a fit goes on, else a fresh one: nothing is written over."""
        checkpoint = self._chosen("ckpt_path")
        wanted = Path(self._chosen("trainer.default_root_dir") or "runs/run")
        if "FLOWOPD_RUN_FOLDER" in os.environ:  # a launched rank follows rank 0
            return Path(os.environ["FLOWOPD_RUN_FOLDER"])
        if checkpoint and self.subcommand == "fit":
            folder = _folder_of(Path(checkpoint))
        else:
            folder = next(path for path in _numbered(wanted) if not path.exists())
        os.environ["FLOWOPD_RUN_FOLDER"] = str(folder)
        return folder


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


def run() -> None:
    """Parse, build and run. Bad input is one sentence and exit code 2."""
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("tiles", lambda name: str(asset(name)), replace=True)
    _quieten()
    try:
        FlowCLI()
    except jsonargparse.ArgumentError as error:
        _refuse(error)
    except (ValueError, OSError, KeyError) as error:
        if not _is_ours(error):
            raise
        _refuse(error)


def _refuse(error: Exception) -> None:
    if os.environ.get("FLOWOPD_DEBUG"):
        traceback.print_exc()
    print(f"flowopd: error: {_sentence(error)}", file=sys.stderr)
    raise SystemExit(2)


def _sentence(error: Exception) -> str:
    """The parser's many lines without the alternatives that nobody meant."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class 'NoneType'>")
    text = error.args[0] if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it on purpose; anything else keeps its traceback."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def _quieten() -> None:
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def _standard_callbacks(folder: Path, subcommand: str) -> list[Callback]:
    if subcommand != "fit":
        return []
    checkpoint = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="iteration={epoch}",
        auto_insert_metric_name=False,
        every_n_epochs=10,
        save_on_train_epoch_end=True,
        save_last="link",
        enable_version_counter=False,
    )
    return [Progress(), checkpoint, AdapterExport(), LearningRateMonitor(), Farewell()]


def _loggers(folder: Path) -> list[Any]:
    _keep(folder / "metrics.csv")
    return [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version="tensorboard")]


def _keep(file: Path) -> None:
    """Move an earlier file of a run that goes on out of the way."""
    if file.exists():
        file.rename(next(path for path in _numbered(file) if not path.exists()))


def _numbered(path: Path) -> Any:  # noqa: ANN401
    yield path
    for number in range(2, 10_000):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _folder_of(checkpoint: Path) -> Path:
    if not checkpoint.exists():
        raise FileNotFoundError(f"checkpoint {str(checkpoint)!r} does not exist")
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
