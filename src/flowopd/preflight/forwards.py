"""How many forwards a recipe takes: its own code, run on a backbone that only counts."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from flowopd.core.objectives import anchor_share
from flowopd.models import Backbone, DiffusersBackbone
from flowopd.preflight.shapes import Shapes
from flowopd.records import Conditioning, Prompt
from flowopd.teachers import Composed, FullTeacher, Teacher
from flowopd.teachers.base import guidance_of
from flowopd.teachers.composed import at_guidance, identity, parts_of
from flowopd.training.callbacks.drift import DriftMetrics
from flowopd.training.callbacks.fixed_states import FixedStateKL
from flowopd.training.distances import Distances
from flowopd.training.losses import Losses
from flowopd.training.policy import FlowPolicy
from flowopd.training.rollout_data import RolloutDataModule
from flowopd.training.signals import AnchorCallback, RewardCallback, TeacherCallback

DRAWS = 50
"""Iterations that are counted where every one draws its trained steps, or those that the anchor is asked about."""

TRAINED, SAMPLED, DECODED = "student, trained", "student, rollout", "pictures decoded"
EVALUATED = "held-out pictures"


def count_forwards(
    policy: FlowPolicy,
    data: RolloutDataModule,
    callbacks: Sequence[Callback],
    ranks: int = 1,
    accumulate: int = 1,
    draws: int = DRAWS,
) -> dict[str, float]:
    """Rows of the transformer per optimiser step and rank, guidance included, and pictures decoded.

    The recipe's own code runs for an iteration of every task's turn, on a backbone that only counts; a rank's share is
    the mean over all ranks. Forwards of a part that several teachers have in common are under all of their names.
    """
    counts = Counter[str]()
    policy, data = _counted(policy, counts), copy.copy(data)
    policy.log_dict = _say_nothing  # type: ignore[method-assign]
    policy.distances, policy.losses, policy.watchers = Distances(policy.sampler.num_steps), Losses(), []
    connect(policy, data, _counting(callbacks, counts), accumulate)
    turns = sum(data.mixture.ratio.values()) if data.mixture.alternate else 1
    drawn = policy.sampler.steps is not None or anchor_share(policy.objective) < 1
    turns *= draws if drawn else 1  # a rollout stops at its last trained state, wherever that is
    updates = 0
    for _ in range(turns):
        batches = 0
        for batch in data.train_dataloader():
            policy.training_step(batch, batches)
            batches += 1
        updates += math.ceil(batches / ranks / accumulate)
    return {name: count / ranks / updates for name, count in counts.items()}


def count_evaluation(
    policy: FlowPolicy, data: RolloutDataModule, callbacks: Sequence[Callback], ranks: int = 1
) -> dict[str, float]:
    """Rows of the transformer per evaluation along a run and rank, guidance included, by what they are for.

    Held-out pictures are shared by the ranks; what callbacks measure besides, every rank does. ``FixedStateKL`` follows
    the teachers at the first evaluation alone.
    """
    if not data.evaluation_count:
        return {}
    counts = Counter[str]()
    policy, data = _counted(policy, counts), copy.copy(data)
    connect(policy, data, _counting(callbacks, counts))
    for batch in data.evaluation_loader():
        policy.columns(batch)
    found = {EVALUATED: counts.pop(SAMPLED, 0) / ranks}
    for callback in callbacks:
        if isinstance(callback, DriftMetrics):
            few = data.few_held_out(callback.prompts_per_task)
            policy.draw(few.prompts, few.noise)
            found["DriftMetrics"] = float(counts.pop(SAMPLED))
        elif isinstance(callback, FixedStateKL):
            FixedStateKL(callback.prompts_per_task).measure(policy, policy.velocity)
            found["FixedStateKL"] = float(counts.pop(SAMPLED, 0))
    return found | {f"{name}, once": float(rows) for name, rows in counts.items() if name != DECODED}


def pictures_per_update(policy: FlowPolicy, data: RolloutDataModule, ranks: int = 1, accumulate: int = 1) -> float:
    """Trajectories that every rank draws per optimiser step."""
    rows = data.prompts_per_iteration * data.group_size
    updates = math.ceil(rows // data.batch_size * policy.batches_per_rollout() / ranks / accumulate)
    return rows / ranks / updates


def connect(policy: FlowPolicy, data: RolloutDataModule, callbacks: Sequence[Callback], accumulate: int = 1) -> None:
    """Let a policy and its data know each other, without a fit."""
    trainer = idle_trainer(callbacks, accumulate)
    trainer.strategy.connect(policy)
    policy.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]


def idle_trainer(callbacks: Sequence[Callback] = (), accumulate: int = 1) -> Trainer:
    """A trainer on one CPU that writes nothing and trains nothing."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)  # which devices there are is of no interest here
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        plugins=[LightningEnvironment()],  # whoever started this process has nothing to say here
    )
    logger.setLevel(level)
    return trainer


def _counted(policy: FlowPolicy, counts: Counter[str]) -> FlowPolicy:
    """The policy on a backbone that only counts, and on the grid of its own."""
    counted = copy.copy(policy)
    if isinstance(policy.backbone, DiffusersBackbone):
        counted.sampler = policy.sampler.on(Shapes(policy.backbone))
    counted.backbone = _CountingBackbone(counts)
    return counted


def _say_nothing(*_: Any, **__: Any) -> None: ...


class _CountingBackbone(Backbone):
    """Latents of one number; a forward is a count."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self._network = nn.Linear(1, 1)

    @property
    def network(self) -> nn.Module:
        return self._network

    def load(self, device: torch.device | str = "cpu") -> None: ...

    def latent_shape(self) -> tuple[int, int, int]:
        return 1, 1, 1

    def encode(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(texts), 1, 1), torch.zeros(len(texts), 1))

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, adapter: str | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        self.counts[TRAINED if torch.is_grad_enabled() else SAMPLED] += rows_of(x, guidance_scale)
        return torch.zeros_like(x)

    def decode(self, latents: Tensor) -> Tensor:
        self.counts[DECODED] += len(latents)
        return torch.zeros(len(latents), 3, 1, 1)


class _CountingTeacher:
    def __init__(self, counts: Counter[str], name: str, part: Teacher) -> None:
        self.counts = counts
        self.name = name
        self.part = part
        self.identity = identity(part)
        scale = guidance_of(part)
        self.guidance_scale = 1.0 if scale is None else scale

    def attach(self, backbone: Backbone) -> None: ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.counts[self.name] += rows_of(x, self.guidance_scale)
        return torch.zeros_like(x)

    def fingerprint(self) -> str:
        return self.name

    def at(self, guidance_scale: float) -> _CountingTeacher:
        return _CountingTeacher(self.counts, self.name, at_guidance(self.part, guidance_scale))


class _NoReward:
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.zeros(len(prompts))


def rows_of(x: Tensor, guidance_scale: float) -> int:
    """Rows of the transformer that guided velocities at x (B, C, H, W) take."""
    return len(x) * (1 if guidance_scale in (0, 1) else 2)


def _counting(callbacks: Iterable[Callback], counts: Counter[str]) -> list[Callback]:
    """The same rewards, teachers and anchor, none of which computes anything."""
    callbacks = list(callbacks)
    names = part_names(callbacks)

    def stand_in(teacher: Teacher) -> Teacher:
        if isinstance(teacher, Composed):
            return teacher.over([stand_in(inner) for inner in teacher.teachers])
        return _CountingTeacher(counts, names[identity(teacher)], teacher)

    counting: list[Callback] = []
    for callback in callbacks:
        if isinstance(callback, RewardCallback):
            scorer = callback.scorer
            counting.append(RewardCallback(scorer.name, _NoReward(), scorer.tasks, scorer.weight))
        elif isinstance(callback, TeacherCallback | AnchorCallback):
            counting.append(_with_teacher(callback, stand_in(callback.role.teacher)))
    return counting


def part_names(callbacks: Iterable[Callback]) -> dict[Hashable, str]:
    """Whose the parts of teachers are, by identity: names of callbacks, and of a model of its own."""
    owners: dict[Hashable, list[str]] = {}
    models: dict[Hashable, str] = {}
    for callback in callbacks:
        if isinstance(callback, TeacherCallback | AnchorCallback):
            for part in parts_of([callback.role.teacher]):
                owners.setdefault(identity(part), []).append(callback.role.name)
                models[identity(part)] = f" ({_path(part.backbone)})" if isinstance(part, FullTeacher) else ""
    return {part: " + ".join(names) + models[part] for part, names in owners.items()}


def _path(backbone: Backbone) -> str:
    return str(getattr(backbone, "path", type(backbone).__name__))


def _with_teacher(callback: TeacherCallback | AnchorCallback, teacher: Teacher) -> Callback:
    if isinstance(callback, AnchorCallback):
        return AnchorCallback(teacher, callback.role.name)
    return TeacherCallback(list(callback.role.tasks), teacher, callback.role.name)
