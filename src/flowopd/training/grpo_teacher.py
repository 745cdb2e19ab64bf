"""GRPOTeacher: one expert per reward, by group-relative policy gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flowopd.core.advantages import GroupAdvantage
from flowopd.core.objectives import ClippedSurrogate, Objective
from flowopd.models import Backbone
from flowopd.records import Rollout
from flowopd.rewards import Scores
from flowopd.rollouts import Draw
from flowopd.training.policy import FlowPolicy


class _Begun(NamedTuple):
    """A rollout of this iteration that is being scored in the background."""

    rollout: Rollout
    scores: Mapping[str, Future[Scores]]


class GRPOTeacher(FlowPolicy):
    """Flow-GRPO. One reward makes a teacher; several weighted ones, on mixed or alternating tasks, make GRPO-Mix.

    A KL to the base model is ``Anchored(ClippedSurrogate(...))`` with an ``AnchorCallback`` around a ``BaseTeacher``.
    Reward and distillation together are a ``WeightedSum`` of both objectives, with rewards and teachers as callbacks.

    Args:
        backbone: the frozen model.
        objective: what a visited step is trained on; default: ``ClippedSurrogate``.
        advantage: from rewards to advantages.
        options: what every ``FlowPolicy`` takes.

    References:
        Flow-GRPO (arXiv 2505.05470).
    """

    called = "teacher"

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective | None = None,
        advantage: GroupAdvantage | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, objective or ClippedSurrogate(), **options)
        self.advantage = advantage or GroupAdvantage()
        self._begun: list[_Begun] = []

    def rollout(self, draw: Draw) -> Rollout:
        """Draw one trajectory per prompt, and begin to score the pictures if a reward does so in the background."""
        rollout = super().rollout(draw)
        if any(scorer.background for scorer in self.signals.judging.training):
            self._begun.append(_Begun(rollout, self.begin_to_judge(rollout)))
        return rollout

    def label(self, rollouts: list[Rollout], group_size: int) -> list[Rollout]:
        """Score the finished images, and give every trajectory its advantage over its siblings.

        A row whose score failed has no advantage, and does not count among its siblings.

        Raises:
            ValueError: if there are no siblings.
        """
        if group_size < 2:
            raise ValueError(f"advantages compare siblings, but group_size is {group_size}; set it to 2 or more")
        rewards, metrics = self.judged(rollouts, self._what_was_begun(rollouts))
        metrics["reward/equal_groups"] = _equal_groups(rewards, group_size)
        advantage = self._advantage(rewards, group_size)[:, None].expand(-1, self.sampler.num_steps)
        shares = advantage.split([len(rollout.prompts) for rollout in rollouts])
        taught = super().label(rollouts, group_size)
        return [rollout.label(advantage=rows).log(metrics) for rollout, rows in zip(taught, shares, strict=True)]

    def _what_was_begun(self, rollouts: Sequence[Rollout]) -> Sequence[Mapping[str, Future[Scores]]]:
        """Pending scores of these rollouts, if all of them were begun; nothing is kept."""
        begun = [one.scores for rollout in rollouts for one in self._begun if one.rollout is rollout]
        self._begun = []
        return begun if len(begun) == len(rollouts) else ()

    def _advantage(self, rewards: Tensor, group_size: int) -> Tensor:
        """Advantages of this rank's rows, scaled by the rewards of all ranks."""
        everywhere = cast(Tensor, self.all_gather(rewards)).reshape(-1)
        rows = slice(self.global_rank * len(rewards), (self.global_rank + 1) * len(rewards))
        return self.advantage(everywhere, group_size)[rows]


def _equal_groups(rewards: Tensor, group_size: int) -> float:
    """Share of groups whose rewards, but for failures, are all equal: they teach nothing."""
    groups, inf = rewards.reshape(-1, group_size), torch.inf
    low, high = groups.nan_to_num(nan=inf).amin(1), groups.nan_to_num(nan=-inf).amax(1)
    return float((high <= low).float().mean())
