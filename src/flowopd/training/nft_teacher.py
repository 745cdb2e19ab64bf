"""NFTTeacher: one expert per reward, by negative-aware fine-tuning on the forward process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from flowopd.core.advantages import GroupAdvantage
from flowopd.core.dynamics import ODE, Transition
from flowopd.core.levels import Levels, LogitNormal
from flowopd.core.objectives import NegativeAware, Objective
from flowopd.core.ranges import at_least, within
from flowopd.models import Backbone
from flowopd.models.adapters.lora import attach, follow, take_adapter
from flowopd.records import Conditioning, Rollout, StepBatch
from flowopd.rollouts import Draw, VelocityField
from flowopd.training.checkpoints import STUDENT
from flowopd.training.forward_process import noised
from flowopd.training.grpo_teacher import GRPOTeacher
from flowopd.training.roads import sampling

OLD = "old"

OWN_LABELS = frozenset({"target", "old"})
"""What the pictures and the old policy provide."""


@dataclass(frozen=True)
class Inertia:
    """How much of itself the old policy keeps when an iteration begins,  θ_old ← η_i · θ_old + (1 - η_i) · θ.

        η_i = min(rate · i, cap),      i iterations are done

    Args:
        rate: growth of η per iteration; 0 samples with the student of the last iteration.
        cap: largest η.

    >>> [Inertia(rate=0.1, cap=0.25).kept(i) for i in range(4)]
    [0.0, 0.1, 0.2, 0.25]
    """

    rate: float = 0.001
    cap: float = 0.5

    def __post_init__(self) -> None:
        at_least(0.0, rate=self.rate)
        within(0.0, 1.0, cap=self.cap)

    def kept(self, iterations: int) -> float:
        """η in [0, 1] after so many iterations."""
        return min(self.rate * iterations, self.cap)


class NFTTeacher(GRPOTeacher):
    """DiffusionNFT: rewards as in GRPO, learnt on the forward process, without log-probabilities.

    An old policy, an adapter of its own, draws the pictures with any solver. They are scored and compared with their
    siblings, noised again at fresh levels, and there the student moves away from the old policy, towards good pictures
    and away from bad ones. A KL to the base is ``Anchored(NegativeAware(), weighting=CleanPicture())`` with an
    ``AnchorCallback`` around a ``BaseTeacher``.

    Args:
        backbone: the frozen model.
        objective: what a noised picture is trained on; default: ``NegativeAware``.
        advantage: from rewards to advantages.
        draws: pairs of level and noise per picture.
        levels: density of the levels; default: ``LogitNormal``.
        inertia: how the old policy follows the student.
        options: what every ``FlowPolicy`` takes.

    References:
        DiffusionNFT (arXiv 2509.16117).
    """

    adapters = (STUDENT, OLD)

    exchangeable = True
    """Draws of noise on the same pictures."""

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective | None = None,
        advantage: GroupAdvantage | None = None,
        draws: int = 2,
        levels: Levels | None = None,
        inertia: Inertia | None = None,
        **options: Any,
    ) -> None:
        at_least(1, draws=draws)
        super().__init__(backbone, objective or NegativeAware(), advantage, **options)
        self.draws = draws
        self.levels = levels or LogitNormal()
        self.inertia = inertia or Inertia()

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless every task has a reward, and the objective can be had of noised pictures."""
        if steps := self.needs() & {"x_next", "log_prob_old", "state_kl", "kl_to_go"}:
            raise ValueError(
                f"the objective reads {sorted(steps)}, but noised pictures are no steps of a trajectory; "
                "use NegativeAware, or train a GRPOTeacher"
            )
        self.signals.require_labels(self.needs() - OWN_LABELS, tasks)

    def _attach_student(self) -> None:
        super()._attach_student()
        attach(self.backbone.network, OLD, take_adapter(self.backbone.network, STUDENT))

    @override
    def on_train_epoch_start(self) -> None:
        follow(self.backbone.network, OLD, STUDENT, self.inertia.kept(self.trainer.current_epoch))

    def old_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The old policy's guided velocity (B, C, H, W) at x (B, C, H, W) and σ (B,)."""
        return self.backbone.velocity(x, sigma, cond, OLD, self.sampler.guidance_scale)

    def behaviour(self, tasks: Sequence[str]) -> VelocityField:
        """The old policy samples."""
        return self.old_velocity

    def grid(self) -> list[Transition]:
        """A noised picture is a step without noise to the picture."""
        x, middle = torch.zeros(1, 1, 1, 1), torch.full((1,), 0.5)
        return [ODE().step(x, x, middle, 0 * middle)]

    def batches_per_rollout(self) -> int:
        """Pairs of level and noise per picture."""
        return self.draws

    def cut(self, rollout: Rollout, draw: Draw) -> Iterator[StepBatch]:
        """Finished pictures at fresh levels, with the old policy's velocities there and their advantages."""
        advantage = rollout.labels.advantage
        assert advantage is not None
        for number in range(self.draws):
            sigma = self.levels.levels(draw.noise.named(f"level {number}"))
            batch = noised(rollout, sigma, draw.noise.named(f"forward noise {number}", draw.noise.shape))
            with sampling(self):
                old = self.old_velocity(batch.x, batch.sigma, batch.cond)
            yield batch.label(old=old, advantage=advantage[:, 0])
