"""The laws of the runs: on-policy ratios, one gradient by two roads, resuming to the bit, sentences for mistakes."""

from functools import partial

import pytest
import tiny
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves_with_path

from flowopd.core import (
    Anchored,
    ClippedSurrogate,
    ExactKL,
    LogRatioSurrogate,
    Released,
    ReturnToGo,
    StateRewardSurrogate,
    TransitionKL,
    Uniform,
)
from flowopd.evaluation import Scoreboard
from flowopd.models import LoRASpec, Merge
from flowopd.models.adapters.files import read_adapter
from flowopd.models.adapters.lora import Adapter
from flowopd.records import Prompt, StepBatch
from flowopd.rollouts import RowNoise, Sampler
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import (
    EMA,
    SFT,
    AdapterExport,
    AnchorCallback,
    ColdStart,
    GRPOTeacher,
    OPDStudent,
    RewardCallback,
    RolloutDataModule,
    TeacherCallback,
)
from flowopd.training.signals import signals_among

ADAM = partial(torch.optim.AdamW, lr=1e-2)
RED = partial(RewardCallback, "red", tiny.Brightness(0))
GREEN = partial(RewardCallback, "green", tiny.Brightness(1))


@pytest.fixture(scope="module")
def expert(tiny_pipeline, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("expert"), tiny_pipeline)


@pytest.fixture(scope="module")
def other_expert(tiny_pipeline, tmp_path_factory):
    return tiny.expert(tmp_path_factory.mktemp("other"), tiny_pipeline, seed=2, rank=2)


@pytest.fixture
def opd(tiny_pipeline):
    return partial(tiny.policy, OPDStudent, tiny_pipeline)


@pytest.fixture
def grpo(tiny_pipeline):
    return partial(tiny.policy, GRPOTeacher, tiny_pipeline)


@pytest.fixture
def run(tmp_path):
    """Fit a policy and return its trainer."""

    def fit(policy, data: RolloutDataModule, callbacks=(), ckpt_path=None, **options):
        trainer = tiny.trainer(tmp_path, callbacks, **options)
        torch.manual_seed(0)  # of the student's first factors
        trainer.fit(policy, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return trainer

    return fit


KEYS = [f"0 0 {group} {sibling}" for group in range(4) for sibling in range(2)]
"""Keys of the noise of the first iteration's rows."""


def teach(folder: str, *tasks: str, **options) -> TeacherCallback:
    return TeacherCallback(list(tasks) or ["red"], LoRATeacher(folder, **options))


def assert_same(first: Adapter, second: Adapter, atol: float = 0.0):
    assert first.tensors.keys() == second.tensors.keys()
    for key, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[key], value, rtol=0, atol=atol)


class Batches(Callback):
    """Keeps every batch that is trained on."""

    def __init__(self):
        self.seen: list[StepBatch] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


# ----------------------------------------------------------------------------------------------------------------- GRPO


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_on_policy_ratio_is_one(grpo, run, expert, scale):
    """In the first update of an iteration, to the bit."""
    policy = grpo(ClippedSurrogate(), start=expert, sampler=Sampler(num_steps=4, guidance_scale=scale))
    trainer = run(policy, tiny.data(), [RED()], accumulate_grad_batches=6, max_epochs=3)
    assert trainer.global_step == 3
    assert trainer.callback_metrics["policy/ratio"] == 1
    assert trainer.callback_metrics["policy/log_ratio"] == 0
    assert trainer.callback_metrics["policy/clip_fraction"] == 0


def test_after_an_update_the_ratio_moves(grpo, run, expert):
    trainer = run(grpo(start=expert, optimizer=ADAM), tiny.data(), [RED()])
    assert trainer.global_step == 6
    assert trainer.callback_metrics["policy/log_ratio"] != 0


def test_siblings_compete_with_each_other_at_every_step(grpo, run, expert):
    batches = Batches()
    run(grpo(start=expert), tiny.data(), [RED(), batches])
    advantages = torch.stack([batch.labels.advantage for batch in batches.seen]).reshape(2, 3, 2, 2)
    assert advantages.abs().min() > 0.1  # of 2 batches, 3 steps, 2 prompts, 2 siblings
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(2, 3, 2), atol=1e-5, rtol=0)
    assert (advantages == advantages[:, :1]).all()


def test_grpo_raises_its_reward(grpo, run):
    lora = LoRASpec(rank=8, alpha=16, targets=["attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2", "proj_out"])
    optimizer = partial(torch.optim.AdamW, lr=3e-2)
    policy = grpo(ClippedSurrogate(clip_range=1.0), lora=lora, optimizer=optimizer)
    data = tiny.data(group_size=16, batch_size=64, share_start=True, evaluation_count=32)
    before = score(policy, data, run)
    run(policy, data, [RED()], max_epochs=10, accumulate_grad_batches=3)
    assert score(policy, data, run) > before + 0.02


def score(policy, data, run) -> float:
    trainer = run(policy, data, [RED()], max_epochs=0, limit_val_batches=1.0)
    return trainer.validate(policy, data, verbose=False)[0]["val/red"]


def test_the_training_reward_is_the_weighted_sum_of_the_scores():
    quality = RewardCallback("quality", tiny.Brightness(2), weight=0.2)
    callbacks = [RED(tasks=["red"], weight=0.8), GREEN(tasks=["green"], weight=0.8), quality]
    images, prompts = torch.rand(3, 3, 8, 8), [Prompt("", task) for task in ("red", "green", "red")]
    judging = signals_among(callbacks).judging
    scores = judging.detail(images, prompts)
    total = judging.total(scores, prompts)
    red, green, blue = images.mean((2, 3)).T
    torch.testing.assert_close(total, 0.8 * torch.stack([red[0], green[1], red[2]]) + 0.2 * blue)
    torch.testing.assert_close(
        scores["red"].value, torch.stack([red[0], torch.tensor(torch.nan), red[2]]), equal_nan=True
    )


class Never:
    """A reward that must not be asked."""

    def score(self, images, prompts):
        raise AssertionError("this reward does not train")


def test_a_reward_of_weight_zero_is_only_evaluated(grpo, run):
    run(grpo(), tiny.data(), [RED(), RewardCallback("watched", Never(), weight=0.0)])


def test_the_anchor_of_a_new_policy_is_itself(grpo, run):
    """Before the first update the student is the base, so the KL to it is exactly 0."""
    policy = grpo(Anchored(ClippedSurrogate(), strength=0.04))
    trainer = run(policy, tiny.data(), [RED(), AnchorCallback(BaseTeacher())], accumulate_grad_batches=6)
    assert trainer.callback_metrics["anchor/loss"] == 0
    assert trainer.callback_metrics["policy/ratio"] == 1


# --------------------------------------------------------------------------------------------------------- distillation


OBJECTIVES = {
    "exact": lambda: TransitionKL(),
    "uniform": lambda: TransitionKL(Uniform()),
    "anchored": lambda: Anchored(TransitionKL(Released()), strength=0.02, weighting=Released()),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_fused_and_whole_rollouts_give_the_same_gradient(opd, run, expert, other_expert, kind):
    callbacks, students = [teach(expert, "red"), teach(other_expert, "green", guidance_scale=2.0)], []
    callbacks += [AnchorCallback(LoRATeacher(other_expert))] if kind == "anchored" else []
    for fused in (False, True):
        policy = opd(OBJECTIVES[kind](), lr=1.0, sampler=Sampler(num_steps=4, window=(1, 3), trained=(1, 3)))
        trainer = run(policy, tiny.data("red", "green", fused=fused), callbacks, accumulate_grad_batches=4)
        assert trainer.global_step == 1
        students.append(policy.student())
    assert_same(*students, atol=1e-6)
    assert any(value.abs().max() > 1e-4 for key, value in students[0].tensors.items() if "lora_B" in key)


def test_the_fused_road_needs_one_student_forward_per_step(opd, run, expert, monkeypatch):
    def forwards(fused: bool) -> int:
        policy, calls = opd(), []
        velocity = policy.velocity
        monkeypatch.setattr(policy, "velocity", lambda *args: calls.append(args) or velocity(*args))
        run(policy, tiny.data(fused=fused), [teach(expert)], accumulate_grad_batches=3)
        return len(calls)

    assert forwards(fused=True) == 2 * 3  # two batches of three trained steps; what follows them is not needed
    assert forwards(fused=False) == 2 * (4 + 3)


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_whoever_behaves_leads_to_the_trained_states(opd, run, expert, other_expert, fused, monkeypatch):
    """Steps before the first trained one follow ``policy.behaviour``, on every road."""
    policy, batches = opd(sampler=Sampler(4, window=(0, 3), trained=(2, 3))), Batches()
    guide = LoRATeacher(other_expert)
    monkeypatch.setattr(policy, "behaviour", lambda tasks: guide.velocity)
    data = tiny.data(batch_size=8, fused=fused, evaluation_prompts={task: tiny.Words(task) for task in ("red", "x")})
    run(policy, data, [teach(expert), TeacherCallback(["x"], guide), batches])
    noise, sampler, cond = RowNoise((4, 8, 8), *[KEYS] * 2), policy.sampler, batches.seen[0].cond
    led = sampler.rollout(guide.velocity, [Prompt("", "red")] * 8, cond, noise)
    torch.testing.assert_close(batches.seen[0].x, led.latents[:, 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_the_student_approaches_its_teacher(opd, run, expert, fused):
    policy = opd(TransitionKL(Uniform()), optimizer=ADAM)
    distances = Distances()
    run(policy, tiny.data(fused=fused), [teach(expert), distances], max_epochs=15, accumulate_grad_batches=3)
    assert distances.seen[-1] < 0.3 * distances.seen[0]


class Distances(Callback):
    """The mean squared velocity error of every iteration."""

    def __init__(self):
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(float(trainer.callback_metrics["distill/velocity_mse"]))


@pytest.mark.parametrize("objective", [TransitionKL(), LogRatioSurrogate(), ReturnToGo(), StateRewardSurrogate()])
def test_distillation_decodes_no_image_and_asks_no_reward(opd, run, expert, objective, monkeypatch):
    policy = opd(objective)
    monkeypatch.setattr(policy.backbone, "decode", Never().score)
    run(policy, tiny.data(), [teach(expert), RewardCallback("never", Never())])


@pytest.mark.parametrize(("objective", "kept"), [(TransitionKL(), False), (StateRewardSurrogate(), True)])
def test_velocities_of_a_rollout_are_kept_for_who_reads_them(opd, run, expert, objective, kept, monkeypatch):
    policy, rollouts = opd(objective), []
    cut = policy.cut
    monkeypatch.setattr(policy, "cut", lambda rollout, draw: rollouts.append(rollout) or cut(rollout, draw))
    run(policy, tiny.data(), [teach(expert)])
    assert {rollout.velocities is not None for rollout in rollouts} == {kept}


@pytest.mark.parametrize("objective", [TransitionKL(), ReturnToGo(), Anchored(TransitionKL(Uniform()))])
def test_a_step_that_an_objective_cannot_weigh_is_refused_before_anything_is_sampled(
    opd, run, expert, objective, monkeypatch
):
    policy = opd(objective, sampler=Sampler(4, window=(0, 1), trained=(0, 3)))
    anchors = [AnchorCallback(BaseTeacher())] if isinstance(objective, Anchored) else []
    monkeypatch.setattr(policy, "rollout", Never().score)
    with pytest.raises(ValueError, match="the KL of a deterministic step is infinite; add noise to every trained step"):
        run(policy, tiny.data(), [teach(expert), *anchors])


def test_labels_of_a_trajectory_are_its_kls_to_the_teacher_and_their_later_sums(opd, run, expert, other_expert):
    policy, batches, teacher = opd(ReturnToGo(), start=other_expert, lr=0.0), Batches(), teach(expert)
    run(policy, tiny.data(batch_size=8), [teacher, batches])
    kls = []
    for batch in batches.seen:
        student = policy.sampler.transition(batch, policy.velocity(batch.x, batch.sigma, batch.cond))
        target = teacher.role.teacher.velocity(batch.x, batch.sigma, batch.cond)
        torch.testing.assert_close(batch.labels.target, target)
        kls.append(student.kl(student.shifted_to(target)).detach())
    for j, batch in enumerate(batches.seen):
        torch.testing.assert_close(batch.labels.state_kl, kls[j], rtol=1e-3, atol=1e-6)
        later = torch.stack([*kls[j + 1 :], torch.zeros(8)]).sum(0)
        torch.testing.assert_close(batch.labels.kl_to_go, later, rtol=1e-3, atol=1e-6)


def test_every_row_learns_from_the_teacher_of_its_task(opd, run, expert, other_expert):
    batches, teachers = Batches(), {"red": teach(expert, "red"), "green": teach(other_expert, "green")}
    run(opd(), tiny.data("red", "green", batch_size=8), [*teachers.values(), batches])
    for batch in batches.seen:
        assert set(batch.tasks) == {"red", "green"}
        for row, task in enumerate(batch.tasks):
            one = slice(row, row + 1)
            alone = teachers[task].role.teacher.velocity(batch.x[one], batch.sigma[one], batch.cond[one])
            torch.testing.assert_close(batch.labels.target[one], alone, rtol=0, atol=1e-6)


def test_training_moves_the_student_alone(opd, run, expert):
    policy = opd(optimizer=ADAM)
    policy.backbone.load()
    before = {name: parameter.clone() for name, parameter in policy.backbone.network.named_parameters()}
    run(policy, tiny.data(), [teach(expert)])
    after = dict(policy.backbone.network.named_parameters())
    frozen = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    teachers = {name for name in after if ".teacher-" in name}
    assert teachers
    assert not any(after[name].requires_grad for name in teachers)


# ----------------------------------------------------------------------------------------------------------- cold start


def test_sft_learns_the_straight_path_to_what_the_teachers_drew(tiny_pipeline, run, expert, other_expert, monkeypatch):
    policy, batches = cold_start(tiny_pipeline, SFT(draws=2)), Batches()
    teachers = {"red": teach(expert, "red", guidance_scale=3.0), "green": teach(other_expert, "green")}
    cut, rollouts = policy.cut, []
    monkeypatch.setattr(policy, "cut", lambda rollout, draw: rollouts.append(rollout) or cut(rollout, draw))
    monkeypatch.setattr(policy, "keeps_velocities", lambda: True)
    run(policy, tiny.data("red", "green"), [*teachers.values(), batches])
    assert [len(batches.seen), len(rollouts)] == [4, 2]
    for number, batch in enumerate(batches.seen):
        rollout, sigma = rollouts[number % 2], batch.sigma[:, None, None, None]
        torch.testing.assert_close(batch.x - sigma * batch.labels.target, rollout.latents[:, -1], rtol=0, atol=1e-5)
        fresh = batch.x + (1 - sigma) * batch.labels.target
        assert fresh.std().item() == pytest.approx(1, abs=0.1)
        assert ((batch.sigma > 0) & (batch.sigma < 1)).all()
    first = rollouts[0]
    assert [prompt.task for prompt in first.prompts] == ["red", "red", "green", "green"]
    for rows, task in ((slice(0, 2), "red"), (slice(2, 4), "green")):
        states, levels = first.latents[rows, 1], first.sigmas[1].expand(2)
        drawn = teachers[task].role.teacher.velocity(states, levels, first.cond[rows])
        torch.testing.assert_close(first.velocities[rows, 1], drawn, rtol=0, atol=1e-6)


def test_sft_draws_its_levels_from_a_logit_normal():
    noise = RowNoise((1,), range(2000), range(2000))
    rollout = Sampler(2).rollout(lambda x, sigma, cond: x, [], None, noise)
    batches = list(SFT(draws=1, sigma_mean=0.5, sigma_std=2.0).batches(rollout, noise))
    logits = torch.logit(batches[0].sigma.double())
    assert logits.mean().item() == pytest.approx(0.5, abs=0.15)
    assert logits.std().item() == pytest.approx(2.0, abs=0.15)


def test_sft_lowers_its_loss(tiny_pipeline, run, expert):
    policy, losses = cold_start(tiny_pipeline, SFT(draws=4), optimizer=ADAM), Losses()
    run(policy, tiny.data(), [teach(expert), losses], max_epochs=6)
    assert losses.seen[-1] < losses.seen[0]


class Losses(Callback):
    """The flow-matching loss of every iteration."""

    def __init__(self):
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(float(trainer.callback_metrics["flow_matching/loss"]))


def cold_start(pipeline: str, strategy, **options) -> ColdStart:
    options = {"sampler": Sampler(num_steps=4), "lora": LoRASpec(rank=4, alpha=8)} | options
    return ColdStart(tiny.backbone(pipeline), strategy, **options)


def test_a_merge_is_exported_without_training(tiny_pipeline, run, tmp_path, expert, other_expert):
    merge = Merge([expert, other_expert])
    trainer = run(cold_start(tiny_pipeline, merge), tiny.data(), [AdapterExport()], max_epochs=0)
    assert trainer.global_step == 0
    assert_same(read_adapter(str(tmp_path / "adapter")), merge.adapter())


def test_a_student_starts_from_what_a_cold_start_exported(opd, tiny_pipeline, run, tmp_path, expert, other_expert):
    merge = Merge([expert, other_expert])
    run(cold_start(tiny_pipeline, merge), tiny.data(), [AdapterExport()], max_epochs=0)
    students = [opd(start=start, lr=0.0) for start in (str(tmp_path / "adapter"), merge)]
    for student in students:
        run(student, tiny.data(), [teach(expert)])
    assert_same(*(student.student() for student in students))


# --------------------------------------------------------------------------------------------------------------- resume


def checkpoints(folder) -> ModelCheckpoint:
    options = {"save_on_train_epoch_end": True, "save_top_k": -1, "enable_version_counter": False}
    return ModelCheckpoint(folder, filename="{epoch}", **options)


ROADS = {
    "grpo": (GRPOTeacher, {}, {}),
    "whole": (OPDStudent, {}, {}),
    "fused": (OPDStudent, {"fused": True}, {"accumulate_grad_batches": 3}),
}


@pytest.mark.parametrize("road", ROADS)
def test_resuming_at_the_end_of_an_iteration_changes_no_bit(tiny_pipeline, run, tmp_path, expert, road):
    kind, data_options, options = ROADS[road]

    def fit(max_epochs: int, ckpt_path=None):
        scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
        policy = tiny.policy(kind, tiny_pipeline, optimizer=ADAM, scheduler=scheduler)
        callbacks = [RED(), *([teach(expert)] if kind is OPDStudent else []), EMA(0.9, every=2), checkpoints(tmp_path)]
        tuning = {"enable_checkpointing": True, "gradient_clip_val": 1.0, **options}
        run(policy, tiny.data(**data_options), callbacks, ckpt_path, max_epochs=max_epochs, **tuning)
        return torch.load(tmp_path / f"epoch={max_epochs - 1}.ckpt", weights_only=True)

    straight = fit(4)
    fit(2)
    resumed = fit(4, ckpt_path=tmp_path / "epoch=1.ckpt")
    parts = {
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "RolloutDataModule",
        "global_step",
        "epoch",
    }
    assert parts <= straight.keys()
    assert_same_leaves({part: straight[part] for part in parts}, {part: resumed[part] for part in parts})


def test_a_checkpoint_made_at_the_very_end_resumes_as_well(opd, run, tmp_path, expert):
    """Lightning makes it after the average has taken the place of what is trained."""

    def fit(max_epochs: int, ckpt_path=None, **options):
        policy, saving = opd(optimizer=ADAM), ModelCheckpoint(tmp_path, **({"filename": "{epoch}"} | options))
        callbacks = [teach(expert), EMA(0.9), saving]
        run(policy, tiny.data(), callbacks, ckpt_path, max_epochs=max_epochs, enable_checkpointing=True)
        return torch.load(saving.last_model_path or saving.best_model_path, weights_only=True)

    straight = fit(3)
    end = {"every_n_epochs": 10, "save_last": True, "save_on_train_epoch_end": True}
    fit(2, **end)
    resumed = fit(3, ckpt_path=tmp_path / "last.ckpt", **end)
    for part in ("state_dict", "optimizer_states", "RolloutDataModule"):
        assert_same_leaves(straight[part], resumed[part])


def assert_same_leaves(first, second):
    one, two = dict(tree_leaves_with_path(first)), dict(tree_leaves_with_path(second))
    assert one.keys() == two.keys()
    differing = [path for path, leaf in one.items() if not same(leaf, two[path])]
    assert not differing


def same(first, second) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


@pytest.fixture
def checkpoint(opd, run, tmp_path, expert):
    """A checkpoint of one iteration under ``expert``."""
    policy = opd(optimizer=ADAM)
    run(policy, tiny.data(), [teach(expert), checkpoints(tmp_path)], enable_checkpointing=True)
    return tmp_path / "epoch=0.ckpt"


def test_a_checkpoint_holds_the_student_and_nothing_else(opd, run, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert all(".student." in key for key in content["state_dict"])
    numbers = sum(value.numel() for value in content["state_dict"].values())
    assert len(content["state_dict"]) == 2 * 15
    assert checkpoint.stat().st_size < 3 * 4 * numbers + 60_000  # float32 with both moments, and a name for each


def test_a_changed_teacher_is_refused_at_resume(opd, run, checkpoint, other_expert):
    policy, callbacks = opd(optimizer=ADAM), [teach(other_expert), checkpoints(checkpoint.parent)]
    with pytest.raises(ValueError, match="TeacherCallback/teacher-red changed since the checkpoint: its fingerprint"):
        run(policy, tiny.data(), callbacks, checkpoint, enable_checkpointing=True, max_epochs=2)


def test_a_changed_anchor_is_refused_at_resume(opd, run, tmp_path, expert, other_expert):
    def fit(anchor, ckpt_path=None, **options):
        callbacks = [teach(expert), AnchorCallback(anchor), checkpoints(tmp_path)]
        run(opd(Anchored(TransitionKL())), tiny.data(), callbacks, ckpt_path, enable_checkpointing=True, **options)

    fit(LoRATeacher(other_expert))
    with pytest.raises(ValueError, match="AnchorCallback changed since the checkpoint"):
        fit(BaseTeacher(), tmp_path / "epoch=0.ckpt", max_epochs=2)


def test_a_checkpoint_of_another_adapter_is_refused(opd, run, checkpoint, expert):
    policy, callbacks = opd(lora=LoRASpec(rank=5), optimizer=ADAM), [teach(expert), checkpoints(checkpoint.parent)]
    with pytest.raises(
        ValueError, match=r"the checkpoint holds another adapter: .* has shape \(.*\) there, \(.*\) here"
    ):
        run(policy, tiny.data(), callbacks, checkpoint, enable_checkpointing=True, max_epochs=2)


# ------------------------------------------------------------------------------------------------------------------ EMA


class Trail(Callback):
    """The student's parameters before training and after every batch, flat."""

    def __init__(self):
        self.steps: list[Tensor] = []

    def on_train_start(self, trainer, pl_module):
        self.steps = [flat(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == len(self.steps):
            self.steps.append(flat(pl_module))


def flat(policy) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("every", [1, 2])
def test_the_average_is_the_hand_computed_one(opd, run, expert, every):
    """d = min(decay, (1 + n) / (10 + n)) after n optimiser steps beyond the first, which starts from the parameters."""
    trail, policy = Trail(), opd(optimizer=ADAM)
    run(policy, tiny.data(), [teach(expert), trail, EMA(0.22, every)], max_epochs=4, accumulate_grad_batches=2)
    assert len(trail.steps) == 1 + 4 * 3
    average = trail.steps[0]
    for n, parameters in list(enumerate(trail.steps[1:]))[every - 1 :: every]:
        decay = min(0.22, (1 + n) / (10 + n)) if n else 0.0
        average = decay * average + (1 - decay) * parameters
    torch.testing.assert_close(flat(policy), average, rtol=0, atol=1e-6)


def test_evaluation_sees_the_average_and_training_goes_on_without_it(opd, run, expert):
    class Validated(Callback):
        seen: Tensor | None = None

        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.seen = flat(pl_module)

    results = []
    for limit in (0, 1):
        trail, watch, ema = Trail(), Validated(), EMA(0.9)
        run(
            opd(optimizer=ADAM),
            tiny.data(),
            [teach(expert), RED(), trail, watch, ema],
            max_epochs=2,
            limit_val_batches=limit,
        )
        results.append((trail, watch))
    (plain, _), (trail, watch) = results
    assert all(torch.equal(a, b) for a, b in zip(plain.steps, trail.steps, strict=True))
    assert watch.seen is not None
    assert not torch.allclose(watch.seen, trail.steps[-1])


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evaluation_does_not_depend_on_its_batch_size(opd, run, expert, batch_size):
    scores = []
    for size in (6, batch_size):
        data, policy = tiny.data("red", "green", evaluation_batch_size=size), opd(start=expert)
        callbacks = [teach(expert, "red", "green"), RED(), GREEN(tasks=["green"])]
        trainer = run(policy, data, callbacks, max_epochs=0, limit_val_batches=1.0)
        scores.append(trainer.validate(policy, data, verbose=False)[0])
    assert scores[0].keys() == {"val/red", "val/green", "val/average"}
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


def test_the_scoreboard_leaves_out_what_failed_and_what_only_pads():
    board, nan = Scoreboard(["red", "green", "empty"], ["red", "green"]), torch.nan
    board.update(
        {"red": torch.tensor([1.0, nan, 5.0]), "green": torch.tensor([nan, 2.0, 3.0]), "empty": torch.full((3,), nan)},
        torch.tensor([True, True, False]),
    )
    board.update(
        {"red": torch.tensor([4.0]), "green": torch.tensor([4.0]), "empty": torch.tensor([nan])}, torch.tensor([True])
    )
    result = board.compute()
    assert (result["red"], result["green"], result["average"]) == (2.5, 3.0, 2.75)
    board.reset()
    board.update({name: torch.ones(1) for name in board.columns}, torch.tensor([True]))
    assert board.compute() == {"red": 1, "green": 1, "empty": 1, "average": 1}


# ------------------------------------------------------------------------------------------------------------ sentences


def test_a_task_without_teacher_is_named(opd, run, expert):
    with pytest.raises(ValueError, match="no teacher for task 'green'; add a TeacherCallback for it"):
        run(opd(), tiny.data("red", "green"), [teach(expert, "red")])


def test_a_task_with_two_teachers_is_named(opd, run, expert, other_expert):
    with pytest.raises(ValueError, match="more than one teacher for task 'red'"):
        run(opd(), tiny.data(), [teach(expert, "red"), teach(other_expert, "blue", "red")])


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match="more than one reward 'red'; expected one"):
        signals_among([RED(), RED(tasks=["green"])])


def test_two_anchors_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AnchorCallback`"):
        tiny.trainer(tmp_path, [AnchorCallback(BaseTeacher()), AnchorCallback(BaseTeacher())])


def test_an_anchored_objective_wants_an_anchor_and_an_anchor_an_anchored_objective(opd, run, expert):
    with pytest.raises(ValueError, match="the objective is Anchored, but there is no anchor; add an AnchorCallback"):
        run(opd(Anchored(TransitionKL())), tiny.data(), [teach(expert)])
    with pytest.raises(ValueError, match="there is an AnchorCallback, but the objective is not Anchored; wrap it"):
        run(opd(), tiny.data(), [teach(expert), AnchorCallback(BaseTeacher())])


def test_a_task_without_reward_is_named(grpo, run):
    with pytest.raises(ValueError, match="no reward with a weight for task 'green'; add a RewardCallback for it"):
        run(grpo(), tiny.data("red", "green"), [RED(tasks=["red"]), GREEN(weight=0.0)])


def test_a_policy_gradient_without_siblings_is_refused(grpo, run):
    with pytest.raises(ValueError, match="advantages compare siblings, but group_size is 1; set it to 2 or more"):
        run(grpo(), tiny.data(group_size=1), [RED()])


def test_rows_that_do_not_fill_batches_are_refused_at_once():
    with pytest.raises(
        ValueError, match="4 prompts of 3 siblings are 12 rows, which do not fill batches of 5; choose a batch_size"
    ):
        tiny.data(group_size=3, batch_size=5)


def test_prompts_that_do_not_divide_into_shares_are_refused_at_once():
    with pytest.raises(ValueError, match="4 prompts per iteration do not divide into shares"):
        tiny.data("red", "green", ratio={"red": 2, "green": 1})


@pytest.mark.parametrize("objective", [LogRatioSurrogate(), ReturnToGo(), StateRewardSurrogate()])
def test_a_fused_rollout_refuses_what_it_cannot_label(opd, run, expert, objective):
    with pytest.raises(ValueError, match=r"fused rollouts cannot provide .*x_next.*; set fused: false"):
        run(opd(objective), tiny.data(fused=True), [teach(expert)], accumulate_grad_batches=3)


def test_an_update_inside_a_fused_trajectory_is_refused(opd, run, expert):
    with pytest.raises(
        ValueError, match=r"accumulate_grad_batches is 2, so .* inside a fused trajectory; .* multiple of its 3"
    ):
        run(opd(), tiny.data(fused=True), [teach(expert)], accumulate_grad_batches=2)


def test_a_deterministic_step_is_refused_by_the_exact_kl(opd, run, expert):
    policy = opd(TransitionKL(ExactKL()), sampler=Sampler(4, window=(0, 1), trained=(0, 2)))
    with pytest.raises(ValueError, match="the KL of a deterministic step is infinite; add noise"):
        run(policy, tiny.data(), [teach(expert)])


def test_a_merge_that_would_be_trained_is_refused(tiny_pipeline, run, expert):
    with pytest.raises(ValueError, match=r"a merge is not trained, but trainer.max_epochs is 1; set it to 0"):
        run(cold_start(tiny_pipeline, Merge([expert])), tiny.data())


def test_a_cold_start_without_teacher_is_refused(tiny_pipeline, run):
    with pytest.raises(ValueError, match="no teacher for task 'red'"):
        run(cold_start(tiny_pipeline, SFT()), tiny.data())
