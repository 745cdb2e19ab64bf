"""Self-checks before a long run: a verdict per line, with the reason."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.schedules import FlowSchedule, ShiftedSchedule
from flowopd.core.tensors import row_mean
from flowopd.core.weights import ExactKL, Uniform
from flowopd.models import DiffusersBackbone
from flowopd.prompts.splits import held_out
from flowopd.records import Conditioning, StepBatch
from flowopd.rollouts import Draw
from flowopd.teachers import BaseTeacher, FullTeacher, Teacher
from flowopd.teachers.base import guidance_of, states_guidance
from flowopd.teachers.composed import parts_of
from flowopd.training.policy import FlowPolicy
from flowopd.training.roads import sampling
from flowopd.training.rollout_data import RolloutDataModule

ROWS = 2
"""Rows of every trial."""

EXACT_RATIO, EXACT_KL = 1e-6, 1e-9
"""Errors of a ratio, and of K in nats per latent dimension, where both forwards run alike."""

HARMFUL = 1e-3
"""Errors that training would notice: ten times the clip range of GRPO."""

KERNELS = (
    "rollouts and training run other kernels: of attention, on Hopper and newer cards perhaps cuDNN's "
    "(TORCH_CUDNN_SDPA_DEPRIORITIZED=1 puts it last), or by torch.compile or a precision plugin"
)

MARGIN = 1e9
"""Bytes of disk besides checkpoints: logs, tables and pictures."""


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Args:
        name: of the check.
        state: ``ok``; ``warn`` may be meant so; ``FAIL`` must not stay so; ``skipped`` could not be looked at.
        saw: one sentence.
    """

    name: str
    state: Literal["ok", "warn", "FAIL", "skipped"]
    saw: str

    def __str__(self) -> str:
        return f"{self.state:<8}{self.name}: {self.saw}"


class Warned(Exception):
    """May be meant so."""


class Skipped(Exception):
    """Could not be looked at."""


@dataclass
class Subject:
    """A recipe that is built, and what the checks share: a few rows of its first iteration."""

    policy: FlowPolicy
    data: RolloutDataModule
    trainer: Trainer
    ranks: int = 1

    @cached_property
    def first(self) -> Draw:
        """The first rows of the next iteration."""
        return self.data.draws()[0][:ROWS]

    @cached_property
    def batch(self) -> StepBatch:
        """Their first states at the first trained step."""
        draw = self.first
        cond = self.policy.backbone.encode(draw.texts)
        return self.policy.sampler.batch_at(draw.noise.start(), min(draw.trained), cond, draw.tasks)

    @cached_property
    def sampled(self) -> Transition:
        """The step that a rollout takes there."""
        with sampling(self.policy):
            velocity = self.policy.velocity(self.batch.x, self.batch.sigma, self.batch.cond)
            return self.policy.sampler.transition(self.batch, velocity)

    @cached_property
    def trained(self) -> Transition:
        """The step that training sees there."""
        with torch.enable_grad(), self.trainer.precision_plugin.train_step_context():
            return self.policy.proposed(self.batch).detach()

    @cached_property
    def apart(self) -> float:
        """How far the velocities of the two forwards are from each other, as a share of their size."""
        old, new = self.sampled.velocity, self.trained.velocity
        return float((new - old).norm() / old.norm())

    def rounding(self) -> float:
        """What a share may be that rounding alone makes: two steps of the coarsest numbers of a forward."""
        names, scale = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}, self.policy.sampler.guidance_scale
        used = [names.get(str(self.trainer.precision)), getattr(self.policy.backbone, "dtype", None), torch.float32]
        eps = max(torch.finfo(dtype).eps for dtype in used if dtype is not None)
        return 2 * eps * math.hypot(scale, scale - 1)  # guidance multiplies what its branches are off by

    def field(self, velocity: Callable[[Tensor, Tensor, Conditioning], Tensor]) -> Tensor:
        """What a velocity field answers there."""
        with sampling(self.policy):
            return velocity(self.batch.x, self.batch.sigma, self.batch.cond)


class SelfCheck(Callback):
    """Runs the cheap checks when a fit starts: a few forwards, no randomness, nothing decoded.

    Raises:
        ValueError: of the first check that fails, naming it.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, or stop."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, FlowPolicy) or not isinstance(data, RolloutDataModule):
            return
        with torch.random.fork_rng(devices=[]):
            for verdict in run_checks(CHEAP, Subject(pl_module, data, trainer)):
                if verdict.state == "FAIL":
                    raise ValueError(f"self-check failed before training: {verdict.name}: {verdict.saw}")
                told = verdict.state == "warn" or (verdict.state == "ok" and verdict.name in TOLD)
                if told and trainer.is_global_zero:
                    print("warning: " * (verdict.state == "warn") + f"{verdict.name}: {verdict.saw}", flush=True)


def run_checks(checks: Mapping[str, Callable[[Subject], str]], subject: Subject) -> Iterator[Verdict]:
    """Verdicts, one by one; without weights the checks that need them are skipped."""
    loaded = True
    for name, check in checks.items():
        if not loaded and check not in WITHOUT_WEIGHTS:
            yield Verdict(name, "skipped", "the weights did not load")
            continue
        verdict = _verdict(name, check, subject)
        loaded = loaded and not (check is weights_load and verdict.state == "FAIL")
        yield verdict


def _verdict(name: str, check: Callable[[Subject], str], subject: Subject) -> Verdict:
    try:
        return Verdict(name, "ok", check(subject))
    except Warned as warning:
        return Verdict(name, "warn", str(warning))
    except Skipped as reason:
        return Verdict(name, "skipped", str(reason))
    except torch.OutOfMemoryError:
        raise  # no fault of what is checked
    except Exception as error:  # whatever it is, it would end the run too
        first = next(iter(str(error).strip().splitlines()), "") or "without a message"
        kind = "" if isinstance(error, ValueError | FileNotFoundError) else f"{type(error).__name__}: "
        return Verdict(name, "FAIL", kind + first)


def recipe_fits(subject: Subject) -> str:
    """Sizes divide, the objective finds its labels, the road can provide them."""
    subject.data.check_sizes(subject.ranks)
    subject.data.setup("fit")
    rows = subject.data.prompts_per_iteration * subject.data.group_size
    return f"{rows} trajectories per iteration, in batches of {subject.data.batch_size}; ranks: {subject.ranks}"


def devices_are_there(subject: Subject) -> str:
    """The device of this process, and as many on the machine as are asked for."""
    device = subject.trainer.strategy.root_device
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and subject.ranks > found:
        raise Warned(f"{subject.ranks} ranks were asked for, this machine has {found} devices; right on several nodes")
    return f"{device.type}, {found} on this machine; ranks: {subject.ranks}"


def prompts_answer(subject: Subject) -> str:
    """Every task has prompts to train on, and to evaluate with."""
    data = subject.data
    counts = []
    for task, source in data.mixture.sources.items():
        drawn, kept = source.draw(2, data.seed), held_out(data.evaluation_prompts.get(task, source), 1)
        if len(drawn) < 2 or not all(prompt.text.strip() for prompt in [*drawn, *kept]):
            raise ValueError(f"task {task!r} answers with {[prompt.text for prompt in drawn]}; expected two texts")
        if wrong := [prompt.task for prompt in drawn if prompt.task != task]:
            raise ValueError(f"the prompts of task {task!r} say that they are of task {wrong[0]!r}")
        counts.append(f"{task}: {drawn[0].text[:60]!r}")
    return "; ".join(counts)


def folder_is_writable(subject: Subject) -> str:
    """The run folder can be made, and its disk holds the checkpoints."""
    folder = Path(subject.trainer.default_root_dir).absolute()
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=parent) as file:
        file.write(b"written")
    needed, free = _checkpoint_bytes(subject.policy) + MARGIN, shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(f"{parent} has {free / 1e9:.1f} GB left; a run needs {needed / 1e9:.1f} GB")
    return f"{parent} is writable, {free / 1e9:.0f} GB left"


def _checkpoint_bytes(policy: FlowPolicy) -> float:
    """Weights, two moments of the optimiser and an average, in the old checkpoint and in the new one."""
    return 8 * sum(float(p.nbytes) for p in policy.parameters() if p.requires_grad)


def weights_load(subject: Subject) -> str:
    """The backbone, the student and every teacher are read, and fit one another."""
    policy = subject.policy
    policy.configure_model()
    policy.to(subject.trainer.strategy.root_device)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    return f"{frozen / 1e6:.1f} M frozen parameters, {trained / 1e6:.2f} M trained"


def teachers_differ(subject: Subject) -> str:
    """Every teacher answers finite, and not as the base does."""
    fields = subject.policy.signals.teaching.teachers_by_name()
    if not fields:
        raise Skipped("there is no teacher")
    return ", ".join(_difference(subject, name, teacher) for name, teacher in fields.items())


def _difference(subject: Subject, name: str, teacher: Teacher) -> str:
    if isinstance(teacher, BaseTeacher):
        return f"{name} is the base"
    base = BaseTeacher(guidance_of(teacher))
    base.attach(subject.policy.backbone)
    theirs, bases = subject.field(teacher.velocity), subject.field(base.velocity)
    if not bool(theirs.isfinite().all()):
        raise ValueError(f"{name} answers with numbers that are not finite")
    if torch.equal(theirs, bases):
        raise ValueError(f"{name} answers exactly as the base model does; its adapter was not trained, or not applied")
    return f"{name} differs by {float((theirs - bases).norm() / bases.norm()):.1%}"


def guidance_is_meant(subject: Subject) -> str:
    """Which guidance each role has; a teacher whose own was left out is like the student, or it is told."""
    student = subject.policy.sampler.guidance_scale
    teachers = subject.policy.signals.teaching.teachers_by_name()
    if not teachers:
        raise Skipped("there is no teacher")
    scales = subject.policy.guidance()
    said = ", ".join(f"{name} {scales[name]}" for name in ("base", subject.policy.name, *teachers))
    parts = [(name, part) for name, teacher in teachers.items() for part in parts_of([teacher])]
    unlike = [name for name, part in parts if not states_guidance(part) and guidance_of(part) != student]
    if unlike:
        raise Warned(
            f"{said}; {unlike[0]} is asked without guidance, as it was given none: give it "
            f"guidance_scale: {student:g}, or 1 if that is meant"
        )
    return said


def ratio_is_one(subject: Subject) -> str:
    """ρ = p_θ(x'|x) / p_old(x'|x) at the first update, when θ is what sampled."""
    old, new, draw = subject.sampled, subject.trained, subject.first
    x_next = old.sample(draw.noise.step(min(draw.trained)))
    off = float((torch.exp(new.log_prob(x_next) - old.log_prob(x_next)) - 1).abs().max())
    return _alike(subject, f"the ratio is off by {off:.2g}", off, EXACT_RATIO)


def own_kl_is_zero(subject: Subject) -> str:
    """K = w · mean (v_θ - v)² of a teacher that is the student itself."""
    step = subject.trained
    weighting = ExactKL() if bool((step.std > 0).all()) else Uniform()
    kl = float((weighting.weight(step) * row_mean((step.velocity - subject.sampled.velocity) ** 2)).max())
    return _alike(subject, f"K is {kl:.2g} nats per latent dimension", kl, EXACT_KL)


def _alike(subject: Subject, saw: str, error: float, exact: float) -> str:
    """A sentence of two forwards that are alike; a warning where they differ as rounding does.

    Raises:
        ValueError: where they differ by more.
    """
    if error <= exact:
        return saw
    differ = f"{saw}, as velocities differ by {subject.apart:.2g} of their size between the rollout's forward and the "
    if error <= HARMFUL and subject.apart <= subject.rounding():
        raise Warned(f"{differ}training forward: no more than rounding; {KERNELS}")
    raise ValueError(
        f"{differ}training forward, more than rounding; look for dropout, a precision plugin, torch.compile or an "
        "attention kernel that treat them differently"
    )


def grids_agree(subject: Subject) -> str:
    """The noise levels are those of the pipeline's own scheduler, a full teacher's, or as was chosen."""
    backbone, sampler = subject.policy.backbone, subject.policy.sampler
    if not isinstance(backbone, DiffusersBackbone):
        raise Skipped(f"a {type(backbone).__name__} has no scheduler of diffusers")
    teachers = subject.policy.signals.teaching.teachers_by_name().values()
    others = [part.backbone for part in parts_of(teachers) if isinstance(part, FullTeacher)]
    for model in (model for model in (backbone, *others) if isinstance(model, DiffusersBackbone)):
        apart = max(_apart(model, sampler.schedule.sigmas(n)) for n in (sampler.num_steps, sampler.eval_steps))
        if apart > 1e-5:
            saw = f"the grid is up to {apart:.2g} away from that of the scheduler of {model.path!r}"
            if isinstance(sampler.schedule, ShiftedSchedule | FlowSchedule):
                raise ValueError(f"{saw}; leave the sampler's schedule out, or give it the shift of that model")
            return f"a {type(sampler.schedule).__name__}, as was asked; {saw}, so diffusers has to be given its sigmas"
    return f"{sampler.num_steps} steps in rollouts, {sampler.eval_steps} in evaluations"


def _apart(model: DiffusersBackbone, sigmas: Tensor) -> float:
    try:
        return float((model.stock_sigmas(len(sigmas) - 1) - sigmas).abs().max())
    except FileNotFoundError as error:
        raise Skipped(f"the scheduler of {model.path!r} is not here") from error


def rewards_answer(subject: Subject) -> str:
    """Two pictures decode, and every reward scores them by a finite number, for every task that it covers."""
    scorers, data = subject.policy.signals.judging.scorers, subject.data
    if not scorers:
        raise Skipped("there is no reward")
    images = subject.policy.backbone.decode(subject.batch.x)
    if not bool(images.isfinite().all()):
        raise ValueError("decoded pictures are not finite")
    answers = []
    for task, source in data.evaluation_prompts.items():
        prompts = held_out(source, len(images))
        for scorer in (scorer for scorer in scorers if scorer.covers(task)):
            answers.append(f"{scorer.name} of {task} {_finite(scorer.score(images, prompts), scorer.name, task)}")
    return ", ".join(answers)


def _finite(scores: Tensor, name: str, task: str) -> str:
    if not bool(scores.isfinite().all()):
        raise ValueError(f"reward {name!r} scored pictures of task {task!r} by {scores.tolist()}")
    return "/".join(f"{score:.2f}" for score in scores.tolist())


CHECKS: dict[str, Callable[[Subject], str]] = {
    "recipe fits together": recipe_fits,
    "devices": devices_are_there,
    "prompts answer": prompts_answer,
    "weights load": weights_load,
    "run folder": folder_is_writable,
    "grids agree": grids_agree,
    "guidance": guidance_is_meant,
    "teachers differ from the base": teachers_differ,
    "ratio is 1 at the first update": ratio_is_one,
    "K = 0 for a teacher equal to the student": own_kl_is_zero,
    "rewards answer": rewards_answer,
}
"""All of them, in the order in which they are worth knowing."""

CHEAP = {
    name: check
    for name, check in CHECKS.items()
    if check in (folder_is_writable, guidance_is_meant, ratio_is_one, own_kl_is_zero)
}
"""What a fit checks before its first update."""

TOLD = ("guidance",)
"""What a fit says of it, besides warnings."""

WITHOUT_WEIGHTS: Sequence[Callable[[Subject], str]] = (
    recipe_fits,
    devices_are_there,
    prompts_answer,
    weights_load,
    folder_is_writable,
    guidance_is_meant,
)


def check(policy: FlowPolicy, data: RolloutDataModule, trainer: Trainer, ranks: int = 1) -> Iterator[Verdict]:
    """Run every check in one process, on the trainer's device; nothing is trained.

    Args:
        policy, data, trainer: as a fit would get them.
        ranks: of the run that is planned.
    """
    trainer.strategy.connect(policy)
    policy.trainer = data.trainer = trainer
    yield from run_checks(CHECKS, Subject(policy, data, trainer, ranks))
