"""What a fit is about to do, said when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from flowopd.models import Merge
from flowopd.preflight.costs import seconds_of
from flowopd.preflight.forwards import DECODED, TRAINED, count_forwards, pictures_per_update, rows_of
from flowopd.report.words import duration
from flowopd.training.callbacks.results import ResultsTable, models
from flowopd.training.policy import FlowPolicy
from flowopd.training.roads import sampling
from flowopd.training.rollout_data import RolloutDataModule

DRAWS = 4
"""Iterations that are counted; ``flowopd plan`` counts more."""

ROWS = 2
"""Texts that are encoded for the trial; the self-check has encoded them before."""


class Outline(Callback):
    """Says what is trained from what, by whom, how often and how it is evaluated; and about how long that takes.

    The time is an estimate: forwards, by one of the run's own batches that is timed on its device. A backward counts as
    two; rewards, pictures and models that teachers bring along are not in it. Nothing random is drawn.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, FlowPolicy) or not isinstance(data, RolloutDataModule):
            return
        with torch.random.fork_rng(devices=[]):
            row = _seconds_of_a_row(pl_module, data)  # on all ranks, which may have to wait for one another
            if trainer.is_global_zero:
                _print(_facts(pl_module, data, trainer, row))


def _facts(policy: FlowPolicy, data: RolloutDataModule, trainer: Trainer, row: float) -> dict[str, str]:
    work = _Work.of(policy, data, trainer)
    left = max((trainer.max_epochs or 0) - trainer.current_epoch, 0)
    evaluation, evaluations = _evaluation(policy, data, trainer)
    facts = {"trains": f"a {policy.name}, from {_start(policy)}"}
    facts |= {"teachers": said} if (said := _teachers(policy)) else {}
    several = f", {work.updates:g} to an iteration" if work.updates > 1 else ""
    facts["updates"] = f"{left * work.updates:g}{several} of {work.updates * work.pictures:g} pictures"
    if work.forwards:
        facts["forwards"] = f"about {work.forwards / work.pictures:.3g} a picture, a backward as two"
        held_out = data.evaluation_count * len(data.evaluation_prompts) * policy.sampler.eval_steps / trainer.world_size
        rows = left * work.updates * work.forwards / trainer.world_size + evaluations * held_out
        estimate = f"{duration(rows * row)}, by one batch that was timed here; without rewards"
    else:
        estimate = "none: the forwards of this recipe could not be counted"
    return facts | {"evaluation": evaluation, "estimate": estimate}


@dataclass(frozen=True)
class _Work:
    """Of an iteration, all ranks together: its updates, and the pictures and forwards of each."""

    updates: float
    pictures: float
    forwards: float

    @staticmethod
    def of(policy: FlowPolicy, data: RolloutDataModule, trainer: Trainer) -> _Work:
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        pictures = ranks * pictures_per_update(policy, data, ranks, accumulate)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        try:
            counted = count_forwards(policy, data, callbacks, ranks, accumulate, DRAWS)
        except Exception:  # a recipe of somebody's own may do what cannot be counted; it is not stopped for that
            counted = {}
        rows = sum(count for name, count in counted.items() if name != DECODED) + 2 * counted.get(TRAINED, 0.0)
        return _Work(data.prompts_per_iteration * data.group_size / pictures, pictures, ranks * rows)


def _seconds_of_a_row(policy: FlowPolicy, data: RolloutDataModule) -> float:
    """Of the backbone, in a batch as the run has them."""
    size, few = data.batch_size, data.draws()[0][:ROWS]
    cond = policy.backbone.encode(few.texts)[[row % len(few.texts) for row in range(size)]]
    x = torch.zeros(size, *policy.backbone.latent_shape(), device=policy.device)
    sigma = torch.full((size,), 0.5, device=policy.device)
    with sampling(policy):
        took = seconds_of(lambda: policy.velocity(x, sigma, cond), str(policy.device), repeats=1)
    return took / rows_of(x, policy.sampler.guidance_scale)


def _start(policy: FlowPolicy) -> str:
    if policy.start is None:
        return f"a new adapter of rank {policy.lora.rank}"
    return f"a merge of {len(policy.start.adapters)} adapters" if isinstance(policy.start, Merge) else str(policy.start)


def _teachers(policy: FlowPolicy) -> str:
    teaching = policy.signals.teaching
    said = ", ".join(f"{role.name} ({', '.join(role.tasks)})" for role in teaching.roles)
    anchor = f"anchored by {teaching.anchor.name}" if teaching.anchor is not None else ""
    return "; ".join(filter(None, [said, anchor]))


def _evaluation(policy: FlowPolicy, data: RolloutDataModule, trainer: Trainer) -> tuple[str, float]:
    """What is said of it, and how many times all held-out prompts are drawn."""
    pictures = data.evaluation_count * len(data.evaluation_prompts)
    every, left = trainer.check_val_every_n_epoch or 1, (trainer.max_epochs or 0) - trainer.current_epoch
    times = left // every if pictures and trainer.limit_val_batches else 0
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    table = bool(pictures) and any(isinstance(callback, ResultsTable) for callback in callbacks)
    rhythm = f"every {every} iterations" if every > 1 else "after every iteration"
    along = [f"{pictures} held-out pictures at the start and {rhythm}"] * bool(times)
    ends = [f"{'' if along else f'{pictures} held-out pictures in '}a table of {len(models(policy))} models at the end"]
    said = "; ".join([*along, *ends * table]) or "none"
    return said, times + bool(times) + table * len(models(policy))


def _print(facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)
