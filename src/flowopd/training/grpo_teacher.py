"""GRPOTeacher: one expert per reward, by group-relative policy gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from flowopd.core.advantages import GroupAdvantage
from flowopd.core.objectives import ClippedSurrogate, Objective
from flowopd.models import AdapterSource, Backbone, LoRASpec, Merge
from flowopd.records import Prompt, Rollout
from flowopd.rewards import Scores
from flowopd.rollouts import Draw, Sampler
from flowopd.training.policy import FlowPolicy
from flowopd.training.signals import added_over_ranks


@dataclass(frozen=True)
class Drawn(Rollout):
    """A rollout whose pictures are being scored in the background.

    Args:
        images: (B, 3, H, W) in [0, 1].
        scores: by reward, what will be known of them.
    """

    images: Tensor | None = None
    scores: Mapping[str, Future[Scores]] = field(default_factory=dict)


class GRPOTeacher(FlowPolicy):
    """Flow-GRPO. One reward makes a teacher; several weighted ones, on mixed or alternating tasks, make GRPO-Mix.

    A KL to the base model is ``Anchored(ClippedSurrogate(...))`` with an ``AnchorCallback`` around a ``BaseTeacher``.

    Args:
        backbone: the frozen model.
        objective: what a visited step is trained on.
        advantage: from rewards to advantages.
        sampler: grid, dynamics and guidance, for rollouts, training and evaluation alike.
        lora: shape of the adapter, if it starts from nothing.
        start: an adapter folder or file, a model of the hub, ``{path, subfolder, revision}``, or a merge of several, to
            start from instead.
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
        start: str | AdapterSource | Merge | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, objective or ClippedSurrogate(), sampler, lora, start, optimizer, scheduler)
        self.advantage = advantage or GroupAdvantage()

    def rollout(self, draw: Draw) -> Rollout:
        """Draw one trajectory per prompt, and begin to score the pictures if a reward does so in the background."""
        rollout = super().rollout(draw)
        if not any(reward.background for reward in self.signals.training()):
            return rollout
        known = {part.name: getattr(rollout, part.name) for part in fields(Rollout)}
        images = self.backbone.decode(rollout.latents[:, -1])
        return Drawn(**known, images=images, scores=self.signals.begin(images, draw.prompts))

    def label(self, rollouts: list[Rollout], group_size: int) -> list[Rollout]:
        """Score the finished images, and give every trajectory its advantage over its siblings.

        A row whose score failed has no advantage, and does not count among its siblings.

        Raises:
            ValueError: if there are no siblings.
        """
        if group_size < 2:
            raise ValueError(f"advantages compare siblings, but group_size is {group_size}; set it to 2 or more")
        prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
        scores = self._score(rollouts, prompts)
        total = self.signals.total({name: score.value for name, score in scores.items()}, prompts)
        metrics = self._metrics(scores, prompts) | {"reward/equal_groups": _equal_groups(total, group_size)}
        advantage = self._advantage(total, group_size)[:, None].expand(-1, self.sampler.num_steps)
        labelled = []
        for rollout, rows in zip(rollouts, advantage.split([len(r.prompts) for r in rollouts]), strict=True):
            labelled.append(_settled(rollout).label(advantage=rows).log(metrics))
        return labelled

    def _score(self, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> dict[str, Scores]:
        images = torch.cat([self._images(rollout) for rollout in rollouts])
        begun = [rollout.scores for rollout in rollouts if isinstance(rollout, Drawn)]
        return self.signals.details(images, prompts, begun)

    def _images(self, rollout: Rollout) -> Tensor:
        if isinstance(rollout, Drawn) and rollout.images is not None:
            return rollout.images
        return self.backbone.decode(rollout.latents[:, -1])

    def _advantage(self, rewards: Tensor, group_size: int) -> Tensor:
        """Advantages of this rank's rows, scaled by the rewards of all ranks."""
        everywhere = cast(Tensor, self.all_gather(rewards)).reshape(-1)
        rows = slice(self.global_rank * len(rewards), (self.global_rank + 1) * len(rewards))
        return self.advantage(everywhere, group_size)[rows]

    def _metrics(self, scores: Mapping[str, Scores], prompts: Sequence[Prompt]) -> dict[str, float]:
        """Means of scores and parts over the rows of all ranks, and how many scores failed, where some did."""
        facts: dict[str, list[float]] = {}
        for callback in self.signals.training():
            score, name = scores[callback.name], f"reward/{callback.name}"
            covered = callback.covered(prompts).to(score.value.device)
            facts[name] = [*_sum_and_count(score.value), int((score.value.isnan() & covered).sum())]
            facts |= {f"{name}/{part}": [*_sum_and_count(values), 0] for part, values in score.parts.items()}
        added = added_over_ranks(self, facts)
        failed = {f"{name}/failed": float(lost) for name, (_, _, lost) in added.items() if lost}
        return {name: total / count if count else math.nan for name, (total, count, _) in added.items()} | failed


def _settled(rollout: Rollout) -> Rollout:
    return replace(rollout, images=None, scores={}) if isinstance(rollout, Drawn) else rollout


def _sum_and_count(values: Tensor) -> tuple[float, int]:
    return float(values.double().nansum()), int((~values.isnan()).sum())


def _equal_groups(rewards: Tensor, group_size: int) -> float:
    """Share of groups whose rewards, but for failures, are all equal: they teach nothing."""
    groups, inf = rewards.reshape(-1, group_size), torch.inf
    low, high = groups.nan_to_num(nan=inf).amin(1), groups.nan_to_num(nan=-inf).amax(1)
    return float((high <= low).float().mean())
