"""FlowPolicy: an adapter on a frozen backbone, sampled, trained and evaluated by one Sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from flowopd.core.dynamics import Transition
from flowopd.core.objectives import BRANCHES, Objective, anchor_share, anchors_in, labels_of, weightings_in
from flowopd.core.weights import ExactKL
from flowopd.evaluation import Column, Scoreboard
from flowopd.models import AdapterSource, Backbone, LoRASpec, Merge
from flowopd.models.adapters.lora import (
    Adapter,
    adapter_parameters,
    adapter_scales,
    add_adapter,
    attach,
    take_adapter,
)
from flowopd.records import Conditioning, EvaluationBatch, Prompt, Rollout, StepBatch
from flowopd.rewards import Scores
from flowopd.rewards.judging import means, refuse_unscored
from flowopd.rollouts import Draw, Sampler, VelocityField
from flowopd.rollouts.noise import generator
from flowopd.rollouts.steps import some_of
from flowopd.teachers import BaseTeacher, FullTeacher
from flowopd.teachers.composed import guidance_said, parts_of
from flowopd.training.checkpoints import (
    MADE_BY,
    OPTIMIZER,
    SCALES,
    STUDENT,
    Resumed,
    as_built,
    average_in,
    check_resumable,
    made_by,
)
from flowopd.training.distances import Distances
from flowopd.training.losses import Losses
from flowopd.training.ranks.strategies import FSDP2, check_halves, check_places, check_trainer, is_sharded
from flowopd.training.ranks.sums import added_over_ranks
from flowopd.training.signals import Signals, signals_among


class Watcher(Protocol):
    """Whoever wants to see the pictures that are trained on."""

    def see(self, images: Tensor) -> None:
        """Look at finished pictures (B, 3, H, W) in [0, 1]."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Whoever wants to know how far the student still is from its teachers."""

    def learn(self, distances: Mapping[str, Mapping[int, float]]) -> None:
        """Take in the mean squared distances of an iteration, by task and step; alike on all ranks."""
        ...


class _Run(NamedTuple):
    """What a trainer's callbacks are to a policy, collected once."""

    trainer: Trainer
    signals: Signals
    scoreboard: Scoreboard


class FlowPolicy(LightningModule):
    """A policy to train. Subclasses choose what the steps of its rollouts are trained on.

    Args:
        backbone: the frozen model.
        objective: what a visited step is trained on.
        sampler: grid, dynamics and guidance, for rollouts, training and evaluation alike.
        lora: shape of the adapter, if it starts from nothing.
        start: an adapter folder or file, a model of the hub, ``{path, subfolder, revision}``, or a merge of several, to
            start from instead.
        optimizer: built over the adapter's parameters.
        scheduler: stepped after every optimiser step.
    """

    adapters: Sequence[str] = (STUDENT,)
    """Adapters that a run makes, and keeps in its checkpoints; the first is trained."""

    routed = False
    """Whether rows of a rollout follow different velocity fields."""

    called = "student"
    """What the trained model is called in tables and pictures, if it has no teachers."""

    exchangeable = False
    """Whether the batches of a rollout are alike, so that an update may take one of every rollout."""

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        sampler: Sampler | None = None,
        lora: LoRASpec | None = None,
        start: str | AdapterSource | Merge | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective
        self.sampler = (sampler or Sampler()).on(backbone)
        self.lora = lora or LoRASpec()
        self.start = start
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.network: nn.Module | None = None
        self.watchers: list[Watcher] = []
        self.distances = Distances(self.sampler.num_steps)
        self.losses = Losses()
        self.unscored: dict[str, list[str]] = {}  # by evaluation, the columns of which every score failed
        self._run: _Run | None = None
        self._as_built: dict[str, Any] = {}
        self._resumed: Resumed | None = None
        self.strict_loading = False  # a checkpoint holds the adapter, not the frozen backbone

    @property
    def signals(self) -> Signals:
        """What judges and what teaches, as the trainer's callbacks carry it."""
        return self._collected().signals

    @property
    def name(self) -> str:
        """What the trained model is called: who is taught is a student."""
        return "student" if self.signals.teaching.roles else self.called

    @property
    def scoreboard(self) -> Scoreboard:
        """Means of the running evaluation's scores."""
        return self._collected().scoreboard.to(self.device)

    def _collected(self) -> _Run:
        if self._run is None or self._run.trainer is not self.trainer:
            signals = signals_among(self.trainer.callbacks, is_sharded(self.trainer))  # type: ignore[attr-defined]
            self._run = _Run(self.trainer, signals, Scoreboard.of(signals.judging))
        return self._run

    def needs(self) -> frozenset[str]:
        """Labels that training reads."""
        return labels_of(self.objective)

    def configure_model(self) -> None:
        """Load the backbone, then attach the student and every teacher, before anything wraps or shards it."""
        if self.network is not None:
            return
        self._check_trainer()
        self.backbone.load(self.trainer.strategy.root_device)
        self._attach_student()
        self.signals.teaching.attach(self.backbone)
        if self.trainer.state.fn in (None, TrainerFn.FITTING):
            self.check_grid()
        self.network = self.backbone.network.train()  # lightning warns of parts in eval mode
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # so that a forward is the same in every phase, and no step walks the network to say so
        if isinstance(self.trainer.strategy, FSDP2):
            self.trainer.strategy.shard(self.network)
        frozen = [name for name, _ in self.named_buffers()]  # DDP would send them at every update
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def _check_trainer(self) -> None:
        """Refuse a trainer that cannot train this model, or these teachers."""
        check_trainer(self.trainer)
        check_halves(str(self.trainer.precision), getattr(self.backbone, "dtype", None))
        parts = [
            (name, part)
            for name, teacher in self.signals.teaching.teachers_by_name().items()
            for part in parts_of([teacher])
        ]
        places = [(name, part.device) for name, part in parts if isinstance(part, FullTeacher)]
        check_places(places, self.trainer.num_devices)

    def check_grid(self) -> None:
        """Ask the objective about every step that may be trained, on the CPU: in training no device is waited for.

        Raises:
            ValueError: if the objective cannot weigh one of them.
        """
        weightings = [*weightings_in(self.objective), *([ExactKL()] if self.keeps_velocities() else [])]
        for step in self.grid():
            for weighting in weightings:
                weighting.weight(step)

    def grid(self) -> list[Transition]:
        """A step of every kind that is trained, of a state of one number, on the CPU."""
        x = torch.zeros(1, 1, 1, 1)
        batches = [self.sampler.batch_at(x, j, Conditioning(x), [""]) for j in self.sampler.trained_steps()]
        return [self.sampler.transition(batch, x) for batch in batches]

    @override
    def train(self, mode: bool = True) -> FlowPolicy:
        self.training = mode  # the network knows no phases
        return self

    def _attach_student(self) -> None:
        if self.start is None:
            return add_adapter(self.backbone.network, STUDENT, self.lora, self.backbone.targets)
        source = AdapterSource(self.start) if isinstance(self.start, str) else self.start
        return attach(self.backbone.network, STUDENT, source.adapter(), trainable=True)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The student's guided velocity (B, C, H, W) at x (B, C, H, W) and σ (B,)."""
        return self.backbone.velocity(x, sigma, cond, STUDENT, self.sampler.guidance_scale)

    def proposed(self, batch: StepBatch) -> Transition:
        """The student's step at the states of a batch, with both branches of its guidance if the objective asks."""
        if not self.needs() & BRANCHES:
            return self.sampler.transition(batch, self.velocity(batch.x, batch.sigma, batch.cond))
        branches = self.backbone.branches(batch.x, batch.sigma, batch.cond, STUDENT)
        velocity = self.backbone.guide(*branches, self.sampler.guidance_scale)
        return replace(self.sampler.transition(batch, velocity), branches=branches)

    def base(self) -> BaseTeacher:
        """The model by itself, at the guidance at which it is meant to be drawn; if nobody says, at the policy's."""
        scale = self.backbone.guidance_scale
        base = BaseTeacher(self.sampler.guidance_scale if scale is None else scale)
        base.attach(self.backbone)
        return base

    def guidance(self) -> dict[str, str]:
        """At which guidance each model of a run is drawn, by name: base, teachers, anchor, the trained one."""
        teachers = {"base": self.base(), **self.signals.teaching.teachers_by_name()}
        said = {name: guidance_said(teacher) for name, teacher in teachers.items()}
        return said | {self.name: f"{self.sampler.guidance_scale:g}"}

    def behaviour(self, tasks: Sequence[str]) -> VelocityField:
        """The velocity field that samples rollouts of these tasks: the student's own."""
        return self.velocity

    def rollout(self, draw: Draw) -> Rollout:
        """Draw one trajectory per prompt with the behaviour policy."""
        cond, field = self.backbone.encode(draw.texts), self.behaviour(draw.tasks)
        return self.sampler.rollout(field, draw.prompts, cond, draw.noise, not self.routed, self.keeps_velocities())

    def keeps_velocities(self) -> bool:
        """Whether somebody reads the velocities that a rollout followed."""
        return bool(self.needs() & {"state_kl", "kl_to_go"})

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless the callbacks provide what training on these tasks needs.

        Raises:
            ValueError: saying what is missing.
        """
        if self.needs() & BRANCHES and self.sampler.guidance_scale == 1:
            raise ValueError(
                "the objective compares branches, but the student is drawn without guidance and never uses its "
                "unconditional one; give the sampler a guidance_scale, or take flowopd.core.TransitionKL"
            )
        self.signals.require_labels(self.needs(), tasks)

    def label(self, rollouts: list[Rollout], group_size: int) -> list[Rollout]:
        """Add what can only be known of finished trajectories."""
        if self.keeps_velocities():
            return [self.signals.teaching.label_trajectory(rollout, self.sampler) for rollout in rollouts]
        return rollouts

    @torch.no_grad()
    def pictures(self, rollout: Rollout) -> Tensor:
        """Decode the finished pictures (B, 3, H, W) in [0, 1] of a rollout, and show them to whoever watches."""
        images = self.backbone.decode(rollout.latents[:, -1])
        for watcher in self.watchers:
            watcher.see(images)
        return images

    def begin_to_judge(self, rollout: Rollout) -> dict[str, Future[Scores]]:
        """Decode the pictures of a rollout and begin to score them; they are not kept."""
        return self.signals.judging.begin(self.pictures(rollout), rollout.prompts)

    def judged(
        self, rollouts: Sequence[Rollout], begun: Sequence[Mapping[str, Future[Scores]]] = ()
    ) -> tuple[Tensor, dict[str, float]]:
        """Training rewards (B,) of finished trajectories, and means over the rows of all ranks to log.

        Args:
            rollouts: B trajectories in all; their pictures are decoded and scored one rollout at a time.
            begun: of every rollout, what ``begin_to_judge`` said, where it was asked before.

        Returns:
            Rewards, NaN where one failed; and ``reward/<name>`` of rewards and their parts, with
            ``reward/<name>/failed`` where some failed.

        Raises:
            ValueError: if a reward failed for every picture.
        """
        judging, prompts = self.signals.judging, [prompt for rollout in rollouts for prompt in rollout.prompts]
        begun = begun or [self.begin_to_judge(rollout) for rollout in rollouts]
        scores = judging.gather(begun, rollouts[0].latents.device)
        tally = added_over_ranks(self, judging.tally(scores, prompts))
        refuse_unscored(tally)
        return judging.total(scores, prompts), {f"reward/{name}": mean for name, mean in means(tally).items()}

    def batches_per_rollout(self) -> int:
        """How many step batches ``cut`` makes of a rollout."""
        return self.sampler.trained_per_rollout()

    def unasked(self, key: object) -> frozenset[int]:
        """Which batches of a rollout the anchor is not asked about, by their number; the same for a key."""
        batches, share = self.batches_per_rollout(), anchor_share(self.objective)
        asked = range(batches) if share == 1 else some_of(batches, share, generator(f"anchored steps {key}"))
        return frozenset(range(batches)).difference(asked)

    def cut(self, rollout: Rollout, draw: Draw) -> Iterator[StepBatch]:
        """Cut the rollout of a draw into one batch per trained step; its rows stay together, as they were sampled."""
        for j, counts in draw.trained.items():
            batch = self.sampler.batch_at(rollout.latents[:, j], j, rollout.cond, draw.tasks)
            yield replace(batch, metrics=rollout.metrics, counts=counts).label(
                x_next=rollout.latents[:, j + 1],
                log_prob_old=rollout.log_probs[:, j],
                **{name: value[:, j] for name, value in rollout.labels.present().items()},
            )

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """One objective on one batch of visited states."""
        student = self.proposed(batch)
        loss, metrics = self.objective.loss(student, batch.labels)
        self.distances.note(student, batch)
        self.losses.see(self.objective, student, batch, loss.detach())
        if batch.advance is not None:
            batch.advance(student.detach())
        known = {name: torch.full_like(loss.detach(), value) for name, value in batch.metrics.items()}
        logged = {**metrics, **known}  # a number would be sent, and the device waited for
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.x))
        return loss * batch.counts

    def on_train_epoch_start(self) -> None:
        """Let what changes along training be as it is in this iteration."""
        self.distances.forget()
        self.losses = Losses()
        for anchored in anchors_in(self.objective):
            anchored.iteration = self.trainer.current_epoch

    def on_train_epoch_end(self) -> None:
        """Log losses; the data may draw more of the task that is farthest from its teacher."""
        self.log_dict(self.losses.means(self), sync_dist=True)
        found = self.distances.taken(self)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, Learner):
            data.learn(found)

    @torch.no_grad()
    def draw(self, prompts: Sequence[Prompt], noise: Tensor, field: VelocityField | None = None) -> Tensor:
        """Draw images (B, 3, H, W) in [0, 1] by the ODE from noise (B, C, H, W), with any velocity field.

        In the precision of training, from wherever it is called.
        """
        with self.trainer.precision_plugin.forward_context():
            cond = self.backbone.encode([prompt.text for prompt in prompts])
            return self.backbone.decode(self.sampler.draw(field or self.velocity, cond, noise))

    @torch.no_grad()
    def columns(self, batch: EvaluationBatch, field: VelocityField | None = None) -> dict[str, Column]:
        """Every column of an evaluation of what a velocity field draws: one computation for validation and tables.

        Where nothing is scored, nothing is drawn.
        """
        if not self.signals.judging.scorers:
            return {}
        with self.trainer.precision_plugin.forward_context():
            return self.signals.judging.columns(self.draw(batch.prompts, batch.noise, field), batch.prompts)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Draw held-out prompts and score them."""
        self.scoreboard.update(self.columns(batch), batch.counted)

    def on_validation_epoch_end(self) -> None:
        """Log every reward's mean as ``val/<reward>``, or ``test/<reward>`` in a test."""
        stage = "test" if self.trainer.testing else "val"
        means = self.evaluated(stage, self.scoreboard)
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)
        self.scoreboard.reset()

    def evaluated(self, name: str, board: Scoreboard) -> dict[str, float]:
        """Means of an evaluation; remembers under its name which columns nothing could be said of."""
        means = board.compute()
        self.unscored[name] = board.unscored
        return means

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """As ``validation_step``."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log every reward's mean as ``test/<reward>``."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of held-out prompts."""
        return self.draw(batch.prompts, batch.noise)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union of shapes
        """Optimiser over the adapter, and its schedule in optimiser steps."""
        optimizer, schedule = self._optimizer()
        self._as_built = as_built(optimizer)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> tuple[Optimizer, LRScheduler | None]:
        optimizer = self.optimizer(adapter_parameters(self.backbone.network, STUDENT))
        return optimizer, self.scheduler(optimizer) if self.scheduler else None

    def on_train_start(self) -> None:
        """Let what was changed since the checkpoint take effect."""
        if self._resumed is not None:
            self._resumed.take_effect(self.trainer)
            self._resumed = None

    def student(self) -> Adapter:
        """A copy of the student's adapter; under a sharded strategy all ranks must ask for it."""
        return take_adapter(self.backbone.network, STUDENT)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors of its own adapters only; teachers and the backbone are found again by the config."""
        state: Mapping[str, Any] = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if any(f".{name}." in key for name in self.adapters)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which ranks made the checkpoint, with which optimiser, and how strong the adapter is."""
        checkpoint[MADE_BY] = made_by(self.trainer)
        checkpoint[SCALES] = adapter_scales(self.backbone.network, STUDENT)
        checkpoint[OPTIMIZER] = self._as_built

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another adapter or optimiser; take its average where nothing is trained.

        Raises:
            ValueError: naming what does not fit.
        """
        self._check_shapes(checkpoint["state_dict"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_resumable(self.trainer, checkpoint)
            self._resumed = Resumed(checkpoint, *self._optimizer())
            checkpoint["lr_schedulers"] = []  # made anew, at the step where they were
        else:
            checkpoint["state_dict"] |= average_in(checkpoint)

    def _check_shapes(self, state: Mapping[str, Tensor]) -> None:
        mine = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        theirs = {key: tuple(value.shape) for key, value in state.items()}
        if mine != theirs:
            key = next(iter(dict(mine.items() ^ theirs.items())))
            raise ValueError(
                f"the checkpoint holds another adapter: {key} has shape {theirs.get(key)} there, {mine.get(key)} here"
            )
