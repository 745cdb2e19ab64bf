"""Pictures of held-out prompts: grids along a run, a folder of predictions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from flowopd.core.ranges import at_least
from flowopd.evaluation import Shots, contact_sheet, save_png
from flowopd.evaluation.pictures import prompt_sheet, read_strip, save_strip
from flowopd.evaluation.shots import scores_of, small
from flowopd.records import EvaluationBatch
from flowopd.rollouts import VelocityField
from flowopd.training.callbacks.around import data_of, on_device, policy_of, run_folder
from flowopd.training.callbacks.bars import say
from flowopd.training.callbacks.ema import averaged
from flowopd.training.callbacks.results import models
from flowopd.training.callbacks.tracking import track_pictures
from flowopd.training.policy import FlowPolicy

COLD_START = "cold_start.png"
"""What the student drew before its first update, side by side."""


class ImageGrid(Callback):
    """Draws a few held-out prompts from fixed noise: at the start, along the way, and at the end with all models.

    The last sheet has a row of the base, of every teacher, of the cold start if there is one, and of the student.
    ``images/`` holds sheets to look at, ``images/shots/`` the same pictures, small and with their scores, for reports.

    Args:
        prompts_per_task: images of each task.
        every: iterations between two grids; 0 draws the first and the last alone.

    Raises:
        ValueError: if there is no picture to draw, or ``every`` is less than 0.
    """

    def __init__(self, prompts_per_task: int = 4, every: int = 0) -> None:
        at_least(1, prompts_per_task=prompts_per_task)
        at_least(0, every=every)
        self.prompts_per_task = prompts_per_task
        self.every = every

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        policy = policy_of(pl_module)
        if trainer.global_step == 0:  # a run that goes on has its picture, of the average
            drawn = self._save(trainer, _trained(pl_module), trainer.current_epoch)
            if drawn and policy.start is not None and trainer.is_global_zero:
                save_strip(drawn[policy.name], _pictures(trainer) / COLD_START)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every and (trainer.current_epoch + 1) % self.every == 0:
            with averaged(trainer):
                self._save(trainer, _trained(pl_module), trainer.current_epoch + 1)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        policy = on_device(trainer, pl_module)
        with averaged(trainer):
            self._save(trainer, models(policy), trainer.current_epoch, "models")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_end(trainer, pl_module)

    def _save(
        self, trainer: Trainer, models: dict[str, VelocityField], step: int = 0, name: str = ""
    ) -> dict[str, Tensor]:
        if not data_of(trainer).evaluation_count:
            return {}
        policy, batch = policy_of(trainer.lightning_module), self._batch(trainer)
        images = {model: policy.draw(batch.prompts, batch.noise, field) for model, field in models.items()}
        if trainer.is_global_zero:
            images = _with_start(images, _pictures(trainer) / COLD_START, len(batch.prompts))
            file, texts = f"{name or f'iteration_{step:05d}'}.png", [prompt.text for prompt in batch.prompts]
            contact_sheet(images, texts, _pictures(trainer) / file)
            _shots(policy, batch, images, step).save(_pictures(trainer) / "shots" / file)
            track_pictures(trainer, images, texts, _pictures(trainer) / file, step)
        return images

    def _batch(self, trainer: Trainer) -> EvaluationBatch:
        data = data_of(trainer)
        return data.few_held_out(self.prompts_per_task)


class PictureFolder(Callback):
    """Writes predicted images to ``<run>/images/<row>.png``, and their prompts to ``<run>/images/prompts.jsonl``.

    ``<run>/sheet.png`` shows the first of every task, with their prompts.

    Args:
        on_sheet: pictures of a task on the sheet, at most.
    """

    def __init__(self, on_sheet: int = 8) -> None:
        at_least(1, on_sheet=on_sheet)
        self.on_sheet = on_sheet
        self._drawn = 0

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn = 0
        folder = _pictures(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            prompts = enumerate(data_of(trainer).held_out())
            lines = [{"file": _png(row), "task": prompt.task, "text": prompt.text} for row, prompt in prompts]
            (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for image, counted in zip(outputs, batch.counted, strict=True):
            if counted:
                # ranks take turns over the rows
                row = trainer.global_rank + trainer.world_size * self._drawn
                save_png(image, _pictures(trainer) / _png(row))
            self._drawn += 1

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()  # until all ranks have written theirs
        if trainer.is_global_zero:
            folder, prompts = _pictures(trainer), data_of(trainer).held_out()
            tasks = dict.fromkeys(prompt.task for prompt in prompts)
            rows = {task: [row for row, prompt in enumerate(prompts) if prompt.task == task] for task in tasks}
            drawn = {
                task: [(prompts[row].text, folder / _png(row)) for row in found[: self.on_sheet]]
                for task, found in rows.items()
            }
            sheet = run_folder(trainer) / "sheet.png"
            prompt_sheet(drawn, sheet)
            say(f"{len(prompts)} pictures in {folder}, the first of every task in {sheet}")


@torch.no_grad()
def _shots(policy: FlowPolicy, batch: EvaluationBatch, images: dict[str, Tensor], step: int) -> Shots:
    """The same pictures for a report, with what each scored."""
    texts, tasks = zip(*((prompt.text, prompt.task) for prompt in batch.prompts), strict=True)
    with policy.trainer.precision_plugin.forward_context():
        judged = {model: policy.signals.judging.columns(drawn, batch.prompts) for model, drawn in images.items()}
    pictures = {model: small(drawn) for model, drawn in images.items()}
    return Shots(step, texts, tasks, pictures, {model: scores_of(columns) for model, columns in judged.items()})


def _with_start(images: dict[str, Tensor], file: Path, count: int) -> dict[str, Tensor]:
    """The pictures of all models with those of the cold start before the trained model's, as the run drew them once."""
    if len(images) == 1 or not file.is_file():
        return images
    *others, trained = images
    start = read_strip(file, count).to(images[trained].device)
    return {**{name: images[name] for name in others}, "cold-start": start, trained: images[trained]}


def _trained(module: LightningModule) -> dict[str, VelocityField]:
    policy = policy_of(module)
    return {policy.name: policy.velocity}


def _pictures(trainer: Trainer) -> Path:
    return run_folder(trainer) / "images"


def _png(row: int) -> str:
    return f"{row:05d}.png"
