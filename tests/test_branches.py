"""The laws of learning both branches of guidance: who is asked for them, what it costs, and who cannot give them."""

import pytest
import tiny
import torch

from flowopd.core import Anchored, BranchDistance, TransitionKL, Uniform, WeightedSum, guided
from flowopd.preflight.forwards import SAMPLED, TRAINED, count_forwards
from flowopd.rollouts import Sampler
from flowopd.teachers import BaseTeacher, Beyond, LoRATeacher
from flowopd.teachers.composed import at_guidance
from flowopd.training import AnchorCallback, OPDStudent, TeacherCallback

ROADS = pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return [tiny.expert(folder / str(seed), tiny_pipeline, seed) for seed in range(2)]


def student(tiny_pipeline, objective, scale: float = 3.0, **options):
    return tiny.policy(
        OPDStudent, tiny_pipeline, objective, sampler=Sampler(num_steps=4, guidance_scale=scale), **options
    )


@pytest.fixture
def fit(tiny_pipeline, tmp_path):
    """What an optimiser step over a whole iteration makes of the student, and what it logs."""

    def one(teacher, objective, fused: bool = False, **options):
        policy = student(tiny_pipeline, objective, **options)
        batches = 3 if fused else 6
        trainer = tiny.trainer(tmp_path, [TeacherCallback(["red"], teacher)], accumulate_grad_batches=batches)
        trainer.fit(policy, tiny.data(fused=fused, batch_size=24 // batches))
        assert trainer.global_step == 1
        return policy.student().tensors, trainer.callback_metrics

    return one


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_made_of_the_branches(tiny_pipeline, experts, scale):
    backbone = tiny.loaded(tiny_pipeline)
    LoRATeacher(experts[0]).attach(backbone)
    (name,) = set(backbone.network.peft_config)
    state = torch.randn(2, *backbone.latent_shape()), torch.tensor([0.9, 0.4]), backbone.encode(["red", "blue"])
    for adapter in (None, name):
        found = backbone.velocity(*state, adapter, scale)
        torch.testing.assert_close(found, guided(*backbone.branches(*state, adapter), scale), rtol=0, atol=1e-5)


@ROADS
def test_a_student_equal_to_its_teacher_has_no_branch_distance(fit, experts, fused):
    _, metrics = fit(LoRATeacher(experts[0]), BranchDistance(), fused, start=experts[0])
    assert metrics["distill/loss"] < 1e-10
    assert metrics["distill/contrast_mse"] < 1e-10


def test_a_teacher_s_own_guidance_has_no_say_in_its_branches(fit, experts):
    teachers = [LoRATeacher(experts[0], guidance_scale=scale) for scale in (1.0, 7.0)]
    (one, _), (other, _) = (fit(teacher, BranchDistance(), start=experts[1]) for teacher in teachers)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_both_roads_make_one_update_of_the_branches(fit, experts):
    (whole, _), (fused, _), (plain, _) = (
        fit(LoRATeacher(experts[0]), objective, road, start=experts[1], lr=10.0)
        for objective, road in ((BranchDistance(), False), (BranchDistance(), True), (TransitionKL(Uniform()), True))
    )
    moved = {key: float((whole[key] - plain[key]).abs().max()) for key in whole}
    assert max(moved.values()) > 1e-4
    for key, value in whole.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-4, atol=1e-6)


def test_the_branches_of_composed_teachers_are_composed(tiny_pipeline, experts):
    backbone = tiny.loaded(tiny_pipeline)
    beyond = Beyond(LoRATeacher(experts[0], guidance_scale=2.0), LoRATeacher(experts[1], guidance_scale=5.0), 1.5)
    beyond.attach(backbone)
    state = torch.randn(2, *backbone.latent_shape()), torch.tensor([0.9, 0.4]), backbone.encode(["red", "blue"])
    branches = [at_guidance(beyond, scale).velocity(*state) for scale in (1.0, 0.0)]
    same = Beyond(LoRATeacher(experts[0], guidance_scale=3.0), LoRATeacher(experts[1], guidance_scale=3.0), 1.5)
    same.attach(backbone)
    torch.testing.assert_close(guided(*branches, 3.0), same.velocity(*state), rtol=0, atol=1e-5)


@ROADS
def test_a_plan_counts_both_branches(tiny_pipeline, experts, fused):
    callbacks = [TeacherCallback(["red"], LoRATeacher(experts[0])), AnchorCallback(BaseTeacher())]
    policy = student(tiny_pipeline, Anchored(BranchDistance()))
    found = count_forwards(policy, tiny.data(group_size=1, fused=fused), callbacks, accumulate=3)
    rollout = {} if fused else {SAMPLED: 4 * 4 * 2}
    assert found == rollout | {TRAINED: 4 * 3 * 2, "teacher-red": 4 * 3 * 2, "anchor": 4 * 3}


def test_guided_and_branch_wise_matching_share_a_road(tiny_pipeline, experts):
    policy = student(tiny_pipeline, WeightedSum([TransitionKL(Uniform()), BranchDistance()]))
    callbacks = [TeacherCallback(["red"], LoRATeacher(experts[0], guidance_scale=3.0))]
    found = count_forwards(policy, tiny.data(group_size=1, fused=True), callbacks, accumulate=3)
    assert found == {TRAINED: 4 * 3 * 2, "teacher-red": 4 * 3 * (2 + 2)}


class OneVelocity:
    """A teacher whose guidance nobody can choose."""

    def attach(self, backbone): ...

    def velocity(self, x, sigma, cond):
        return x

    def fingerprint(self):
        return "one"


@pytest.mark.parametrize("teacher", [OneVelocity(), Beyond(OneVelocity(), BaseTeacher())], ids=["plain", "composed"])
def test_a_teacher_whose_guidance_nobody_can_choose_is_refused(tiny_pipeline, tmp_path, teacher):
    policy = student(tiny_pipeline, BranchDistance())
    with pytest.raises(ValueError, match=r"a OneVelocity has no branches, .* teach by another objective"):
        tiny.trainer(tmp_path, [TeacherCallback(["red"], teacher)]).fit(policy, tiny.data())


def test_a_student_without_guidance_is_refused(tiny_pipeline, tmp_path):
    policy = student(tiny_pipeline, BranchDistance(), scale=1.0)
    with pytest.raises(ValueError, match=r"drawn without guidance and never uses .* give the sampler a guidance_scale"):
        tiny.trainer(tmp_path, [TeacherCallback(["red"], BaseTeacher())]).fit(policy, tiny.data())
