"""ColdStart: where the student comes from, SFT on trajectories or a merge of the teachers' weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowopd.core.levels import LogitNormal
from flowopd.core.objectives import FlowMatching
from flowopd.core.ranges import above, at_least, within
from flowopd.core.tensors import picks
from flowopd.models import Backbone, Merge
from flowopd.records import Conditioning, Rollout, StepBatch
from flowopd.rollouts import Draw, RowNoise, VelocityField
from flowopd.training.forward_process import noised
from flowopd.training.policy import FlowPolicy
from flowopd.training.ranks.sums import added_over_ranks


@dataclass(frozen=True)
class SFT:
    """Flow matching on final latents that the routed teachers, or the model itself, sampled.

    logit σ is drawn from a normal distribution; SD3 takes its mean for 0 and shifts the levels by 3, which amounts to a
    mean of log 3. Of the siblings of a prompt all may count alike, or by their
    training reward r (``RewardCallback``), with weights that sum to their number G:

        best:     w = G / n for the n siblings of the highest reward, 0 for the others
        softmax:  w = G · exp(r / temperature) / Σ_siblings exp(r / temperature)

    A sibling whose reward is NaN (scoring failed) has weight 0. What has no weight costs no forward.

    Args:
        draws: step batches made of every rollout.
        sigma_mean, sigma_std: of the logit of σ.
        source: who samples: ``teachers``, as in the paper, or ``self``, which needs no teacher but a reward.
        keep: which siblings count: ``all``, the ``best``, or by ``softmax``.
        temperature: of the softmax, in units of the reward.

    Raises:
        ValueError: if a number is out of range, or the model would learn from its own pictures without a reward.

    References:
        Flow-OPD (arXiv 2605.08063), SFT cold start; Scaling Rectified Flow Transformers (Esser et al., 2024), Eq. 19;
        reward-weighted regression (Peters and Schaal, 2007); RAFT (arXiv 2304.06767), the best of N.
    """

    draws: int = 4
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    source: Literal["teachers", "self"] = "teachers"
    keep: Literal["all", "best", "softmax"] = "all"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.source == "self" and self.keep == "all":
            raise ValueError("SFT on all of its own pictures teaches a model nothing; set keep to best or softmax")
        at_least(1, draws=self.draws)
        within(-10.0, 10.0, sigma_mean=self.sigma_mean)
        at_least(0.0, sigma_std=self.sigma_std)
        above(0.0, temperature=self.temperature)

    def weights(self, rewards: Tensor, group_size: int) -> Tensor:
        """Weights (B,), summing to G in every group of siblings, or to 0 where no reward is known.

        Args:
            rewards: (B,), siblings next to each other.
            group_size: G.
        """
        groups = rewards.double().reshape(-1, group_size)
        known = torch.where(groups.isnan(), -torch.inf, groups)
        if self.keep == "softmax":
            share = torch.softmax(known / self.temperature, 1)
        else:
            best = (known == known.amax(1, keepdim=True)) & known.isfinite()
            share = best / best.sum(1, keepdim=True)
        return (group_size * share.nan_to_num(0)).flatten().float()

    def batches(self, rollout: Rollout, noise: RowNoise) -> Iterator[StepBatch]:
        """Noised final latents, with the velocity noise - clean as target."""
        density = LogitNormal(self.sigma_mean, self.sigma_std)
        weight = None if rollout.labels.weight is None else rollout.labels.weight[:, 0]
        kept = [] if weight is None else weight.nonzero().flatten().tolist() or [0]
        for draw in range(self.draws):
            sigma = density.levels(noise.named(f"sft level {draw}"))
            batch = noised(rollout, sigma, noise.named(f"sft noise {draw}", noise.shape))
            yield batch if weight is None else _weighty(batch, weight, kept)


def _weighty(batch: StepBatch, weight: Tensor, numbers: Sequence[int]) -> StepBatch:
    """The rows of a batch that have a weight, so that their weighted mean is that of the whole batch.

    One row stays in any case, so that every rank runs as many forwards.
    """
    rows, target = picks(numbers, weight.device), batch.labels.target
    assert target is not None
    kept = replace(
        batch,
        x=batch.x[rows],
        sigma=batch.sigma[rows],
        sigma_next=batch.sigma_next[rows],
        noisy=batch.noisy[rows],
        cond=batch.cond[numbers],
        tasks=[batch.tasks[row] for row in numbers],
    )
    return kept.label(target=target[rows], weight=weight[rows] * len(numbers) / len(weight))


class ColdStart(FlowPolicy):
    """Makes the adapter that the student starts from.

    With a ``Merge`` nothing is trained: the merged adapter is exported as it is (``trainer.max_epochs: 0``), and
    ``merge_report.md`` says what it keeps of every teacher. With ``SFT`` the routed teachers, or the student itself,
    sample the rollouts and the student learns by flow matching.

    Args:
        backbone: the frozen model.
        strategy: ``SFT`` or ``Merge``.
        options: what every ``FlowPolicy`` takes, but for ``objective`` and ``start``.

    References:
        Flow-OPD (arXiv 2605.08063), cold start.
    """

    exchangeable = True
    """Draws of noise on the same pictures."""

    name = "cold-start"

    def __init__(
        self,
        backbone: Backbone,
        strategy: SFT | Merge,
        **options: Any,
    ) -> None:
        start = strategy if isinstance(strategy, Merge) else None
        super().__init__(backbone, objective=FlowMatching(), start=start, **options)
        self.strategy = strategy
        self.routed = not (isinstance(strategy, SFT) and strategy.source == "self")

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless there is somebody to sample from, and a reward where one chooses."""
        if isinstance(self.strategy, Merge):
            if self.trainer.max_epochs != 0:
                raise ValueError(
                    f"a merge is not trained, but trainer.max_epochs is {self.trainer.max_epochs}; set it to 0"
                )
            return
        if self.strategy.source == "teachers":
            self.signals.teaching.router.check(tasks)
        if self.strategy.keep != "all":
            self.signals.require_rewards(tasks)

    def needs(self) -> frozenset[str]:
        """What flow matching reads, and weights, which finished trajectories alone have."""
        return super().needs() | {"weight"}

    def behaviour(self, tasks: Sequence[str]) -> VelocityField:
        """The routed teachers sample, or the student itself."""
        if not self.routed:
            return self.velocity
        router = self.signals.teaching.router

        def velocity(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            return router.velocity(x, sigma, cond, tasks)

        return velocity

    def label(self, rollouts: list[Rollout], group_size: int) -> list[Rollout]:
        """Weigh every picture by its reward among its siblings.

        Raises:
            ValueError: if there are no siblings to choose from.
        """
        if not isinstance(self.strategy, SFT) or self.strategy.keep == "all":
            return rollouts
        if group_size < 2:
            raise ValueError(
                f"keep: {self.strategy.keep} chooses among siblings, but group_size is {group_size}; set 2 or more"
            )
        rewards, metrics = self.judged(rollouts)
        weights = self.strategy.weights(rewards, group_size)
        kept = {"sum and weight": [float((weights * rewards.nan_to_num(0)).sum()), float(weights.sum())]}
        total, weight = added_over_ranks(self, kept)["sum and weight"]
        metrics["sft/kept_reward"] = total / weight if weight else math.nan
        shares = weights.split([len(rollout.prompts) for rollout in rollouts])
        return [_weighted(rollout, share).log(metrics) for rollout, share in zip(rollouts, shares, strict=True)]

    def batches_per_rollout(self) -> int:
        """Draws of noise per final latent."""
        return self.strategy.draws if isinstance(self.strategy, SFT) else 1

    def cut(self, rollout: Rollout, draw: Draw) -> Iterator[StepBatch]:
        """Noised final latents instead of visited states."""
        assert isinstance(self.strategy, SFT)
        return self.strategy.batches(rollout, draw.noise)


def _weighted(rollout: Rollout, weight: Tensor) -> Rollout:
    return rollout.label(weight=weight[:, None].expand(-1, rollout.log_probs.shape[1]))
