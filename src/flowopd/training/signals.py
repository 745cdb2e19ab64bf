"""Callbacks that bring rewards, teachers and the anchor into a run, and what they know together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.tensors import row_mean
from flowopd.core.weights import ExactKL
from flowopd.evaluation import Scoreboard
from flowopd.models import Backbone
from flowopd.records import Prompt, Rollout, StepBatch
from flowopd.rewards import Reward
from flowopd.rollouts import Sampler
from flowopd.teachers import Router, Teacher


class RewardCallback(Callback):
    """A reward for some tasks or all: trains a ``GRPOTeacher``, and is a column of every evaluation.

    Args:
        name: what the scores are called in logs and tables.
        reward: the reward.
        tasks: names of the tasks that it scores; default: all.
        weight: its share in the training reward, Σ weight · score over the rewards of a task; 0 only evaluates.
        in_average: count it in the table's average.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        tasks: list[str] | None = None,
        weight: float = 1.0,
        in_average: bool = True,
    ) -> None:
        self.name = name
        self.reward = reward
        self.tasks = tasks
        self.weight = weight
        self.in_average = in_average

    @property
    def state_key(self) -> str:
        """Unique among several rewards."""
        return f"RewardCallback/{self.name}"

    def covers(self, task: str) -> bool:
        """Whether the task is scored by this reward."""
        return self.tasks is None or task in self.tasks

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W); NaN for prompts of other tasks."""
        rows = [row for row, prompt in enumerate(prompts) if self.covers(prompt.task)]
        scores = torch.full((len(prompts),), torch.nan, device=images.device)
        if rows:
            scores[rows] = self.reward.score(images[rows], [prompts[row] for row in rows]).float()
        return scores


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
    """

    rewards: list[RewardCallback]
    teachers: list[TeacherCallback]
    anchor: AnchorCallback | None

    @property
    def router(self) -> Router:
        """Teacher of each task."""
        return Router({task: callback.teacher for callback in self.teachers for task in callback.tasks})

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

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Every reward's scores (B,), NaN where it does not apply."""
        return {callback.name: callback.score(images, prompts) for callback in self.rewards}

    def scoreboard(self) -> Scoreboard:
        """An empty scoreboard with a column per reward."""
        averaged = [callback.name for callback in self.rewards if callback.in_average]
        return Scoreboard([callback.name for callback in self.rewards], averaged)

    def training_reward(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ weight · score over the rewards of each row's task, (B,), and the scores by name."""
        training = [callback for callback in self.rewards if callback.weight]
        scores = {callback.name: callback.score(images, prompts) for callback in training}
        total = torch.zeros(len(prompts), device=images.device)
        for callback in training:
            covered = torch.tensor([callback.covers(prompt.task) for prompt in prompts], device=images.device)
            total = total + torch.where(covered, callback.weight * scores[callback.name], 0.0)
        return total, scores

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
            batch = sampler.at(rollout.latents[:, j], j, rollout.cond, tasks)
            targets[:, j] = self.router.velocity(batch.x, batch.sigma, batch.cond, tasks)
            kl[:, j] = _step_kl(sampler.transition(batch, rollout.velocities[:, j]), targets[:, j])
        to_go = kl.flip(1).cumsum(1).flip(1) - kl
        return rollout.label(state_kl=kl, kl_to_go=to_go, target=targets)


def _step_kl(step: Transition, target: Tensor) -> Tensor:
    return ExactKL().weight(step) * row_mean((step.velocity - target) ** 2)


def signals_of(trainer: Trainer) -> Signals:
    """Collect rewards, teachers and the anchor from a trainer's callbacks."""
    return signals_among(trainer.callbacks)  # type: ignore[attr-defined]


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
