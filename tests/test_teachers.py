"""The laws of routing and of the kinds of teachers."""

import pytest
import tiny
import torch

from flowopd.core import TransitionKL
from flowopd.teachers import BaseTeacher, FullTeacher, LoRATeacher, Router
from flowopd.training import OPDStudent, TeacherCallback

TASKS = ["red", "green", "red", "blue", "green"]


@pytest.fixture(scope="module")
def second_pipeline(tmp_path_factory):
    """Another model altogether."""
    folder = str(tmp_path_factory.mktemp("pipelines") / "second")
    tiny.pipeline(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(tiny_pipeline):
    return tiny.loaded(tiny_pipeline)


@pytest.fixture
def state(backbone):
    return (
        torch.randn(5, 4, 8, 8),
        torch.linspace(1, 0.1, 5),
        backbone.encode([f"{task} {i}" for i, task in enumerate(TASKS)]),
    )


@pytest.fixture
def teachers(backbone, tiny_pipeline, second_pipeline, tmp_path):
    """One of each kind, with guidance of their own."""
    kinds = {
        "red": LoRATeacher(tiny.expert(tmp_path, tiny_pipeline), guidance_scale=2.0),
        "green": FullTeacher(tiny.backbone(second_pipeline)),
        "blue": BaseTeacher(guidance_scale=4.5),
    }
    for teacher in kinds.values():
        teacher.attach(backbone)
    return kinds


def test_every_row_of_a_mixed_batch_gets_its_own_teacher(teachers, state):
    x, sigma, cond = state
    mixed = Router(teachers).velocity(x, sigma, cond, TASKS)
    for row, task in enumerate(TASKS):
        one = slice(row, row + 1)
        alone = teachers[task].velocity(x[one], sigma[one], cond[one])
        torch.testing.assert_close(mixed[one], alone, rtol=0, atol=1e-6)


def test_teachers_differ(teachers, state):
    fields = [teacher.velocity(*state) for teacher in teachers.values()]
    assert min((a - b).abs().max() for i, a in enumerate(fields) for b in fields[:i]) > 0.01


def test_one_teacher_of_several_tasks_is_called_once(teachers, state):
    class Counting(BaseTeacher):
        calls = 0

        def velocity(self, x, sigma, cond):
            self.calls += 1
            return teachers["red"].velocity(x, sigma, cond)

    shared = Counting()
    router = Router({"red": shared, "green": shared, "blue": teachers["blue"]})
    mixed = router.velocity(*state, TASKS)
    assert shared.calls == 1
    torch.testing.assert_close(mixed[:3], teachers["red"].velocity(*state)[:3], rtol=0, atol=1e-6)


def test_a_task_without_teacher_is_named(teachers, state):
    with pytest.raises(ValueError, match="no teacher for task 'purple', 'white'; add a TeacherCallback for it"):
        Router(teachers).velocity(*state, ["red", "white", "purple", "red", "white"])


def test_a_full_teacher_is_its_own_model_with_our_text(teachers, state, second_pipeline):
    x, sigma, cond = state
    stock = tiny.stock_transformer(second_pipeline)
    expected = stock(x, cond.tokens, cond.pooled, 1000 * sigma, return_dict=False)[0].detach()
    assert torch.equal(teachers["green"].velocity(*state), expected)


def test_a_full_teacher_s_fingerprint_knows_its_weights(teachers, backbone):
    before = teachers["green"].fingerprint()
    assert before == teachers["green"].fingerprint()
    with torch.no_grad():
        teachers["green"].backbone.network.proj_out.bias[0] += 1e-3
    assert teachers["green"].fingerprint() != before


def test_teachers_take_no_gradient(teachers, state):
    assert not any(teacher.velocity(*state).requires_grad for teacher in teachers.values())


def test_the_same_adapter_is_carried_once(backbone, tiny_pipeline, tmp_path):
    folder = tiny.expert(tmp_path, tiny_pipeline)
    plain, guided = LoRATeacher(folder), LoRATeacher(folder, guidance_scale=3.0)
    plain.attach(backbone)
    size = sum(parameter.numel() for parameter in backbone.network.parameters())
    guided.attach(backbone)
    assert sum(parameter.numel() for parameter in backbone.network.parameters()) == size


def test_a_subfolder_can_hold_the_adapter(backbone, state, tiny_pipeline, tmp_path):
    folder = tiny.expert(tmp_path / "OCRTeacher" / "lora", tiny_pipeline)
    inside, direct = LoRATeacher(str(tmp_path), subfolder="OCRTeacher/lora"), LoRATeacher(folder)
    inside.attach(backbone)
    direct.attach(backbone)
    assert torch.equal(inside.velocity(*state), direct.velocity(*state))


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_a_teacher_equal_to_the_student_asks_for_nothing(tiny_pipeline, tmp_path, fused):
    folder = tiny.expert(tmp_path / "expert", tiny_pipeline)
    student = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL(), start=folder)
    trainer = tiny.trainer(tmp_path, [TeacherCallback(["red"], LoRATeacher(folder))], accumulate_grad_batches=3)
    trainer.fit(student, tiny.data(fused=fused))
    assert trainer.callback_metrics["distill/loss"] == 0
    assert trainer.callback_metrics["distill/velocity_mse"] == 0
