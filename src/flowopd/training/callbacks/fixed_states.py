"""How far a policy is from its teachers, where every policy is asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from flowopd.core.dynamics import ODE, Dynamics, FlowSDE
from flowopd.core.objectives import squared_error
from flowopd.core.ranges import at_least
from flowopd.core.weights import ExactKL
from flowopd.records import Prompt
from flowopd.rollouts import VelocityField
from flowopd.teachers import Teacher
from flowopd.training.callbacks.around import data_of, policy_of
from flowopd.training.policy import FlowPolicy


class FixedStateKL(Callback):
    """Logs the policy's KL to every teacher on the teacher's own trajectories, which do not depend on the policy.

        fixed_kl/<teacher> = mean over prompts and steps of  KL(p_θ ‖ p_teacher),    nats per latent dimension

    Every teacher follows the ODE of the evaluation once, on the first held-out prompts of its tasks; the steps that are
    compared there are those of ``dynamics``, all but the last. On the policy's own states, a KL also falls where
    the policy merely stays away from what it does not know. Every validation logs it, and ``ResultsTable`` has a column
    of it for every model. All ranks measure the same.

    Args:
        prompts_per_task: held-out prompts of each task.
        dynamics: how a step is noised; default: Flow-SDE at level 0.7, whatever the policy samples with, so that runs
            compare.

    Raises:
        ValueError: if there are less than one.

    References:
        GFD-OPD (arXiv 2609.39692), Fixed-State KL.
    """

    def __init__(self, prompts_per_task: int = 8, dynamics: Dynamics | None = None) -> None:
        at_least(1, prompts_per_task=prompts_per_task)
        self.prompts_per_task = prompts_per_task
        self.dynamics = dynamics or FlowSDE()
        self._visited: dict[str, _Visited] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._visited = None  # another run may have other teachers

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            found = self.measure(policy_of(pl_module), policy_of(pl_module).velocity)
            pl_module.log_dict(found, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @torch.no_grad()
    def measure(self, policy: FlowPolicy, field: VelocityField) -> dict[str, float]:
        """``fixed_kl/<teacher>`` of any velocity field, for every teacher of the run, in the precision of training."""
        with policy.trainer.precision_plugin.forward_context():
            if self._visited is None:
                self._visited = self._visit(policy)
            return {f"fixed_kl/{name}": self._kl(policy, field, visited) for name, visited in self._visited.items()}

    def _visit(self, policy: FlowPolicy) -> dict[str, _Visited]:
        """Follow every teacher over the held-out prompts of its tasks."""
        batch = data_of(policy.trainer).few_held_out(self.prompts_per_task)
        sigmas = policy.sampler.schedule.sigmas(policy.sampler.eval_steps)
        found = {}
        for role in policy.signals.teaching.roles:
            rows = [row for row, prompt in enumerate(batch.prompts) if prompt.task in role.tasks]
            if rows:
                prompts = [batch.prompts[row] for row in rows]
                found[role.name] = _follow(policy, role.teacher, prompts, batch.noise[rows], sigmas)
        return found

    def _kl(self, policy: FlowPolicy, field: VelocityField, visited: _Visited) -> float:
        cond = policy.backbone.encode([prompt.text for prompt in visited.prompts])
        kls = []
        for step, (sigma, sigma_next) in enumerate(pairwise(visited.sigmas[:-1].to(policy.device))):
            x, target = visited.states[step].to(policy.device), visited.velocities[step].to(policy.device)
            levels = sigma.expand(len(x)), sigma_next.expand(len(x))
            own = self.dynamics.step(x, field(x, levels[0], cond), *levels)
            kls.append((ExactKL().weight(own) * squared_error(own, target)).mean())
        return float(torch.stack(kls).mean())


@dataclass(frozen=True)
class _Visited:
    """Where a teacher went, kept on the CPU.

    Args:
        prompts: B prompts.
        sigmas: (T + 1,) noise levels, 1 → 0.
        states, velocities: T of (B, C, H, W), the teacher's own.
    """

    prompts: Sequence[Prompt]
    sigmas: Tensor
    states: Sequence[Tensor]
    velocities: Sequence[Tensor]


def _follow(policy: FlowPolicy, teacher: Teacher, prompts: Sequence[Prompt], x: Tensor, sigmas: Tensor) -> _Visited:
    cond = policy.backbone.encode([prompt.text for prompt in prompts])
    states, velocities = [], []
    for sigma, sigma_next in pairwise(sigmas.to(x.device)):
        levels = sigma.expand(len(x)), sigma_next.expand(len(x))
        velocity = teacher.velocity(x, levels[0], cond)
        states.append(x.cpu())
        velocities.append(velocity.cpu())
        x = ODE().step(x, velocity, *levels).mean
    return _Visited(prompts, sigmas, states, velocities)


def fixed_kl(policy: FlowPolicy, field: VelocityField) -> dict[str, float]:
    """What a run's ``FixedStateKL``, if it has one, measures of a velocity field."""
    callbacks = policy.trainer.callbacks  # type: ignore[attr-defined]
    found = [callback.measure(policy, field) for callback in callbacks if isinstance(callback, FixedStateKL)]
    return {name: value for one in found for name, value in one.items()}
