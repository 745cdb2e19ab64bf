"""The laws of the distance on fixed states: a KL, the same states for every policy, and nothing else changes."""

import csv
import json
from itertools import pairwise

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

from flowopd.core import FlowSDE, ShiftedSchedule
from flowopd.teachers import BaseTeacher, Beyond, LoRATeacher
from flowopd.training import EMA, FixedStateKL, OPDStudent, ResultsTable, RewardCallback, TeacherCallback

TASKS = ("red", "green")


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {task: tiny.expert(folder / task, tiny_pipeline, seed, std=0.3) for seed, task in enumerate(TASKS)}


def callbacks(experts, *more):
    return [*(TeacherCallback([task], LoRATeacher(experts[task])) for task in TASKS), *more]


def fit(folder, policy, callbacks, ckpt_path=None, **options):
    torch.manual_seed(0)
    trainer = tiny.trainer(folder, callbacks, **({"limit_val_batches": 1.0} | options))
    trainer.fit(policy, tiny.data(*TASKS), ckpt_path=ckpt_path)
    return trainer


def figures(trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("fixed_kl/")}


def test_it_is_the_mean_kl_of_steps_at_the_states_that_the_teacher_visits(tiny_pipeline, tmp_path, experts):
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=experts["green"], lr=0.0)
    trainer = fit(tmp_path, policy, callbacks(experts, FixedStateKL(prompts_per_task=2)))
    batch, teacher = trainer.datamodule.few_held_out(2), trainer.callbacks[0].role.teacher
    assert [prompt.task for prompt in batch.prompts] == ["red", "red", "green", "green"]
    cond, x, kls = policy.backbone.encode([prompt.text for prompt in batch.prompts[:2]]), batch.noise[:2], []
    for sigma, sigma_next in pairwise(ShiftedSchedule().sigmas(4)):
        levels = sigma.expand(2), sigma_next.expand(2)
        theirs, own = teacher.velocity(x, levels[0], cond), policy.velocity(x, levels[0], cond).detach()
        step = FlowSDE(0.7).step(x, own, *levels)
        kls.append(step.kl(step.shifted_to(theirs)).mean())
        x = x + (sigma_next - sigma) * theirs
    found = figures(trainer)
    assert found["fixed_kl/teacher-red"] == pytest.approx(float(torch.stack(kls[:-1]).mean()), rel=1e-4)
    assert found["fixed_kl/teacher-green"] == 0  # the student starts, and stays, there


def test_every_model_of_the_final_table_has_it_and_every_student_is_asked_the_same(tiny_pipeline, tmp_path, experts):
    tables = []
    for name, start in experts.items():
        policy = tiny.policy(OPDStudent, tiny_pipeline, start=start, lr=0.0)
        more = FixedStateKL(), ResultsTable(), RewardCallback("brightness", tiny.Brightness())
        fit(tmp_path / name, policy, callbacks(experts, *more))
        with (tmp_path / name / "results.csv").open(newline="") as file:
            tables.append({row.pop("model"): row for row in csv.DictReader(file)})
    one, other = tables
    assert list(one) == ["base", "teacher-red", "teacher-green", "cold-start", "student"]
    assert all(one[model] == other[model] for model in ("base", "teacher-red", "teacher-green"))
    for task, table in zip(TASKS, tables, strict=True):
        assert table["student"] == table["cold-start"] == table[f"teacher-{task}"]
        assert table["student"][f"fixed_kl/teacher-{task}"] == "0.000" != table["base"][f"fixed_kl/teacher-{task}"]


def measured(tiny_pipeline, folder, experts, start, **options):
    """What the callback says of a student that stays, and the callback and policy themselves."""
    policy, callback = tiny.policy(OPDStudent, tiny_pipeline, start=start, lr=0.0), FixedStateKL(2)
    trainer = tiny.trainer(folder, callbacks(experts, callback), limit_val_batches=1.0)
    trainer.fit(policy, tiny.data(*TASKS, **options))
    return figures(trainer), callback, policy


def test_states_are_the_same_for_every_student_and_every_batch_size(tiny_pipeline, tmp_path, experts):
    one, first, _ = measured(tiny_pipeline, tmp_path, experts, experts["red"])
    small, second, _ = measured(tiny_pipeline, tmp_path, experts, experts["red"], batch_size=2, evaluation_batch_size=1)
    other, third, _ = measured(tiny_pipeline, tmp_path, experts, experts["green"], prompts_per_iteration=8)
    assert one == small != other
    for name in one:
        states = [callback._visited[name.removeprefix("fixed_kl/")].states for callback in (first, second, third)]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*states, strict=True))


def test_a_teacher_is_no_distance_from_itself(tiny_pipeline, tmp_path, experts):
    _, callback, policy = measured(tiny_pipeline, tmp_path, experts, experts["red"])
    for name, teacher in policy.signals.teaching.teachers_by_name().items():
        found = callback.measure(policy, teacher.velocity)
        assert found.pop(f"fixed_kl/{name}") == 0
        assert min(found.values()) > 0


def test_what_is_measured_outside_of_a_step_has_the_precision_of_training(tiny_pipeline, tmp_path, experts):
    policy, callback = tiny.policy(OPDStudent, tiny_pipeline, start=experts["red"], lr=0.0), FixedStateKL(2)
    trainer = tiny.trainer(tmp_path, callbacks(experts, callback), precision="bf16-mixed", limit_val_batches=1.0)
    trainer.fit(policy, tiny.data(*TASKS))
    asked = []
    network = policy.backbone.network
    network.register_forward_hook(lambda *_: asked.append(torch.is_autocast_enabled("cpu")))
    callback._visited = None
    callback.measure(policy, policy.velocity)
    assert set(asked) == {True}


def test_a_composed_teacher_walks_its_own_way(tiny_pipeline, tmp_path, experts):
    beyond = TeacherCallback(list(TASKS), Beyond(LoRATeacher(experts["red"]), BaseTeacher(), 1.0), name="beyond")
    policy = tiny.policy(OPDStudent, tiny_pipeline, start=experts["red"], lr=0.0)
    assert figures(fit(tmp_path, policy, [beyond, FixedStateKL()])) == {"fixed_kl/beyond": 0}


def test_measuring_changes_no_bit_of_training_nor_of_what_is_resumed(tiny_pipeline, tmp_path, experts):
    def run(folder, *more, ckpt_path=None, max_epochs=3):
        policy = tiny.policy(OPDStudent, tiny_pipeline, optimizer=torch.optim.AdamW)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        found = callbacks(experts, EMA(0.9), *more, saver)
        trainer = fit(folder, policy, found, ckpt_path, max_epochs=max_epochs, enable_checkpointing=True)
        return policy.student().tensors, figures(trainer)

    plain, _ = run(tmp_path / "plain")
    straight, measured = run(tmp_path / "straight", FixedStateKL())
    resumed, again = run(tmp_path / "straight", FixedStateKL(), ckpt_path=tmp_path / "straight" / "epoch=1.ckpt")
    assert all(torch.equal(plain[key], straight[key]) and torch.equal(plain[key], resumed[key]) for key in plain)
    assert measured == again
    assert min(measured.values()) > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_measure_what_one_does(tiny_pipeline, tmp_path, experts, strategy):
    def run(folder, **options):
        policy = tiny.policy(OPDStudent, tiny_pipeline, start=experts["red"], lr=0.0)
        trainer = fit(folder, policy, callbacks(experts, FixedStateKL()), **options)
        if trainer.is_global_zero:
            (folder / "figures.json").write_text(json.dumps(figures(trainer)))
        return figures(trainer)

    alone = run(tmp_path)
    run_ranks(lambda: run(tmp_path, strategy=strategy, devices=2))
    assert json.loads((tmp_path / "figures.json").read_text()) == pytest.approx(alone, abs=1e-6)
