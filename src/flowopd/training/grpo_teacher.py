"""GRPOTeacher: one expert per reward, by group-relative policy gradients."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from flowopd.core.advantages import GroupAdvantage
from flowopd.core.objectives import ClippedSurrogate, Objective
from flowopd.models import Backbone, LoRASpec, Merge
from flowopd.records import Rollout
from flowopd.rollouts import Sampler
from flowopd.training.policy import FlowPolicy


class GRPOTeacher(FlowPolicy):
    """Flow-GRPO. One reward makes a teacher; several weighted ones, on mixed or alternating tasks, make GRPO-Mix.

    A KL to the base model is ``Anchored(ClippedSurrogate(...))`` with an ``AnchorCallback`` around a ``BaseTeacher``.

    Args:
        backbone: the frozen model.
        objective: what a visited step is trained on.
        advantage: from rewards to advantages.
        sampler: grid, dynamics and guidance, for rollouts, training and evaluation alike.
        lora: shape of the adapter, if it starts from nothing.
        start: an adapter folder, a model of the hub, or a merge of several, to start from instead.
        optimizer: built over the adapter's parameters.
        scheduler: stepped after every optimiser step.

    References:
        Flow-GRPO (arXiv 2505.05470).
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective | None = None,
        advantage: GroupAdvantage | None = None,
        sampler: Sampler | None = None,
        lora: LoRASpec | None = None,
        start: str | Merge | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, objective or ClippedSurrogate(), sampler, lora, start, optimizer, scheduler)
        self.advantage = advantage or GroupAdvantage()

    def label(self, rollouts: list[Rollout], group_size: int) -> list[Rollout]:
        """Score the finished images, and give every trajectory its advantage over its siblings.

        Raises:
            ValueError: if there are no siblings.
        """
        if group_size < 2:
            raise ValueError(f"advantages compare siblings, but group_size is {group_size}; set it to 2 or more")
        total, metrics = self._score(rollouts)
        advantage = self._advantage(total, group_size)
        groups = total.reshape(-1, group_size)
        metrics["reward/equal_groups"] = float((groups == groups[:, :1]).all(1).float().mean())
        labelled = []
        for rollout, rows in zip(rollouts, advantage.split([len(r.prompts) for r in rollouts]), strict=True):
            labelled.append(rollout.label(advantage=rows[:, None].expand(-1, self.sampler.num_steps)).log(metrics))
        return labelled

    def _score(self, rollouts: list[Rollout]) -> tuple[Tensor, dict[str, float]]:
        images = torch.cat([self.backbone.decode(rollout.latents[:, -1]) for rollout in rollouts])
        prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
        total, scores = self.signals.training_reward(images, prompts)
        return total, {f"reward/{name}": float(score.nanmean()) for name, score in scores.items()}

    def _advantage(self, rewards: Tensor, group_size: int) -> Tensor:
        """Advantages of this rank's rows, scaled by the rewards of all ranks."""
        everywhere = cast(Tensor, self.all_gather(rewards)).reshape(-1)
        rows = slice(self.global_rank * len(rewards), (self.global_rank + 1) * len(rewards))
        return self.advantage(everywhere, group_size)[rows]
