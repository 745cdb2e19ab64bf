"""Tables: every model on all held-out prompts, and what a merge keeps of its parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table as RichTable
from tqdm.auto import tqdm
from typing_extensions import override

from flowopd.evaluation import Scoreboard, write_results
from flowopd.evaluation.tables import Table, cells, columns
from flowopd.models import Merge
from flowopd.records import EvaluationBatch
from flowopd.rollouts import VelocityField
from flowopd.training.callbacks.around import data_of, on_device, policy_of, run_folder
from flowopd.training.callbacks.ema import averaged
from flowopd.training.callbacks.fixed_states import fixed_kl
from flowopd.training.policy import FlowPolicy


class ResultsTable(Callback):
    """Scores the base, every teacher, the cold start and the student on all held-out prompts.

    Every model is drawn at its own guidance, which is a column: the base at ``backbone.guidance_scale``, a teacher at
    its own, the student at ``sampler.guidance_scale``, and so the cold start, which is the student before its first
    update. Prints the table, and writes ``results.md`` and ``results.csv`` to the run folder, when a fit or a test
    ends.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the student before its first update: the cold start."""
        policy = policy_of(pl_module)
        if policy.start is not None and "cold-start" not in self.rows and data_of(trainer).evaluation_count:
            self.rows["cold-start"] = evaluate(policy, policy.velocity, "cold-start")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score everything else, and show the table; without held-out prompts there is none."""
        if not data_of(trainer).evaluation_count:
            return
        policy = on_device(trainer, pl_module)
        with averaged(trainer):
            scored = {name: evaluate(policy, field, name) for name, field in models(policy).items()}
        student = scored.pop("student")
        table = _with_guidance({**scored, **self.rows, "student": student}, policy)
        if trainer.is_global_zero:
            write_results(table, run_folder(trainer))
            show(table)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_end(trainer, pl_module)

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
            show(table)


def models(policy: FlowPolicy) -> dict[str, VelocityField]:
    """The base, every teacher, the anchor and the student, by name."""
    teachers = {name: teacher.velocity for name, teacher in policy.signals.teaching.teachers_by_name().items()}
    return {"base": policy.base().velocity, **teachers, "student": policy.velocity}


def _with_guidance(table: Mapping[str, Mapping[str, float]], policy: FlowPolicy) -> Table:
    """The table with a first column that says at which guidance each model was drawn."""
    said = policy.guidance()
    return {name: {"guidance": said.get(name, said["student"]), **row} for name, row in table.items()}


@torch.no_grad()
def evaluate(policy: FlowPolicy, field: VelocityField, name: str) -> dict[str, float]:
    """Mean scores of a velocity field on all held-out prompts, by reward, and its distance to the teachers if asked."""
    board = Scoreboard.of(policy.signals.judging).to(policy.device)
    loader = data_of(policy.trainer).evaluation_loader()
    for batch in _watched(loader, f"scoring {name}", policy.trainer.is_global_zero):
        board.update(policy.columns(batch, field), batch.counted)
    return policy.evaluated(name, board) | fixed_kl(policy, field)


def show(table: Table) -> None:
    """Print a table."""
    rich = RichTable()
    rich.add_column("model", no_wrap=True)
    for name in columns(table):
        rich.add_column(name, overflow="fold")
    for row in cells(table):
        rich.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(rich)


def _watched(loader: Any, what: str, shown: bool) -> Iterator[EvaluationBatch]:  # noqa: ANN401
    yield from tqdm(loader, desc=what, unit="batch", leave=False, disable=not shown, dynamic_ncols=True)
