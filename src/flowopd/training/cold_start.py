"""ColdStart: where the student comes from, SFT on the teachers' trajectories or a merge of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from flowopd.core.objectives import FlowMatching
from flowopd.core.paths import interpolate, velocity_from
from flowopd.models import Backbone, LoRASpec, Merge
from flowopd.records import Conditioning, Rollout, StepBatch
from flowopd.rollouts import RowNoise, Sampler, VelocityField
from flowopd.training.policy import FlowPolicy


@dataclass(frozen=True)
class SFT:
    """Flow matching on final latents that the routed teachers sampled.

    σ is drawn from logit-normal(mean, std), as in SD3.

    Args:
        draws: step batches made of every rollout.
        mean, std: of the logit of σ.

    References:
        Scaling Rectified Flow Transformers (Esser et al., 2024), Eq. 19.
    """

    draws: int = 4
    mean: float = 0.0
    std: float = 1.0

    def batches(self, rollout: Rollout, noise: RowNoise) -> Iterator[StepBatch]:
        """Noised final latents, with the velocity noise - clean as target."""
        clean = rollout.latents[:, -1]
        for draw in range(self.draws):
            sigma = torch.sigmoid(self.mean + self.std * noise.named(f"sft level {draw}"))
            fresh = noise.named(f"sft noise {draw}", noise.shape)
            batch = StepBatch(
                x=interpolate(clean, fresh, sigma),
                sigma=sigma,
                sigma_next=torch.zeros_like(sigma),
                noisy=torch.zeros_like(sigma, dtype=torch.bool),
                cond=rollout.cond,
                tasks=[prompt.task for prompt in rollout.prompts],
            )
            yield batch.label(target=velocity_from(clean, fresh))


class ColdStart(FlowPolicy):
    """Makes the adapter that the student starts from.

    With a ``Merge`` nothing is trained: the merged adapter is exported as it is (``trainer.max_epochs: 0``). With
    ``SFT`` the routed teachers sample the rollouts and the student learns by flow matching.

    Args:
        backbone: the frozen model.
        strategy: ``SFT`` or ``Merge``.
        sampler: grid, dynamics and guidance, for rollouts and evaluation.
        lora: shape of the adapter, for ``SFT``.
        optimizer: built over the adapter's parameters.
        scheduler: stepped after every optimiser step.

    References:
        Flow-OPD (arXiv 2605.08063), cold start.
    """

    routed = True

    def __init__(
        self,
        backbone: Backbone,
        strategy: SFT | Merge,
        sampler: Sampler | None = None,
        lora: LoRASpec | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        start = strategy if isinstance(strategy, Merge) else None
        super().__init__(backbone, FlowMatching(), sampler, lora, start, optimizer, scheduler)
        self.strategy = strategy

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless every task has a teacher to sample from."""
        if isinstance(self.strategy, SFT):
            self.signals.router.check(tasks)
        elif self.trainer.max_epochs != 0:
            raise ValueError(
                f"a merge is not trained, but trainer.max_epochs is {self.trainer.max_epochs}; set it to 0"
            )

    def behaviour(self, tasks: Sequence[str]) -> VelocityField:
        """The routed teachers sample."""
        router = self.signals.router

        def velocity(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            return router.velocity(x, sigma, cond, tasks)

        return velocity

    def batches_per_rollout(self) -> int:
        """Draws of noise per final latent."""
        return self.strategy.draws if isinstance(self.strategy, SFT) else 1

    def cut(self, rollout: Rollout, noise: RowNoise) -> Iterator[StepBatch]:
        """Noised final latents instead of visited states."""
        assert isinstance(self.strategy, SFT)
        return self.strategy.batches(rollout, noise)
