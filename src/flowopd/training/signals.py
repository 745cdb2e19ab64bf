"""Callbacks that bring rewards, teachers and the anchor into a run, and what they know together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from flowopd.core.dynamics import Transition
from flowopd.core.tensors import row_mean
from flowopd.core.weights import ExactKL
from flowopd.evaluation import Column, Scoreboard
from flowopd.models import Backbone
from flowopd.records import Prompt, Rollout, StepBatch
from flowopd.rewards import Reward, Scores, detailed
from flowopd.rewards.executor import Executor
from flowopd.rollouts import Sampler
from flowopd.teachers import Router, Teacher
from flowopd.training.ranks.strategies import is_sharded


class RewardCallback(Callback):
    """A reward for some tasks or all: trains a ``GRPOTeacher``, and is a column of every evaluation.

    Args:
        name: what the scores are called in logs and tables.
        reward: the reward.
        tasks: names of the tasks that it scores; default: all.
        weight: its share in the training reward, Σ weight · score over the rewards of a task; 0 only evaluates.
        in_average: count it in the table's average.
        background: while training, score a batch of finished pictures on the CPU, in a thread of its own, as the next
            batch is sampled; for rewards that compute on the CPU or wait for a server.
        columns: parts of its scores that are columns of every evaluation too, as ``<name>/<part>``.
        macro: its own column is the mean of these columns' means, so that each counts alike, however many prompts it
            has: GenEval's number over its six tags.

    Raises:
        ValueError: if ``macro`` is without ``columns``.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        tasks: list[str] | None = None,
        weight: float = 1.0,
        in_average: bool = True,
        background: bool = False,
        columns: list[str] | None = None,
        macro: bool = False,
    ) -> None:
        if macro and not columns:
            raise ValueError(f"reward {name!r} is a macro mean of no columns; name the parts in `columns`")
        self.name = name
        self.reward = reward
        self.tasks = tasks
        self.weight = weight
        self.in_average = in_average
        self.background = background
        self.columns = columns or []
        self.macro = macro
        self._executor = Executor(self.detail)

    @property
    def state_key(self) -> str:
        """Unique among several rewards."""
        return f"RewardCallback/{self.name}"

    def covers(self, task: str) -> bool:
        """Whether the task is scored by this reward."""
        return self.tasks is None or task in self.tasks

    def covered(self, prompts: Sequence[Prompt]) -> Tensor:
        """Whether each prompt is scored by this reward, (B,) bool."""
        return torch.tensor([self.covers(prompt.task) for prompt in prompts], dtype=torch.bool)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W); NaN for prompts of other tasks, and where scoring failed."""
        return self.detail(images, prompts).value

    @torch.no_grad()
    def detail(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images (B, 3, H, W) with their parts; NaN for prompts of other tasks, and where scoring failed.

        Raises:
            ValueError: if the reward does not give one score per image.
        """
        rows = self.covered(prompts).nonzero()[:, 0].to(images.device)
        if not len(rows):
            return Scores(torch.full((len(prompts),), torch.nan, device=images.device))
        asked = [prompts[row] for row in rows.tolist()]
        with torch.autocast(images.device.type, enabled=False):  # a score is the same in whatever precision we train
            found = detailed(self.reward, images[rows], asked)
        parts = {name: self._spread(part, rows, len(prompts)) for name, part in found.parts.items()}
        return Scores(self._spread(found.value, rows, len(prompts)), parts)

    def _spread(self, values: Tensor, rows: Tensor, count: int) -> Tensor:
        """Scores of some rows as scores of all; what is not a finite number is a failure, NaN."""
        if values.shape != rows.shape:
            raise ValueError(
                f"reward {self.name!r} gave scores of shape {tuple(values.shape)} for {len(rows)} images; "
                f"expected ({len(rows)},)"
            )
        scores = torch.full((count,), torch.nan, device=rows.device)
        scores[rows] = values.to(scores).where(values.to(scores).isfinite(), torch.nan)
        return scores

    def begin(self, images: Tensor, prompts: Sequence[Prompt]) -> Future[Scores]:
        """Begin to score images (B, 3, H, W) in the background, as ``detail`` does."""
        return self._executor.submit(images, prompts)

    def evaluate(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Column]:
        """Columns of an evaluation: the scores, and the parts that were asked for."""
        scores, covered = self.detail(images, prompts), self.covered(prompts).to(images.device)
        nothing = torch.full_like(scores.value, torch.nan)
        parts = {f"{self.name}/{name}": scores.parts.get(name, nothing) for name in self.columns}
        return {self.name: Column(scores.value, covered)} | {k: Column(v, ~v.isnan()) for k, v in parts.items()}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the thread."""
        self._executor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the thread: nobody waits for its scores any more."""
        self._executor.close()


class _CarriesTeacher(Callback):
    """A teacher in the trainer; refuses to go on from a checkpoint that was taught by another one."""

    teacher: Teacher
    name: str

    def state_dict(self) -> dict[str, Any]:
        """The teacher's fingerprint; its weights stay out of our checkpoints."""
        return {"fingerprint": self.teacher.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare fingerprints.

        Raises:
            ValueError: if the teacher changed since the checkpoint.
        """
        found, expected = self.teacher.fingerprint(), state_dict["fingerprint"]
        if found != expected:
            raise ValueError(
                f"{self.state_key} changed since the checkpoint: its fingerprint is {found}, "
                f"the checkpoint's {expected}; give back the old teacher, or start a new run"
            )


class TeacherCallback(_CarriesTeacher):
    """The teacher of some tasks.

    Args:
        tasks: names of the tasks that are routed to it.
        teacher: the teacher.
        name: what it is called in tables; default: ``teacher-<tasks>``.
    """

    def __init__(self, tasks: list[str], teacher: Teacher, name: str | None = None) -> None:
        self.tasks = tasks
        self.teacher = teacher
        self.name = name or f"teacher-{'-'.join(tasks)}"

    @property
    def state_key(self) -> str:
        """Unique among several teachers."""
        return f"TeacherCallback/{self.name}"


class AnchorCallback(_CarriesTeacher):
    """The frozen anchor of every row: MAR's aesthetic teacher, or GRPO's reference policy.

    Args:
        teacher: the anchor.
        name: what it is called in tables.
    """

    def __init__(self, teacher: Teacher, name: str = "anchor") -> None:
        self.teacher = teacher
        self.name = name

    @property
    def state_key(self) -> str:
        """There is one anchor."""
        return "AnchorCallback"


@dataclass(frozen=True)
class Signals:
    """What the callbacks of a trainer know together.

    Args:
        rewards: in the order of the trainer's callbacks.
        teachers: likewise.
        anchor: at most one.
        in_step: every rank asks every teacher, however its rows are routed.
    """

    rewards: list[RewardCallback]
    teachers: list[TeacherCallback]
    anchor: AnchorCallback | None
    in_step: bool = False

    @property
    def router(self) -> Router:
        """Teacher of each task."""
        teachers = {task: callback.teacher for callback in self.teachers for task in callback.tasks}
        return Router(teachers, self.in_step)

    def fields(self) -> dict[str, Teacher]:
        """Every teacher and the anchor, by name."""
        anchored = [self.anchor] if self.anchor else []
        return {callback.name: callback.teacher for callback in [*self.teachers, *anchored]}

    def attach(self, backbone: Backbone) -> None:
        """Attach every teacher to the backbone."""
        for teacher in self.fields().values():
            teacher.attach(backbone)

    def check(self, needs: frozenset[str], tasks: Sequence[str], given: frozenset[str] = frozenset()) -> None:
        """Raise unless the callbacks can provide the labels that the objective needs.

        Raises:
            ValueError: saying which callback is missing, or which one nobody reads.
        """
        if needs & {"target", "state_kl", "kl_to_go"} - given:
            self.router.check(tasks)
        if "anchor" in needs and self.anchor is None:
            raise ValueError("the objective is Anchored, but there is no anchor; add an AnchorCallback")
        if self.anchor is not None and "anchor" not in needs:
            raise ValueError(
                "there is an AnchorCallback, but the objective is not Anchored; wrap it in flowopd.core.Anchored"
            )
        if "advantage" in needs and (lost := [task for task in tasks if not self._trains(task)]):
            raise ValueError(f"no reward with a weight for task {lost[0]!r}; add a RewardCallback for it")

    def _trains(self, task: str) -> bool:
        return any(callback.covers(task) and callback.weight for callback in self.rewards)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Column]:
        """Every column of an evaluation, (B,) each."""
        return {
            name: column for callback in self.rewards for name, column in callback.evaluate(images, prompts).items()
        }

    def scoreboard(self) -> Scoreboard:
        """An empty scoreboard with a column per reward, and one per part that was asked for."""
        averaged = [callback.name for callback in self.rewards if callback.in_average]
        macro = [callback.name for callback in self.rewards if callback.macro]
        parts = {callback.name: [f"{callback.name}/{part}" for part in callback.columns] for callback in self.rewards}
        columns = [column for name, own in parts.items() for column in (name, *own)]
        return Scoreboard(columns, averaged, {name: parts[name] for name in macro})

    def training(self) -> list[RewardCallback]:
        """The rewards that have a weight."""
        return [callback for callback in self.rewards if callback.weight]

    def begin(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Future[Scores]]:
        """Begin what training rewards do in the background with finished images."""
        return {callback.name: callback.begin(images, prompts) for callback in self.training() if callback.background}

    def details(
        self, images: Tensor, prompts: Sequence[Prompt], begun: Sequence[Mapping[str, Future[Scores]]] = ()
    ) -> dict[str, Scores]:
        """Scores of every training reward, (B,); those in ``begun``, by consecutive parts of the batch, are awaited."""
        waiting = {name: [part[name] for part in begun] for name in (begun[0] if begun else ())}
        here = {c.name: c.detail(images, prompts) for c in self.training() if c.name not in waiting}
        there = {
            name: Scores.cat([future.result() for future in futures]).to(images.device)
            for name, futures in waiting.items()
        }
        return {callback.name: (here | there)[callback.name] for callback in self.training()}

    def total(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """Training rewards,  Σ weight · score  over the rewards of each row's task, (B,); NaN where one failed."""
        shares = []
        for callback in self.training():
            score = callback.weight * scores[callback.name]
            shares.append(score.where(callback.covered(prompts).to(score.device), 0.0))
        return torch.stack(shares).sum(0)

    def training_reward(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training rewards (B,), and the scores that they are made of by name."""
        scores = {name: details.value for name, details in self.details(images, prompts).items()}
        return self.total(scores, prompts), scores

    @torch.no_grad()
    def label_states(self, batch: StepBatch, needs: frozenset[str]) -> StepBatch:
        """Add the teachers' and the anchor's velocities at the states of a batch."""
        if "target" in needs and batch.labels.target is None:
            batch = batch.label(target=self.router.velocity(batch.x, batch.sigma, batch.cond, batch.tasks))
        if "anchor" in needs and self.anchor is not None:
            batch = batch.label(anchor=self.anchor.teacher.velocity(batch.x, batch.sigma, batch.cond))
        return batch

    @torch.no_grad()
    def label_trajectory(self, rollout: Rollout, sampler: Sampler) -> Rollout:
        """Add the KL to the teacher at every step, and its sum over all later trained steps."""
        kl = torch.zeros_like(rollout.log_probs)
        targets = torch.zeros_like(rollout.velocities)
        tasks = [prompt.task for prompt in rollout.prompts]
        for j in sampler.trained_steps():
            batch = sampler.batch_at(rollout.latents[:, j], j, rollout.cond, tasks)
            targets[:, j] = self.router.velocity(batch.x, batch.sigma, batch.cond, tasks)
            kl[:, j] = _step_kl(sampler.transition(batch, rollout.velocities[:, j]), targets[:, j])
        to_go = kl.flip(1).cumsum(1).flip(1) - kl
        return rollout.label(state_kl=kl, kl_to_go=to_go, target=targets)


def _step_kl(step: Transition, target: Tensor) -> Tensor:
    return ExactKL().weight(step) * row_mean((step.velocity - target) ** 2)


def added_over_ranks(module: LightningModule, facts: dict[str, list[float]]) -> dict[str, list[float]]:
    """Sums over all ranks, number by number; exchanged as JSON in bytes, for ranks may know of different names."""
    own = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=module.device)
    lengths = cast(Tensor, module.all_gather(torch.tensor([len(own)], device=module.device))).flatten().tolist()
    texts = cast(Tensor, module.all_gather(pad(own, (0, max(lengths) - len(own))))).reshape(len(lengths), -1)
    ranks = [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]
    known = {
        name: [rank[name] for rank in ranks if name in rank] for name in dict.fromkeys(k for r in ranks for k in r)
    }
    return {name: [sum(numbers) for numbers in zip(*each, strict=True)] for name, each in known.items()}


def signals_of(trainer: Trainer) -> Signals:
    """Collect rewards, teachers and the anchor from a trainer's callbacks."""
    signals = signals_among(trainer.callbacks)  # type: ignore[attr-defined]
    return replace(signals, in_step=is_sharded(trainer))


def signals_among(callbacks: Sequence[Callback]) -> Signals:
    """Collect rewards, teachers and the anchor.

    Raises:
        ValueError: if a task has two teachers, there are two anchors, or two signals of one name.
    """
    rewards = [callback for callback in callbacks if isinstance(callback, RewardCallback)]
    teachers = [callback for callback in callbacks if isinstance(callback, TeacherCallback)]
    anchors = [callback for callback in callbacks if isinstance(callback, AnchorCallback)]
    _refuse_twins("reward", [callback.name for callback in rewards])
    _refuse_twins("teacher for task", [task for callback in teachers for task in callback.tasks])
    _refuse_twins("anchor", [callback.state_key for callback in anchors])
    _refuse_twins("teacher of the name", [callback.name for callback in [*teachers, *anchors]])
    return Signals(rewards, teachers, anchors[0] if anchors else None)


def _refuse_twins(kind: str, names: Sequence[str]) -> None:
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"more than one {kind} {twins[0]!r}; expected one")


__all__ = ["AnchorCallback", "RewardCallback", "Signals", "TeacherCallback", "signals_of"]
