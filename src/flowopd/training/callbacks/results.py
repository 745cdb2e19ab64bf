"""Tables: every model on all held-out prompts, and what a merge keeps of its parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flowopd.evaluation import Scoreboard, write_results
from flowopd.evaluation.remembered import Remembered
from flowopd.evaluation.tables import Table, show
from flowopd.models import Merge
from flowopd.rollouts import VelocityField
from flowopd.training.callbacks.around import data_of, on_device, policy_of, run_folder
from flowopd.training.callbacks.bars import say, watched
from flowopd.training.callbacks.ema import averaged
from flowopd.training.callbacks.fixed_states import fixed_kl
from flowopd.training.callbacks.memory import SCORES, facts_of
from flowopd.training.callbacks.tracking import track_table
from flowopd.training.policy import FlowPolicy


class ResultsTable(Callback):
    """Scores the base, every teacher, the start and the trained model on all held-out prompts.

    Every model is drawn at its own guidance, which is a column: the base at ``backbone.guidance_scale``, a teacher at
    its own, the trained model, which comes last, at ``sampler.guidance_scale``, and so the cold start, which is what it
    was before its first update. Prints the table, and writes ``results.md`` and ``results.csv`` to the run folder, when
    a fit or a test ends.

    Args:
        remembered: a folder in which scores of the base and the teachers are kept, for runs to share; default: that of
            the study that runs this, else none.
    """

    def __init__(self, remembered: str | None = None) -> None:
        self.remembered = remembered
        self.rows: dict[str, dict[str, float]] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the model before its first update: the cold start."""
        policy = policy_of(pl_module)
        if policy.start is not None and not self.rows and data_of(trainer).evaluation_count:
            name = "start" if policy.name == "cold-start" else "cold-start"
            self.rows[name] = evaluate(policy, policy.velocity, name)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score everything else, and show the table; without held-out prompts there is none."""
        if not data_of(trainer).evaluation_count:
            return
        policy = on_device(trainer, pl_module)
        with averaged(trainer):
            scored = {name: self._scored(policy, field, name) for name, field in models(policy).items()}
        trained = scored.pop(policy.name)
        table = _with_guidance({**scored, **self.rows, policy.name: trained}, policy)
        if trainer.is_global_zero:
            write_results(table, run_folder(trainer))
            track_table(trainer, "results", table)
            show(table, policy.name)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_end(trainer, pl_module)

    def _scored(self, policy: FlowPolicy, field: VelocityField, name: str) -> dict[str, float]:
        """Scores of a model; of one that nobody trains, perhaps those that another run has measured."""
        place = self.remembered or os.environ.get(SCORES)
        if name == policy.name or not place or (facts := facts_of(policy, name, Path(place))) is None:
            return evaluate(policy, field, name)
        memory, trainer = Remembered(Path(place)), policy.trainer
        known: dict[str, float] | None = trainer.strategy.broadcast(memory.get(facts))
        if known is not None:
            if trainer.is_global_zero:
                say(f"scores of {name}: measured by an earlier run, in {place}")
            return known
        scores = evaluate(policy, field, name)
        if trainer.is_global_zero:
            memory.put(facts, scores)
        return scores

    @override
    def state_dict(self) -> dict[str, Any]:
        """The cold start's scores: a resumed run cannot measure them again."""
        return {"rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class MergeReport(Callback):
    """Prints what a merge keeps of every adapter, and writes ``merge_report.md`` and ``merge_report.csv``."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.max_epochs == 0:  # nothing is trained
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the student starts from; a run that goes on has its report."""
        if not isinstance(pl_module, FlowPolicy) or not isinstance(pl_module.start, Merge) or trainer.global_step:
            return
        merged = pl_module.student()
        if trainer.is_global_zero:
            table = pl_module.start.report(merged)
            write_results(table, run_folder(trainer), "merge_report")
            track_table(trainer, "merge_report", table)
            show(table)


def models(policy: FlowPolicy) -> dict[str, VelocityField]:
    """The base, every teacher, the anchor and the trained model, by name."""
    teachers = {name: teacher.velocity for name, teacher in policy.signals.teaching.teachers_by_name().items()}
    return {"base": policy.base().velocity, **teachers, policy.name: policy.velocity}


def _with_guidance(table: Mapping[str, Mapping[str, float]], policy: FlowPolicy) -> Table:
    """The table with a first column that says at which guidance each model was drawn."""
    said = policy.guidance()
    return {name: {"guidance": said.get(name, said[policy.name]), **row} for name, row in table.items()}


@torch.no_grad()
def evaluate(policy: FlowPolicy, field: VelocityField, name: str) -> dict[str, float]:
    """Mean scores of a velocity field on all held-out prompts, by reward, and its distance to the teachers if asked."""
    board = Scoreboard.of(policy.signals.judging).to(policy.device)
    loader = data_of(policy.trainer).evaluation_loader()
    for batch in watched(loader, len(loader), f"scoring {name}", policy.trainer.is_global_zero):
        board.update(policy.columns(batch, field), batch.counted)
    return policy.evaluated(name, board) | fixed_kl(policy, field)
