"""What people look at: progress, image grids, the exported adapter and the table at the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from tqdm.auto import tqdm

from flowopd.evaluation import contact_sheet, save_png, write_results
from flowopd.evaluation.tables import cells, columns
from flowopd.models import Backbone, Merge
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.records import EvaluationBatch
from flowopd.rollouts import VelocityField
from flowopd.teachers import BaseTeacher
from flowopd.training.callbacks.ema import averaged
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule


class Progress(Callback):
    """One bar over the rollout iterations, with rate, time left and the latest figures.

    Args:
        figures: how many of the latest metrics to show.
    """

    def __init__(self, figures: int = 4) -> None:
        self.figures = figures
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self._bar = tqdm(
            total=total,
            initial=trainer.current_epoch,
            unit="it",
            desc=type(pl_module).__name__,
            disable=not trainer.is_global_zero,
            dynamic_ncols=True,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One more iteration is done."""
        telling = sorted(trainer.callback_metrics.items(), key=lambda metric: _rank_of(metric[0]))
        self._bar.set_postfix({name: f"{float(v):.3g}" for name, v in telling[: self.figures]}, refresh=False)
        self._bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message stands on its own line."""
        if self._bar is not None:
            self._bar.close()


class AdapterExport(Callback):
    """Writes the trained adapter to ``<run>/adapter`` when the fit ends: for peft, for diffusers, and with a card."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather it on all ranks, write it once."""
        if not isinstance(pl_module, FlowPolicy):
            return
        adapter = pl_module.student()
        if trainer.is_global_zero:
            export_adapter(adapter, run_folder(trainer) / "adapter", card(_policy(pl_module)))


class MergeReport(Callback):
    """Prints what a merge keeps of every adapter, and writes ``merge_report.md`` and ``merge_report.csv``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first update; a run that goes on has its report."""
        policy = _policy(pl_module)
        if not isinstance(policy.start, Merge) or trainer.ckpt_path is not None:
            return
        merged = policy.student()
        if trainer.is_global_zero:
            table = policy.start.report(merged)
            write_results(table, run_folder(trainer), "merge_report")
            show(table)


class ImageGrid(Callback):
    """Draws a few held-out prompts from fixed noise: at the start, along the way, and at the end with all teachers.

    Args:
        prompts_per_task: images of each task.
        every: iterations between two grids; 0 draws the first and the last alone.
    """

    def __init__(self, prompts_per_task: int = 4, every: int = 0) -> None:
        self.prompts_per_task = prompts_per_task
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The policy before training."""
        self._save(trainer, {"student": _policy(pl_module).velocity}, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The policy along the way, its average if the run keeps one."""
        if self.every and (trainer.current_epoch + 1) % self.every == 0:
            with averaged(trainer):
                self._save(trainer, {"student": _policy(pl_module).velocity}, trainer.current_epoch + 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every model beside every other."""
        self._save(trainer, fields(_on_device(trainer, pl_module)), name="models")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every model beside every other."""
        self.on_fit_end(trainer, pl_module)

    def _save(self, trainer: Trainer, models: dict[str, VelocityField], step: int = 0, name: str = "") -> None:
        policy, batch = _policy(trainer.lightning_module), self._batch(trainer)
        images = {model: policy.draw(batch.prompts, batch.noise, field) for model, field in models.items()}
        if trainer.is_global_zero:
            path = run_folder(trainer) / "images" / f"{name or f'iteration_{step:05d}'}.png"
            contact_sheet(images, [prompt.text for prompt in batch.prompts], path)
            _to_tensorboard(trainer, images, step)

    def _batch(self, trainer: Trainer) -> EvaluationBatch:
        data = _data(trainer)
        return data.few_held_out(self.prompts_per_task)


class PictureFolder(Callback):
    """Writes predicted images to ``<run>/images/<row>.png``, and their prompts to ``<run>/images/prompts.jsonl``."""

    def __init__(self) -> None:
        self._drawn = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what every picture will show."""
        folder, self._drawn = _pictures(trainer), 0
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            prompts = enumerate(_data(trainer).held_out())
            lines = [{"file": _png(row), "task": prompt.task, "text": prompt.text} for row, prompt in prompts]
            (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the images of a batch; ranks take turns over the rows."""
        for image, counted in zip(outputs, batch.counted, strict=True):
            if counted:
                row = trainer.global_rank + trainer.world_size * self._drawn
                save_png(image, _pictures(trainer) / _png(row))
            self._drawn += 1


class ResultsTable(Callback):
    """Scores the base, every teacher, the cold start and the student on all held-out prompts.

    Prints the table, and writes ``results.md`` and ``results.csv`` to the run folder, when a fit or a test ends.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the student before its first update: the cold start."""
        policy = _policy(pl_module)
        if policy.start is not None and "cold-start" not in self.rows:
            self.rows["cold-start"] = evaluate(policy, policy.velocity, "cold-start")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score everything else, and show the table."""
        policy = _on_device(trainer, pl_module)
        scored = {name: evaluate(policy, field, name) for name, field in fields(policy).items()}
        student = scored.pop("student")
        table = {**scored, **self.rows, "student": student}
        if trainer.is_global_zero:
            write_results(table, run_folder(trainer))
            show(table)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same table, for a model that was trained before."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The cold start's scores: a resumed run cannot measure them again."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the cold start's scores."""
        self.rows = state_dict["rows"]


def fields(policy: FlowPolicy) -> dict[str, VelocityField]:
    """The base, every teacher, the anchor and the student, by name."""
    base = BaseTeacher(policy.sampler.guidance_scale)
    base.attach(policy.backbone)
    teachers = {name: teacher.velocity for name, teacher in policy.signals.fields().items()}
    return {"base": base.velocity, **teachers, "student": policy.velocity}


@torch.no_grad()
def evaluate(policy: FlowPolicy, field: VelocityField, name: str) -> dict[str, float]:
    """Mean scores of a velocity field on all held-out prompts, by reward."""
    signals = policy.signals
    board = signals.scoreboard().to(policy.device)
    for batch in _watched(_data(policy.trainer).evaluation_loader(), f"scoring {name}", policy.trainer.is_global_zero):
        board.update(signals.score(policy.draw(batch.prompts, batch.noise, field), batch.prompts), batch.counted)
    return board.compute()


def show(table: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    rich = RichTable("model", *columns(table))
    for row in cells(table):
        rich.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(rich)


def card(policy: FlowPolicy) -> ModelCard:
    """How the policy's adapter was made."""
    trainer, data = policy.trainer, getattr(policy.trainer, "datamodule", None)
    facts = {
        "objective": described(policy.objective),
        "sampler": described(policy.sampler),
        "start": described(policy.start) if policy.start is not None else "a new adapter",
        "training": f"{trainer.current_epoch} iterations, {trainer.global_step} optimiser steps",
        "seed": f"{getattr(data, 'seed', None)} (prompts and noise), {os.environ.get('PL_GLOBAL_SEED')} (everything)",
    }
    if strategy := getattr(policy, "strategy", None):
        facts["strategy"] = described(strategy)
    teachers = [(name, described(teacher), teacher.fingerprint()) for name, teacher in policy.signals.fields().items()]
    base = getattr(policy.backbone, "path", type(policy.backbone).__name__)
    return ModelCard(base, type(policy).__name__, facts, teachers, policy.sampler.guidance_scale)


def described(thing: Any, depth: int = 3) -> str:  # noqa: ANN401
    """A plain object by its class and public attributes.

    >>> from flowopd.core import Anchored, TransitionKL
    >>> described(Anchored(TransitionKL(), strength=2.5))
    'Anchored(objective=TransitionKL(weighting=ExactKL()), strength=2.5, weighting=ExactKL())'
    """
    if isinstance(thing, list | tuple):
        return f"[{', '.join(described(item, depth) for item in thing)}]"
    if thing is None or isinstance(thing, str | int | float | bool):
        return str(thing)
    if not depth or not hasattr(thing, "__dict__") or isinstance(thing, Backbone | torch.Tensor | torch.nn.Module):
        return type(thing).__name__
    public = {name: value for name, value in vars(thing).items() if not name.startswith("_") and name != "needs"}
    return f"{type(thing).__name__}({', '.join(f'{k}={described(v, depth - 1)}' for k, v in public.items())})"


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps everything."""
    return Path(trainer.default_root_dir)


def _pictures(trainer: Trainer) -> Path:
    return run_folder(trainer) / "images"


def _png(row: int) -> str:
    return f"{row:05d}.png"


def _rank_of(metric: str) -> int:
    """What is learnt comes first, then how, last what the optimiser does."""
    ranks = {"reward/": 0, "distill/": 0, "val/average": 1, "val/": 2, "policy/": 4, "lr-": 5}
    return next((rank for start, rank in ranks.items() if metric.startswith(start)), 3)


def _watched(loader: Any, what: str, shown: bool) -> Iterator[EvaluationBatch]:  # noqa: ANN401
    yield from tqdm(loader, desc=what, unit="batch", leave=False, disable=not shown, dynamic_ncols=True)


def _policy(module: Any) -> FlowPolicy:  # noqa: ANN401
    return cast(FlowPolicy, module)


def _on_device(trainer: Trainer, module: LightningModule) -> FlowPolicy:
    """The policy where it was trained; lightning moves it to the CPU before it says that the fit ends."""
    return _policy(module.to(trainer.strategy.root_device))


def _data(trainer: Trainer) -> RolloutDataModule:
    return cast(RolloutDataModule, trainer.datamodule)  # type: ignore[attr-defined]


def _to_tensorboard(trainer: Trainer, images: dict[str, Tensor], step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, batch in images.items():
                logger.experiment.add_images(f"images/{name}", batch.cpu(), step)
