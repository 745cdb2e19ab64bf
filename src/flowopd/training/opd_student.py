"""OPDStudent: multi-teacher on-policy distillation."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from flowopd.core.objectives import Objective, TransitionKL
from flowopd.models import AdapterSource, Backbone, LoRASpec, Merge
from flowopd.rollouts import Sampler
from flowopd.training.policy import FlowPolicy


class OPDStudent(FlowPolicy):
    """The student samples its own trajectories; each row learns from its task's teacher at every visited state.

    Wrap the objective in ``Anchored`` and add an ``AnchorCallback`` for MAR. No image is decoded and no reward is
    called while training.

    Args:
        backbone: the frozen model.
        objective: what a visited step is trained on.
        sampler: grid, dynamics and guidance, for rollouts, training and evaluation alike.
        lora: shape of the adapter, if it starts from nothing.
        start: cold start: an adapter folder or file, a model of the hub, ``{path, subfolder, revision}``, or a merge of
            several.
        optimizer: built over the adapter's parameters.
        scheduler: stepped after every optimiser step.

    References:
        Flow-OPD (arXiv 2605.08063); the default objective is DiffusionOPD's (arXiv 2605.15055).
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective | None = None,
        sampler: Sampler | None = None,
        lora: LoRASpec | None = None,
        start: str | AdapterSource | Merge | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, objective or TransitionKL(), sampler, lora, start, optimizer, scheduler)
