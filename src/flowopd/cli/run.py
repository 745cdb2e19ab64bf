"""LightningCLI with run folders, sentences for errors, and no surprises at resume."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from diffusers.utils.logging import disable_progress_bar as hide_diffusers_bars
from jsonargparse import DefaultHelpFormatter
from jsonargparse.typing import PositiveInt, restricted_string_type
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils.logging import disable_progress_bar as hide_transformers_bars
from typing_extensions import override

from flowopd.cli.beside import keep_modules, let_import
from flowopd.cli.differing import differing
from flowopd.cli.ending import report
from flowopd.cli.folders import folder_of
from flowopd.cli.given import check_files, check_given, enums_told
from flowopd.cli.main import TOLD, USAGES, heed_again
from flowopd.cli.push import REPOSITORY, make, upload
from flowopd.cli.recipes import configs_among, with_files
from flowopd.cli.resume import check_changes, settings
from flowopd.cli.seams import refuse_misfits
from flowopd.cli.sentences import meant, sentence_of
from flowopd.preflight.check import SelfCheck
from flowopd.preflight.check import check as check_run
from flowopd.preflight.forwards import idle_trainer
from flowopd.preflight.memory import out_of_memory
from flowopd.preflight.outline import Outline
from flowopd.preflight.plan import Hardware, measured
from flowopd.preflight.plan import plan as make_plan
from flowopd.preflight.tables import show_plan, show_speed
from flowopd.tiles import asset
from flowopd.training import AdapterExport, FlowPolicy, PictureFolder, Progress, RolloutDataModule
from flowopd.training.benchmarks import BENCHMARKS, Benchmarks
from flowopd.training.callbacks.checkpoints import Checkpoints
from flowopd.training.callbacks.folder import CONFIG, RunFolder
from flowopd.training.callbacks.guard import Guard
from flowopd.training.callbacks.history import History
from flowopd.training.callbacks.log import MetricsFile
from flowopd.training.callbacks.results import MergeReport
from flowopd.training.callbacks.spent import Spent
from flowopd.training.callbacks.start import StartScores
from flowopd.training.checkpoints import read_checkpoint
from flowopd.training.ranks.folders import check_place
from flowopd.training.ranks.lifecycle import OrderlyEnd, check_launch, is_first, plugins
from flowopd.training.ranks.strategies import check_name
from flowopd.training.ranks.threads import Threads
from flowopd.training.signals import signals_among

Repository = restricted_string_type("Repository", f"^{REPOSITORY.pattern}$", docstring="user/name of the hub")

STAGES = "FLOWOPD_STAGES"
"""What tells a run the adapters of the stages of its study, by name, as JSON."""


class BadInput(Exception):
    """The run cannot be built as it was asked for."""


class Told(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help that keeps the lines of a description."""


class FlowCLI(LightningCLI):
    """``flowopd fit | validate | test | predict``: any module and data module by ``class_path``."""

    refusal = "flowopd: error"
    verb: str | None = None
    """Whose words are read; default: those of the verb that was given."""

    _changes = ""
    """What a run that goes on does otherwise than before."""

    _beside: Sequence[Path] = ()
    """Folders of the configs."""

    def __init__(self) -> None:
        options = {"formatter_class": Told, "parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False},
            parser_kwargs={
                "prog": "flowopd",
                **options,
                **{name: {"usage": USAGES[name], "description": TOLD[name], **options} for name in self.subcommands()},
            },
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words = with_files([self.verb or sys.argv[1], *sys.argv[2:]])
        check_files(words)
        self._beside = let_import(configs_among(words))
        with enums_told():
            self.config = parser.parse_args(words)
        given = self.config[words[0]].as_dict()
        check_given(given)
        refuse_misfits(given)

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
        parser.add_argument(
            "--push_to", type=Repository | None, default=None, help="user/name of the hub, where a fit's adapter goes"
        )

    @override
    def before_instantiate_classes(self) -> None:
        if self.subcommand == "predict":
            self.config.predict.return_predictions = False  # pictures go to files, not to memory
        elif self.subcommand in ("validate", "test"):
            self.config[self.subcommand].verbose = False  # scores are shown once, rounded
        if (checkpoint := self._chosen("ckpt_path")) is None:
            return
        content = read_checkpoint(Path(checkpoint))
        if self.subcommand == "fit" and CONFIG in content:
            self._changes = check_changes(content[CONFIG], self._settings())

    @override
    def instantiate_classes(self) -> None:
        """Whatever refuses what it is given while things are built, here or in a library, refuses the input."""
        try:
            super().instantiate_classes()
            if isinstance(self.datamodule, RolloutDataModule):
                _recipe(self.model)
        except (ValueError, RuntimeError, OSError, MisconfigurationException) as error:
            raise BadInput(sentence_of(meant(error) or error)) from error

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values: Lightning would let those in the checkpoint win, silently."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its folder, its loggers and the callbacks that every run has."""
        own = _listed(self._get(self.config_init, "trainer.callbacks", default=None))
        signals_among(own)
        folder = self._run_folder()
        kwargs = {"default_root_dir": str(folder.wanted), "enable_progress_bar": False} | kwargs
        history = History(str(self.subcommand), differing(self.config[str(self.subcommand)].as_dict()))
        kwargs["callbacks"] = [folder, history, *self._standard_callbacks(), *own, *self._guards(own)]
        kwargs["plugins"] = [*_listed(self._get(self.config_init, "trainer.plugins", default=None)), *plugins()]
        kwargs["strategy"] = kwargs.get("strategy") or self._strategy()
        kwargs.setdefault("logger", folder.loggers is not None and DummyLogger())  # until there is a folder
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ImportError) as error:
            raise ValueError(f"trainer: {error}") from error
        if "devices" not in kwargs:  # a check runs alone, wherever it is started
            check_launch(trainer)
        trainer.accumulate_grad_batches = (
            self._accumulate(trainer.num_devices * trainer.num_nodes) or trainer.accumulate_grad_batches
        )
        return trainer

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        ended = False
        try:
            with self._telling_what_is_too_large():
                super()._run_subcommand(subcommand)
            ended = True
        finally:
            if subcommand in ("fit", "test") and (folder := _begun(self.trainer)):
                report(folder, ended)
        if subcommand == "fit" and self.trainer.is_global_zero and (repository := self._chosen("push_to")):
            _push(Path(self.trainer.default_root_dir), repository)
        unscored = dict.fromkeys(name for names in getattr(self.model, "unscored", {}).values() for name in names)
        if unscored:  # the table is written by now
            raise BadInput(f"every score of {', '.join(map(repr, unscored))} failed; what is written has NaN there")

    @contextmanager
    def _telling_what_is_too_large(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not (isinstance(self.model, FlowPolicy) and isinstance(self.datamodule, RolloutDataModule)):
                raise
            raise BadInput(out_of_memory(error, self.model, self.datamodule)) from error

    def _strategy(self) -> Any:  # noqa: ANN401
        """What was chosen; ``fsdp`` is ours."""
        chosen = self._chosen("trainer.strategy")
        if chosen == "fsdp":
            if is_first():
                print("strategy fsdp: runs as fsdp2, which shards backbone, adapters and optimiser", flush=True)
            return "fsdp2"
        check_name(chosen)
        return self._get(self.config_init, "trainer.strategy")

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

    def _standard_callbacks(self) -> list[Callback]:
        if self.subcommand != "fit":
            return [OrderlyEnd(), Threads(), Progress(), *([PictureFolder()] if self.subcommand == "predict" else [])]
        rate = [] if self._chosen("trainer.logger") is False else [LearningRateMonitor(logging_interval="epoch")]
        checkpoints = Checkpoints(self._chosen("checkpoint_every"))
        outline = [Outline()] if self.subcommand == "fit" else []
        return [*outline, OrderlyEnd(), Threads(), Spent(), AdapterExport(), Progress(), checkpoints, *rate]

    def _guards(self, own: list[Any]) -> list[Callback]:
        """What looks after a fit, unless the config brings its own."""
        guards = [SelfCheck(), Guard(), MergeReport(), StartScores()] if self.subcommand == "fit" else []
        return [guard for guard in guards if not any(isinstance(callback, type(guard)) for callback in own)]

    def _chosen(self, key: str) -> Any:  # noqa: ANN401
        return self._get(self.config, key, default=None)

    def _settings(self) -> dict[str, Any]:
        return settings(self.config[str(self.subcommand)].as_dict())

    def _run_folder(self) -> RunFolder:
        """The folder of what goes on, a fit or benchmarks, else a fresh one: nothing is written over."""
        checkpoint = self._chosen("ckpt_path") if self.subcommand == "fit" else None
        wanted = Path(self._chosen("trainer.default_root_dir") or "runs/run")
        if checkpoint is not None:
            wanted = folder_of(Path(checkpoint))
        check_place(wanted)
        goes_on = checkpoint is not None or (isinstance(self.datamodule, Benchmarks) and (wanted / BENCHMARKS).is_dir())
        return RunFolder(wanted, goes_on, self._write_config, self._loggers(), self._settings(), self._changes)

    def _write_config(self, path: Path) -> None:
        keep_modules(self._beside, path.parent)
        self._parser(self.subcommand).save(
            self.config[str(self.subcommand)], str(path), skip_none=False, overwrite=True, multifile=False
        )

    def _loggers(self) -> Callable[[Path, int], list[Logger]] | None:
        chosen = self._get(self.config_init, "trainer.logger", default=None)
        if chosen is False:
            return None
        own = [] if chosen is True else _listed(chosen)
        return lambda folder, steps: _loggers(folder, steps, own)


class PlanCLI(FlowCLI):
    """``flowopd plan``: builds what a fit would run, on no device, and says what it will take."""

    verb = "fit"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer for the callbacks alone: the devices that are asked for need not be here."""
        return idle_trainer(_listed(self._get(self.config_init, "trainer.callbacks", default=None)))

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        policy, data, hardware = _recipe(self.model), self.datamodule, Hardware.asked(self._chosen("trainer").as_dict())
        hardware = replace(hardware, accumulate=self._accumulate(hardware.ranks) or hardware.accumulate)
        planned = make_plan(policy, data, self.trainer.callbacks, hardware)  # type: ignore[attr-defined]
        show_plan(planned, hardware)
        whole = getattr(policy.backbone, "quantize", None) is None  # what is timed has random weights of all bits
        if whole and torch.cuda.is_available():
            show_speed(planned, lambda: measured(policy, data, hardware.autocast, "cuda"))


class CheckCLI(FlowCLI):
    """``flowopd check``: builds what a fit would run, on one device, and prints a verdict per line."""

    refusal = "FAIL    configuration builds"
    verb = "fit"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """One process, and no log."""
        return super().instantiate_trainer(devices=1, num_nodes=1, strategy="auto", logger=False, **kwargs)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        print("ok      configuration builds: every class and every option is there", flush=True)
        ranks, failed = Hardware.asked(self._chosen("trainer").as_dict()).ranks, False
        with self._telling_what_is_too_large():
            for verdict in check_run(_recipe(self.model), self.datamodule, self.trainer, ranks):
                print(verdict, flush=True)
                failed = failed or verdict.state == "FAIL"
        if failed:
            raise SystemExit(1)


def _begun(trainer: Trainer) -> Path | None:
    """The folder of the run that has begun in this process, if it is the one that writes there."""
    folders = [one.folder for one in trainer.callbacks if isinstance(one, RunFolder)]  # type: ignore[attr-defined]
    return next(iter(folders), None)


def _push(folder: Path, repository: str) -> None:
    """Push what was trained; if it cannot be, it is still there."""
    try:
        print(f"pushed: {upload(make(folder, repository), repository)}", flush=True)
    except ValueError as error:
        print(f"not pushed: {error}; try `flowopd push {folder} {repository}`", file=sys.stderr)


def _recipe(model: LightningModule) -> FlowPolicy:
    if not isinstance(model, FlowPolicy):
        raise BadInput(f"model is a {type(model).__name__}; expected a FlowPolicy, such as flowopd.OPDStudent")
    return model


def plan() -> None:
    """Say what a fit with the same words would take."""
    run(PlanCLI)


def check() -> None:
    """Check a fit with the same words; exit code 1 if something is wrong."""
    run(CheckCLI)


def run(cli: type[FlowCLI] = FlowCLI) -> None:
    """Parse, build and run. Bad input is one sentence and exit code 2."""
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("tiles", lambda name: str(asset(name)), replace=True)
    OmegaConf.register_resolver("stage", _of_stage, replace=True)
    _quieten()
    try:
        cli()
    except (jsonargparse.ArgumentError, OmegaConfBaseException, MisconfigurationException, BadInput) as error:
        _refuse(error, cli.refusal)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if (cause := meant(error)) is None and not _is_told_by_lightning(error):
            raise
        _refuse(cause or error, cli.refusal)


def _of_stage(name: str) -> str:
    """The adapter of a stage of the study that runs this.

    Raises:
        ValueError: if none does, or it has no such stage.
    """
    known: dict[str, str] = json.loads(os.environ.get(STAGES, "{}"))
    if name not in known:
        raise ValueError(f"${{stage:{name}}} is the adapter of a stage of a study; run it by flowopd study")
    return known[name]


def _is_told_by_lightning(error: BaseException) -> bool:
    """Whether a callback of Lightning raised it on purpose: a metric to watch that nothing logs, above all."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised.parent == Path(callbacks.__file__).parent


def _refuse(error: BaseException, prefix: str) -> None:
    heed_again()
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
    warnings.filterwarnings("ignore", message="FSDP2-wrapped .* returned a view tensor")  # FLUX changes none in place
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(said in record.getMessage() for said in ("Tip: For seamless", "TPU available", "` reached."))


def _loggers(folder: Path, steps: int, own: list[Logger]) -> list[Logger]:
    """The log of a run, up to where it goes on; beside it those that were asked for, by default TensorBoard's."""
    if not own:
        own = [TensorBoardLogger(folder, "", "tensorboard", default_hp_metric=False, purge_step=steps)]
    return [MetricsFile(folder / "metrics.csv", steps), *own]


def _listed(value: Any) -> list[Any]:  # noqa: ANN401
    return value if isinstance(value, list) else [] if value is None else [value]
