"""The laws of learning from rewards and from teachers at once: the update is the weighted sum of both updates."""

import pytest
import tiny
import torch

from flowopd.core import Anchored, ClippedSurrogate, ReturnToGo, TransitionKL, Uniform, WeightedSum
from flowopd.models import AdapterSource
from flowopd.teachers import BaseTeacher, Beyond, LoRATeacher
from flowopd.training import AnchorCallback, GRPOTeacher, OPDStudent, RewardCallback, TeacherCallback

REWARD, TEACHER, TO_GO = ClippedSurrogate(1.0), TransitionKL(Uniform()), ReturnToGo(pathwise=False)


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    """Where the student starts, its teacher, and its anchor."""
    folder = tmp_path_factory.mktemp("experts")
    return [tiny.expert(folder / str(seed), tiny_pipeline, seed) for seed in range(3)]


def callbacks(experts, anchored: bool):
    signals = [RewardCallback("red", tiny.Brightness()), TeacherCallback(["red"], LoRATeacher(experts[1]))]
    return [*signals, *([AnchorCallback(LoRATeacher(experts[2]))] if anchored else [])]


@pytest.fixture
def update(tiny_pipeline, tmp_path, experts):
    """What one optimiser step over a whole iteration adds to the student, and what it logs."""

    def fit(objective, anchored: bool = False):
        policy = tiny.policy(GRPOTeacher, tiny_pipeline, objective, lr=1.0, start=experts[0])
        trainer = tiny.trainer(tmp_path, callbacks(experts, anchored), accumulate_grad_batches=6)
        trainer.fit(policy, tiny.data())
        assert trainer.global_step == 1
        start = AdapterSource(experts[0]).adapter().tensors
        return {key: value - start[key] for key, value in policy.student().tensors.items()}, trainer.callback_metrics

    return fit


def assert_sum(found, **parts):
    for key, value in found.items():
        expected = sum(weight * part[key] for weight, part in parts.values())
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("teaching", [TEACHER, TO_GO], ids=["pathwise", "return to go"])
def test_an_update_of_reward_and_teacher_is_the_weighted_sum_of_their_updates(update, teaching):
    found, metrics = update(WeightedSum([REWARD, teaching], [0.5, 2.0]))
    (reward, alone), (distilled, _) = update(REWARD), update(teaching)
    assert_sum(found, reward=(0.5, reward), teaching=(2.0, distilled))
    assert max(float(value.abs().max()) for value in reward.values()) > 1e-5
    assert metrics["reward/red"] == alone["reward/red"]
    assert {"policy/loss", "reward/red"} <= metrics.keys()


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_an_anchor_joins_the_sum_from_inside_or_outside(update, outside):
    anchored, _ = update(
        Anchored(WeightedSum([REWARD, TEACHER], [0.5, 2.0]), 0.4, Uniform())
        if outside
        else WeightedSum([Anchored(REWARD, 0.8, Uniform()), TEACHER], [0.5, 2.0]),
        anchored=True,
    )
    (plain, _), (pulled, _) = (
        update(WeightedSum([REWARD, TEACHER], [0.5, 2.0])),
        update(Anchored(TEACHER, 1.0, Uniform()), anchored=True),
    )
    assert_sum(anchored, plain=(1.0, plain), pull=(0.4, pulled), taught=(-0.4, update(TEACHER)[0]))


def test_a_student_without_rewards_says_who_learns_from_them(tiny_pipeline, tmp_path, experts):
    policy = tiny.policy(OPDStudent, tiny_pipeline, WeightedSum([REWARD, TEACHER]))
    with pytest.raises(
        ValueError, match=r"needs advantages, but an OPDStudent calls no reward; train it as a flowopd.GR"
    ):
        tiny.trainer(tmp_path, callbacks(experts, False)).fit(policy, tiny.data())


def test_rewards_need_whole_trajectories(tiny_pipeline, tmp_path, experts):
    policy = tiny.policy(GRPOTeacher, tiny_pipeline, WeightedSum([REWARD, TEACHER]))
    with pytest.raises(ValueError, match=r"advantage.* set fused: false"):
        tiny.trainer(tmp_path, callbacks(experts, False)).fit(policy, tiny.data(fused=True))


def test_a_beyond_teacher_and_a_reward_share_a_road(tiny_pipeline, tmp_path, experts):
    beyond = TeacherCallback(["red"], Beyond(LoRATeacher(experts[1]), BaseTeacher()))
    policy = tiny.policy(GRPOTeacher, tiny_pipeline, WeightedSum([REWARD, TEACHER]), start=experts[0])
    trainer = tiny.trainer(tmp_path, [RewardCallback("red", tiny.Brightness()), beyond])
    trainer.fit(policy, tiny.data())
    assert trainer.callback_metrics["distill/velocity_mse"] > 0
