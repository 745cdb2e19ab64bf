"""LightningCLI with run folders, sentences for errors, and no surprises at resume."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from diffusers.utils.logging import disable_progress_bar as hide_diffusers_bars
from jsonargparse.typing import PositiveInt
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils.logging import disable_progress_bar as hide_transformers_bars

from flowopd.cli.folders import folder_of, keep_aside, numbered
from flowopd.cli.sentences import meant, sentence_of
from flowopd.preflight.check import SelfCheck
from flowopd.preflight.check import check as check_run
from flowopd.preflight.forwards import idle_trainer
from flowopd.preflight.plan import Hardware, measured
from flowopd.preflight.plan import plan as make_plan
from flowopd.preflight.tables import show_plan
from flowopd.tiles import asset
from flowopd.training import AdapterExport, FlowPolicy, PictureFolder, Progress, RolloutDataModule
from flowopd.training.callbacks.checkpoints import Checkpoints, Farewell
from flowopd.training.callbacks.guard import Guard
from flowopd.training.callbacks.results import MergeReport
from flowopd.training.ranks.lifecycle import OrderlyEnd, SharedFolder, check_launch, is_first, plugins
from flowopd.training.ranks.strategies import check_name
from flowopd.training.signals import signals_among


class BadInput(Exception):
    """The run cannot be built as it was asked for."""


class FlowCLI(LightningCLI):
    """``flowopd fit | validate | test | predict``: any module and data module by ``class_path``."""

    refusal = "flowopd: error"

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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run has besides a model, data and a trainer."""
        parser.add_argument(
            "--checkpoint_every", type=PositiveInt, default=10, help="iterations between two checkpoints of a fit"
        )
        parser.add_argument(
            "--updates_per_iteration",
            type=PositiveInt | None,
            default=None,
            help="optimiser steps per iteration, whatever batches and ranks: sets trainer.accumulate_grad_batches",
        )

    def before_instantiate_classes(self) -> None:
        """Pictures go to files, not to memory."""
        if self.subcommand == "predict":
            self.config.predict.return_predictions = False

    def instantiate_classes(self) -> None:
        """Whatever refuses what it is given while things are built, here or in a library, refuses the input."""
        try:
            super().instantiate_classes()
        except (ValueError, RuntimeError, OSError, MisconfigurationException) as error:
            raise BadInput(sentence_of(meant(error) or error)) from error

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values: Lightning would let those in the checkpoint win, silently."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its folder, its loggers and the callbacks that every run has."""
        signals_among(self._get(self.config_init, "trainer.callbacks", default=None) or [])
        check_name(self._chosen("trainer.strategy"))
        folder = self._run_folder()
        if is_first():
            print(f"run folder: {folder}", flush=True)
        self.trainer_defaults["callbacks"] = _standard_callbacks(
            folder, str(self.subcommand), self._chosen("checkpoint_every")
        )
        self.trainer_defaults["callbacks"] += self._guards()
        kwargs = {"default_root_dir": str(folder), "enable_progress_bar": self.subcommand != "fit"} | kwargs
        kwargs["plugins"] = [*_listed(self._get(self.config_init, "trainer.plugins", default=None)), *plugins()]
        kwargs.setdefault("logger", _loggers(folder) if self._chosen("trainer.logger") is None else None)
        trainer = super().instantiate_trainer(**{key: value for key, value in kwargs.items() if value is not None})
        if "devices" not in kwargs:  # a check runs alone, wherever it is started
            check_launch(trainer)
        trainer.accumulate_grad_batches = (
            self._accumulate(trainer.num_devices * trainer.num_nodes) or trainer.accumulate_grad_batches
        )
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        super()._run_subcommand(subcommand)
        unscored = dict.fromkeys(name for names in getattr(self.model, "unscored", {}).values() for name in names)
        if unscored:  # the table is written by now
            raise BadInput(f"every score of {', '.join(map(repr, unscored))} failed; what is written has NaN there")

    def _accumulate(self, ranks: int) -> int | None:
        """Micro-batches per optimiser step that make the updates per iteration that were asked for."""
        updates, data = self._chosen("updates_per_iteration"), self.datamodule
        if updates is None or not isinstance(data, RolloutDataModule):
            return None
        if self._chosen("trainer.accumulate_grad_batches") != 1:
            raise ValueError("updates_per_iteration sets trainer.accumulate_grad_batches; give one of the two")
        chunks = data.prompts_per_iteration // ranks * data.group_size // data.batch_size
        batches = max(chunks, 1) * _recipe(self.model).batches_per_rollout()
        if batches % updates:
            raise ValueError(f"{batches} batches per iteration and rank do not divide into {updates} updates")
        return int(batches // updates)

    def _guards(self) -> list[Callback]:
        """What looks after a fit, unless the config brings its own."""
        own = _listed(self._get(self.config_init, "trainer.callbacks", default=None))
        guards = [SelfCheck(), Guard(), MergeReport()] if self.subcommand == "fit" else []
        return [guard for guard in guards if not any(isinstance(callback, type(guard)) for callback in own)]

    def _chosen(self, key: str) -> Any:  # noqa: ANN401
        return self._get(self.config, key, default=None)

    def _run_folder(self) -> Path:
        """The folder of the checkpoint when a fit goes on, else a fresh one: nothing is written over.

        What rank zero finds is what counts; it tells the others as soon as they have met.
        """
        checkpoint = self._chosen("ckpt_path")
        wanted = Path(self._chosen("trainer.default_root_dir") or "runs/run")
        if checkpoint and self.subcommand == "fit":
            return folder_of(Path(checkpoint))
        fresh: Path = next(path for path in numbered(wanted) if not path.exists())
        return fresh


class PlanCLI(FlowCLI):
    """``flowopd plan``: builds what a fit would run, on no device, and says what it will take."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer for the callbacks alone: the devices that are asked for need not be here."""
        return idle_trainer(_listed(self._get(self.config_init, "trainer.callbacks", default=None)))

    def _run_subcommand(self, subcommand: str) -> None:
        policy, data, hardware = _recipe(self.model), self.datamodule, Hardware.asked(self._chosen("trainer").as_dict())
        hardware = replace(hardware, accumulate=self._accumulate(hardware.ranks) or hardware.accumulate)
        planned = make_plan(policy, data, self.trainer.callbacks, hardware)  # type: ignore[attr-defined]
        speed = measured(policy, data, hardware.autocast, "cuda") if torch.cuda.is_available() else None
        show_plan(planned, hardware, speed)


class CheckCLI(FlowCLI):
    """``flowopd check``: builds what a fit would run, on one device, and prints a verdict per line."""

    refusal = "FAIL    configuration builds"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """One process, and no log."""
        return super().instantiate_trainer(devices=1, num_nodes=1, strategy="auto", logger=False, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        print("ok      configuration builds: every class and every option is there", flush=True)
        ranks, failed = Hardware.asked(self._chosen("trainer").as_dict()).ranks, False
        for verdict in check_run(_recipe(self.model), self.datamodule, self.trainer, ranks):
            print(verdict, flush=True)
            failed = failed or verdict.state == "FAIL"
        if failed:
            raise SystemExit(1)


def _recipe(model: LightningModule) -> FlowPolicy:
    if not isinstance(model, FlowPolicy):
        raise BadInput(f"model is a {type(model).__name__}; expected a FlowPolicy, such as flowopd.OPDStudent")
    return model


def plan() -> None:
    """Say what a fit with the same words would take."""
    sys.argv[1] = "fit"
    run(PlanCLI)


def check() -> None:
    """Check a fit with the same words; exit code 1 if something is wrong."""
    sys.argv[1] = "fit"
    run(CheckCLI)


def run(cli: type[FlowCLI] = FlowCLI) -> None:
    """Parse, build and run. Bad input is one sentence and exit code 2."""
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("tiles", lambda name: str(asset(name)), replace=True)
    _quieten()
    try:
        cli()
    except (jsonargparse.ArgumentError, OmegaConfBaseException, BadInput) as error:
        _refuse(error, cli.refusal)
    except (ValueError, OSError, KeyError) as error:
        if (cause := meant(error)) is None:
            raise
        _refuse(cause, cli.refusal)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


def _refuse(error: BaseException, prefix: str) -> None:
    if os.environ.get("FLOWOPD_DEBUG"):
        traceback.print_exc()
    print(f"{prefix}: {sentence_of(error)}", file=sys.stderr)
    raise SystemExit(2)


def _quieten() -> None:
    hide_diffusers_bars()  # of loading, which would tear verdicts and tables apart; downloads keep theirs
    hide_transformers_bars()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _standard_callbacks(folder: Path, subcommand: str, checkpoint_every: int) -> list[Callback]:
    if subcommand != "fit":
        return [SharedFolder(), *([PictureFolder()] if subcommand == "predict" else [])]
    checkpoint = Checkpoints(
        dirpath=folder / "checkpoints",
        filename="iteration={epoch}",
        auto_insert_metric_name=False,
        every_n_epochs=checkpoint_every,
        save_on_train_epoch_end=True,
        save_last="link",
        enable_version_counter=False,
    )
    rate = LearningRateMonitor(logging_interval="epoch")
    return [SharedFolder(), Progress(), OrderlyEnd(), checkpoint, AdapterExport(), rate, Farewell()]


def _loggers(folder: Path) -> list[Any]:
    if is_first():
        keep_aside(folder / "metrics.csv")
    return [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version="tensorboard")]


def _listed(value: Any) -> list[Any]:  # noqa: ANN401
    return value if isinstance(value, list) else [] if value is None else [value]
