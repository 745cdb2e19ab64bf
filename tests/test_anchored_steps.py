"""The laws of the anchor along training: asked about some steps without bias, at no cost elsewhere; λ by iteration."""

from collections import Counter
from functools import partial

import pytest
import tiny
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

from flowopd.core import ODE, Anchored, ClippedSurrogate, Labels, Ramp, TransitionKL, Uniform, WeightedSum
from flowopd.models.adapters.files import read_adapter
from flowopd.preflight.forwards import count_forwards
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.rollouts.steps import some_of
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import (
    AdapterExport,
    AnchorCallback,
    GRPOTeacher,
    Guard,
    OPDStudent,
    RewardCallback,
    TeacherCallback,
)
from flowopd.training.callbacks.guard import Alarm

DDP, FSDP2 = ({"strategy": name, "devices": 2} for name in ("ddp", "fsdp2"))
roads = pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])


# ---------------------------------------------------------------------------------------------------------- which steps


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_step_is_asked_about_as_often_as_the_share_says_and_their_number_differs_by_less_than_one(count, share):
    generator, times = torch.Generator().manual_seed(0), 4000
    draws = [some_of(count, share, generator) for _ in range(times)]
    assert all(abs(len(drawn) - count * share) < 1 and drawn == sorted(set(drawn)) for drawn in draws)
    seen = Counter(number for drawn in draws for number in drawn)
    error = (share * (1 - share) / times) ** 0.5
    assert all(abs(seen[number] / times - share) < 4.5 * error for number in range(count))


def test_steps_are_drawn_anew_in_every_iteration_and_alike_for_a_key(tiny_pipeline):
    policy = tiny.policy(OPDStudent, tiny_pipeline, Anchored(TransitionKL(), asked=0.5), sampler=Sampler(9))
    drawn = [policy.unasked(f"0 {iteration}") for iteration in range(20)]
    assert drawn == [policy.unasked(f"0 {iteration}") for iteration in range(20)]
    assert len(set(drawn)) > 1
    assert all(len(unasked) == 4 for unasked in drawn)
    policy.objective = Anchored(TransitionKL())
    assert policy.unasked("0 0") == set()


# ----------------------------------------------------------------------------------------------------------- no bias


@pytest.mark.parametrize("asked", [0.25, 0.5, 1.0])
def test_the_expected_loss_and_gradient_are_those_of_all_steps(asked):
    x, sigma = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    velocity = torch.randn_like(x).requires_grad_()
    student = ODE().step(x, velocity, sigma, sigma / 2)
    labels = Labels(target=torch.randn_like(x), anchor=torch.randn_like(x))
    plain = Labels(target=labels.target)

    def loss(share, known):
        return Anchored(TransitionKL(Uniform()), 0.7, Uniform(), share).loss(student, known)[0]

    expected = asked * loss(asked, labels) + ((1 - asked) * loss(asked, plain) if asked < 1 else 0)
    whole = loss(1.0, labels)
    torch.testing.assert_close(expected, whole)
    (first,), (second,) = (torch.autograd.grad(one, velocity, retain_graph=True) for one in (expected, whole))
    torch.testing.assert_close(first, second)


def test_an_anchor_that_is_always_asked_is_not_left_out():
    x = torch.ones(1, 1, 1, 1)
    student = ODE().step(x, x, torch.tensor([0.5]), torch.tensor([0.2]))
    with pytest.raises(ValueError, match=r"needs labels.anchor, which nothing provided; add an AnchorCallback"):
        Anchored(TransitionKL(Uniform())).loss(student, Labels(target=x))


def test_one_answer_is_for_all_parts_of_an_objective():
    first, second = Anchored(TransitionKL(), asked=0.5), Anchored(ClippedSurrogate(), asked=0.25)
    with pytest.raises(ValueError, match=r"asked about shares \[0.25, 0.5\] of the steps; expected one share"):
        WeightedSum([first, second])
    with pytest.raises(ValueError, match="expected one share"):
        Anchored(first)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"asked is {share}; expected a number"):
            Anchored(TransitionKL(), asked=share)


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return [tiny.expert(folder / str(seed), tiny_pipeline, seed) for seed in (1, 2)]


def fit(pipeline, folder, experts, objective, fused=False, callbacks=(), unasked=None, optimizer=None, **options):
    """Updates of whole iterations of three steps by plain gradient descent; the student's B factors."""
    torch.manual_seed(0)
    policy = tiny.policy(OPDStudent, pipeline, objective, lr=1.0, **({"optimizer": optimizer} if optimizer else {}))
    if unasked is not None:
        policy.unasked = lambda key: unasked
    signals = [TeacherCallback(["red"], LoRATeacher(experts[0])), AnchorCallback(LoRATeacher(experts[1]))]
    ckpt_path = options.pop("ckpt_path", None)
    options |= {"accumulate_grad_batches": 6 // options.get("devices", 1)}
    trainer = tiny.trainer(folder, [*signals, *callbacks], **options)
    trainer.fit(policy, tiny.data(fused=fused), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return torch.cat([value.flatten() for key, value in policy.student().tensors.items() if "lora_B" in key])


@roads
def test_the_expected_update_is_that_of_an_anchor_that_is_asked_about_all_steps(
    tiny_pipeline, tmp_path, experts, fused
):
    """A third of three steps: each alone, equally often."""
    run = partial(fit, tiny_pipeline, tmp_path, experts, fused=fused)
    anchored = partial(Anchored, TransitionKL(Uniform()), 2.0, Uniform())
    single = [run(anchored(asked=1 / 3), unasked={0, 1, 2} - {number}) for number in range(3)]
    whole, without = run(anchored()), run(anchored(asked=1 / 3), unasked={0, 1, 2})
    torch.testing.assert_close(torch.stack(single).mean(0), whole, rtol=1e-4, atol=1e-7)
    assert (whole - without).abs().max() > 1e-4
    assert all((one - without).abs().max() > 1e-4 for one in single)


# ---------------------------------------------------------------------------------------------------------------- cost


@roads
def test_an_anchor_that_is_not_asked_takes_no_forward_and_the_plan_counts_it(tiny_pipeline, fused):
    def counted(asked: float, kind=OPDStudent, inner=None, teacher=TeacherCallback(["red"], BaseTeacher())):  # noqa: B008
        objective = Anchored(inner or TransitionKL(), asked=asked)
        policy = tiny.policy(kind, tiny_pipeline, objective, sampler=Sampler(8, window=(0, 8), steps=SpreadSteps(2)))
        data = tiny.data(group_size=1 if kind is OPDStudent else 2, fused=fused and kind is OPDStudent)
        return count_forwards(policy, data, [teacher, AnchorCallback(LoRATeacher("nobody/anchor"))], 1, 2)

    assert counted(1.0)["anchor"] == 8
    assert counted(0.5)["anchor"] == 4
    assert counted(0.25)["anchor"] == pytest.approx(2, abs=1)
    assert counted(0.5)["teacher-red"] == 8
    reward = RewardCallback("red", tiny.Brightness())
    assert counted(0.5, GRPOTeacher, ClippedSurrogate(), reward)["anchor"] == 4


# ------------------------------------------------------------------------------------------------------------------- λ


def test_a_ramp_goes_in_equal_steps_and_stays():
    assert [Ramp(1.0, 3.0, 4).at(iteration) for iteration in (0, 1, 2, 4, 9)] == [1.0, 1.5, 2.0, 3.0, 3.0]
    assert Ramp(3.0, 0.0, 1).at(1) == 0.0


class Seen(Callback):
    """The strength that was logged in every iteration."""

    def __init__(self):
        self.strengths = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.strengths.append(float(trainer.callback_metrics["anchor/strength"]))


class Constant:
    def at(self, iteration: int) -> float:
        return 0.5


@roads
def test_a_course_is_followed_iteration_by_iteration_and_logged(tiny_pipeline, tmp_path, experts, fused):
    run, seen = partial(fit, tiny_pipeline, tmp_path, experts, fused=fused), Seen()
    run(WeightedSum([Anchored(TransitionKL(), Ramp(4.0, 1.0, 3))]), callbacks=[seen], max_epochs=5)
    assert seen.strengths == [4.0, 3.0, 2.0, 1.0, 1.0]
    number, course = (run(Anchored(TransitionKL(), strength), max_epochs=2) for strength in (0.5, Constant()))
    assert torch.equal(number, course)


@roads
def test_resuming_changes_no_bit_of_what_a_course_and_drawn_steps_made(tiny_pipeline, tmp_path, experts, fused):
    def run(epochs: int, **options):
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        objective = Anchored(TransitionKL(), Ramp(3.0, 0.5, 4), asked=0.4)
        options |= {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [saving]}
        adam = partial(torch.optim.AdamW, lr=1e-2)
        return fit(tiny_pipeline, tmp_path, experts, objective, fused, optimizer=adam, **options)

    straight = run(5)
    assert torch.equal(straight, run(5, ckpt_path=tmp_path / "epoch=1.ckpt"))


@pytest.mark.parametrize("two_ranks", [DDP, FSDP2], ids=["ddp", "fsdp2"])
@roads
def test_two_ranks_train_what_one_trains(tiny_pipeline, tmp_path, experts, two_ranks, fused):
    def run(folder, **options):
        objective = Anchored(TransitionKL(Uniform()), Ramp(2.0, 1.0, 2), Uniform(), asked=0.5)
        fit(tiny_pipeline, folder, experts, objective, fused, [AdapterExport()], max_epochs=3, **options)

    run(tmp_path / "one")
    run_ranks(lambda: run(tmp_path / "two", **two_ranks))
    one, two = (read_adapter(str(tmp_path / name / "adapter")).tensors for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- alarms


def test_a_guard_waits_until_an_anchor_that_is_asked_seldom_has_been_asked_about_most_steps(tiny_pipeline, tmp_path):
    guard = Guard(warm_up=2)
    policy = tiny.policy(OPDStudent, tiny_pipeline, Anchored(TransitionKL(), asked=0.25))
    trainer = type("Epochs", (), {"strategy": type("One", (), {"reduce_boolean_decision": lambda *_, **__: False})()})()
    for trainer.current_epoch, distance in enumerate([0.5, 0.5, 0.5, 9.0, 0.5, 9.0, 0.5, 9.0, 44.0]):
        trainer.callback_metrics = {"anchor/loss": torch.tensor(distance)}
        guard.on_train_epoch_end(trainer, policy)
    trainer.callback_metrics = {"anchor/loss": torch.tensor(46.0)}
    trainer.checkpoint_callback = None
    with pytest.raises(Alarm, match=r"anchor/loss is 46, more than 5 times the 9 of the first iterations"):
        guard.on_train_epoch_end(trainer, policy)
