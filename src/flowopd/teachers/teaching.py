"""Who teaches what: every task's teacher, and the anchor of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.names import refuse_duplicates
from flowopd.core.tensors import row_mean
from flowopd.core.weights import ExactKL
from flowopd.models import Backbone
from flowopd.records import Rollout, StepBatch
from flowopd.rollouts import Sampler
from flowopd.teachers.base import Teacher
from flowopd.teachers.composed import Groups, ask, at_guidance
from flowopd.teachers.router import Router

BRANCH_GUIDANCE = {"target_conditional": 1.0, "target_unconditional": 0.0}
"""The guidance scale at which a teacher answers with one branch alone."""


@dataclass(frozen=True)
class Role:
    """A teacher in a run.

    Args:
        name: what it is called in tables.
        teacher: the teacher.
        tasks: names of the tasks that are routed to it; none for an anchor.
    """

    name: str
    teacher: Teacher
    tasks: Sequence[str] = ()


class Teaching:
    """Every task's teacher, and the anchor.

    Args:
        roles: the teachers, each with its tasks.
        anchor: of every row: MAR's aesthetic teacher, or GRPO's reference policy.
        lockstep: every rank asks every teacher, however its rows are routed.

    Raises:
        ValueError: if a task has two teachers, or two roles have one name.
    """

    def __init__(self, roles: Sequence[Role] = (), anchor: Role | None = None, lockstep: bool = False) -> None:
        self.roles = list(roles)
        self.anchor = anchor
        refuse_duplicates("teacher for task", [task for role in roles for task in role.tasks])
        refuse_duplicates("teacher of the name", [role.name for role in self._all()])
        self.router = Router({task: role.teacher for role in roles for task in role.tasks}, lockstep)

    def teachers_by_name(self) -> dict[str, Teacher]:
        """Every teacher and the anchor."""
        return {role.name: role.teacher for role in self._all()}

    def _all(self) -> list[Role]:
        return self.roles if self.anchor is None else [*self.roles, self.anchor]

    def attach(self, backbone: Backbone) -> None:
        """Attach every teacher and the anchor to the backbone."""
        for teacher in self.teachers_by_name().values():
            teacher.attach(backbone)

    @torch.no_grad()
    def label(self, batch: StepBatch, needs: frozenset[str]) -> StepBatch:
        """Add the teachers' and the anchor's velocities at the states of a batch, where they are needed."""
        wanted: dict[str, Groups] = {}
        if "target" in needs and batch.labels.target is None:
            wanted["target"] = self.router.groups(batch.tasks)
        wanted |= {
            name: [(at_guidance(teacher, scale), rows) for teacher, rows in self.router.groups(batch.tasks)]
            for name, scale in BRANCH_GUIDANCE.items()
            if name in needs
        }
        if "anchor" in needs and self.anchor is not None:
            wanted["anchor"] = [(self.anchor.teacher, range(len(batch.x)))]
        return batch.label(**ask(wanted, batch.x, batch.sigma, batch.cond, self.router.lockstep, batch.level))

    @torch.no_grad()
    def label_trajectory(self, rollout: Rollout, sampler: Sampler) -> Rollout:
        """Add the KL to the teacher at every step, and its sum over all later trained steps, by the kept velocities."""
        assert rollout.velocities is not None
        kl = torch.zeros_like(rollout.log_probs)
        targets = torch.zeros_like(rollout.velocities)
        tasks = [prompt.task for prompt in rollout.prompts]
        for j in sampler.trained_steps():
            batch = sampler.batch_at(rollout.latents[:, j], j, rollout.cond, tasks)
            targets[:, j] = self.router.velocity(batch.x, batch.sigma, batch.cond, tasks, batch.level)
            kl[:, j] = _step_kl(sampler.transition(batch, rollout.velocities[:, j]), targets[:, j])
        to_go = kl.flip(1).cumsum(1).flip(1) - kl
        return rollout.label(state_kl=kl, kl_to_go=to_go, target=targets)


def _step_kl(step: Transition, target: Tensor) -> Tensor:
    return ExactKL().weight(step) * row_mean((step.velocity - target) ** 2)
