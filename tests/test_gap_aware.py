"""The laws of shares that follow gaps: bounded, whole, blind to the drawn steps, exact on resume, one for all ranks."""

import json
import random
from collections import Counter
from functools import partial
from statistics import fmean

import pytest
import tiny
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from torch.utils._pytree import tree_leaves_with_path

from flowopd.core import ClippedSurrogate
from flowopd.preflight.forwards import count_forwards
from flowopd.preflight.plan import Hardware, plan
from flowopd.prompts import GapAware, Mixture
from flowopd.rollouts import Sampler, SpreadSteps
from flowopd.teachers import BaseTeacher, LoRATeacher
from flowopd.training import ColdStart, GRPOTeacher, OPDStudent, RewardCallback, RolloutDataModule, TeacherCallback

TASKS = ["red", "green", "blue"]


def learnt(distances: dict[str, float], **options) -> GapAware:
    """Shares of tasks at these distances, one step, from a beginning at distance 1."""
    rule = GapAware(**({"decay": 0.0} | options))
    rule.learn({task: {0: 1.0} for task in distances})
    rule.learn({task: {0: distance} for task, distance in distances.items()})
    return rule


# -------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("count", [3, 10, 24, 128])
@pytest.mark.parametrize("floor", [0.01, 0.1, 0.3])
def test_every_task_has_its_floor_and_the_prompts_are_whole_and_all_of_them(count, floor):
    chance = random.Random(0)
    for _ in range(50):
        rule = learnt({task: chance.random() ** 4 for task in TASKS}, floor=floor)
        counts = rule.counts(TASKS, count)
        assert sum(counts.values()) == count
        assert all(isinstance(number, int) and number >= max(1, floor * count - 1e-9) for number in counts.values())


def test_beyond_the_floor_prompts_are_shared_out_in_proportion_to_the_gaps():
    rule = learnt({"red": 0.6, "green": 0.3, "blue": 0.1}, floor=0.1)
    assert rule.counts(TASKS, 100) == {"red": 10 + 42, "green": 10 + 21, "blue": 10 + 7}
    assert rule.counts(TASKS, 10) == {"red": 5, "green": 3, "blue": 2}  # 1 + 4.2, 1 + 2.1, 1 + 0.7


def test_a_floor_of_equal_shares_is_equal_shares():
    assert learnt({"red": 0.9, "green": 0.1}, floor=0.5).counts(["red", "green"], 24) == {"red": 12, "green": 12}


@pytest.mark.parametrize("distances", [{}, {"red": 0.3}, {"red": 0.0, "green": 0.0}, {"red": float("nan")}], ids=str)
def test_tasks_share_alike_until_all_gaps_are_known(distances):
    rule = GapAware(absolute=True)
    rule.learn({task: {0: distance} for task, distance in distances.items()})
    assert rule.counts(["red", "green"], 24) == {"red": 12, "green": 12}


def test_a_gap_does_not_depend_on_which_steps_were_drawn():
    """Steps whose distances differ a thousandfold, shrinking alike: the gap is what they have in common."""
    generator = torch.Generator().manual_seed(0)
    rule = GapAware(decay=0.0)
    for iteration in range(60):
        drawn = SpreadSteps(2).draw(torch.linspace(1, 0, 9), generator)
        shrunk = {"red": 1.0, "green": 1.0} if iteration < 40 else {"red": 0.5, "green": 0.2}
        rule.learn({task: {j: factor * 10.0 ** (-j / 2) for j in drawn} for task, factor in shrunk.items()})
    assert rule.gaps() == pytest.approx({"red": 0.5, "green": 0.2})


def test_gaps_are_relative_to_the_beginning_or_absolute():
    for absolute, expected in ((False, {"red": 0.5, "green": 0.25}), (True, {"red": 1.0, "green": 5.0})):
        rule = GapAware(decay=0.0, absolute=absolute)
        rule.learn({"red": {0: 3.0, 1: 1.0}, "green": {0: 30.0, 1: 10.0}})
        rule.learn({"red": {0: 1.5, 1: 0.5}, "green": {0: 7.5, 1: 2.5}})
        assert rule.gaps() == expected


def test_a_running_average_forgets_by_its_decay():
    rule = GapAware(decay=0.75, absolute=True)
    for distance in (1.0, 0.0, 0.0, float("inf")):
        rule.learn({"red": {0: distance}})
    assert rule.gaps() == {"red": 0.75**2}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: GapAware(floor=0.0), "floor is 0.0; expected a number above 0.0"),
        (lambda: GapAware(decay=1.5), "decay is 1.5; expected a number from 0.0 to 1.0"),
        (lambda: tiny.data(*TASKS, ratio=GapAware(0.5)), r"4 prompts .* too few for 3 tasks of at least 2 each, which"),
        (lambda: tiny.data(*TASKS, ratio=GapAware(), alternate=True), "alternate gives whole iterations to .* fixed"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()


def test_equal_parts_of_what_is_dealt_differ_by_one_prompt_of_a_task():
    mixture = Mixture({task: tiny.Words(task) for task in TASKS}, learnt({"red": 0.6, "green": 0.3, "blue": 0.1}))
    tasks = [prompt.task for prompt in mixture.draw(24, 5, 0)]
    assert Counter(tasks) == mixture.counts(24, 5)
    dealt = [tasks[index] for index in mixture.dealt(24, 5)]
    for task in TASKS:
        numbers = [Counter(dealt[first : first + 8])[task] for first in (0, 8, 16)]
        assert max(numbers) - min(numbers) <= 1


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    """The second is ten times as far away."""
    folder = tmp_path_factory.mktemp("experts")
    far = {"red": 0.03, "green": 0.3}
    return {task: tiny.expert(folder / task, tiny_pipeline, std=std) for task, std in far.items()}


class Logged(Callback):
    """What was logged of every iteration."""

    def __init__(self):
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def of(self, stage: str) -> list[dict[str, float]]:
        return [{name: value for name, value in seen.items() if name.startswith(stage)} for seen in self.seen]


SIZES = {"prompts_per_iteration": 12, "group_size": 1, "batch_size": 6}
FUSED = {"fused": True, "steps": SpreadSteps(1)}


def fit(pipeline, folder, experts, epochs=4, callbacks=(), steps=None, ckpt_path=None, lr=1e-2, data=(), **options):
    """Updates of whole iterations, more prompts to whom is farther in absolute terms."""
    torch.manual_seed(0)
    sampler = Sampler(4, steps=steps)
    policy = tiny.policy(OPDStudent, pipeline, sampler=sampler, optimizer=partial(torch.optim.AdamW, lr=lr))
    sizes = SIZES | {"ratio": GapAware(absolute=True)} | dict(data)
    loaded, logged = tiny.data("red", "green", **sizes), Logged()
    ranks = options.get("devices", 1)
    batches = 12 // ranks // loaded.batch_size * policy.batches_per_rollout()
    teachers = [TeacherCallback([task], LoRATeacher(path)) for task, path in experts.items()]
    options |= {"max_epochs": epochs, "accumulate_grad_batches": batches}
    trainer = tiny.trainer(folder, [*teachers, logged, *callbacks], **options)
    trainer.fit(policy, loaded, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return logged, loaded


def test_the_task_that_is_farther_gets_more_prompts_and_shares_and_gaps_are_logged(tiny_pipeline, tmp_path, experts):
    logged, data = fit(tiny_pipeline, tmp_path, experts)
    first, *later = logged.of("mixture/")
    assert first == {"mixture/red": 0.5, "mixture/green": 0.5}
    for shares in later:
        assert shares["mixture/green"] > 0.6
        assert shares["mixture/red"] >= 0.1
        assert sum(shares.values()) == pytest.approx(1)
    gaps = logged.of("gap/")[-1]
    assert gaps["gap/green"] > 5 * gaps["gap/red"] > 0
    assert data.mixture.counts(12, 4)["green"] > 6


@pytest.mark.parametrize("road", [{}, {"fused": True}], ids=["whole", "fused"])
def test_the_distances_of_the_tasks_are_parts_of_the_distance_that_is_logged(
    tiny_pipeline, tmp_path, experts, road, monkeypatch
):
    learnt = []
    monkeypatch.setattr(RolloutDataModule, "learn", lambda data, distances: learnt.append(distances))
    logged, _ = fit(tiny_pipeline, tmp_path, experts, data=road | {"ratio": {"red": 1, "green": 3}})
    for seen, distances in zip(logged.seen, learnt, strict=True):
        red, green = (fmean(distances[task].values()) for task in ("red", "green"))
        assert (red + 3 * green) / 4 == pytest.approx(seen["distill/velocity_mse"], rel=1e-5)
    assert not logged.of("mixture/")[-1]


def test_neither_the_road_nor_the_size_of_batches_changes_the_shares(tiny_pipeline, tmp_path, experts):
    ways = [{}, {"fused": True}, {"batch_size": 3}, {"batch_size": 12, "fused": True}]
    first, *others = [fit(tiny_pipeline, tmp_path, experts, data=way)[1].mixture.by_gap for way in ways]
    for other in others:
        assert other.gaps() == pytest.approx(first.gaps(), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_resuming_changes_no_bit_of_shares_or_student(tiny_pipeline, tmp_path, experts, fused):
    def run(epochs: int, ckpt_path=None):
        saved = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        saved._enable_version_counter = False
        options = {"steps": SpreadSteps(1), "data": {"fused": fused}, "enable_checkpointing": True}
        fit(tiny_pipeline, tmp_path, experts, epochs, [saved], ckpt_path=ckpt_path, **options)
        content = torch.load(tmp_path / f"epoch={epochs - 1}.ckpt", weights_only=True)
        return dict(tree_leaves_with_path({name: content[name] for name in ("state_dict", "RolloutDataModule")}))

    straight = run(5)
    run(2)
    resumed = run(5, tmp_path / "epoch=1.ckpt")
    assert straight.keys() == resumed.keys()
    for path, leaf in straight.items():
        assert torch.equal(leaf, resumed[path]) if isinstance(leaf, torch.Tensor) else leaf == resumed[path]
    assert any("by_gap" in str(path) for path in straight)


def test_a_run_may_begin_to_follow_gaps_where_it_goes_on():
    data = tiny.data("red", "green", ratio=GapAware())
    data.load_state_dict({"iteration": 3})
    assert data.mixture.counts(4, 3) == {"red": 2, "green": 2}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_share_out_what_one_does(tiny_pipeline, tmp_path, experts, strategy):
    def work(name: str, **options):
        logged, data = fit(tiny_pipeline, tmp_path, experts, data={"batch_size": 3}, **options)
        state = data.state_dict()
        (tmp_path / f"{name}-{data.trainer.global_rank}").write_text(json.dumps([logged.of("mixture/"), state]))

    work("one")
    run_ranks(lambda: work("two", strategy=strategy, devices=2))
    (shares, state), first, second = (json.loads((tmp_path / n).read_text()) for n in ("one-0", "two-0", "two-1"))
    assert first == second
    assert first[0] == shares
    for task, steps in first[1]["by_gap"]["now"].items():
        assert steps == pytest.approx(state["by_gap"]["now"][task], rel=1e-4)


def test_without_teachers_there_are_no_gaps_to_follow(tiny_pipeline, tmp_path, experts):
    data, teacher = tiny.data(ratio=GapAware()), TeacherCallback(["red"], LoRATeacher(experts["red"]))
    policies = {
        "GRPOTeacher": tiny.policy(GRPOTeacher, tiny_pipeline, ClippedSurrogate()),
        "ColdStart": tiny.sft(tiny_pipeline),
    }
    for name, policy in policies.items():
        callbacks = [RewardCallback("red", tiny.Brightness()), *([teacher] if isinstance(policy, ColdStart) else [])]
        with pytest.raises(ValueError, match=f"GapAware follows the distances to the teachers .* {name} does not have"):
            tiny.trainer(tmp_path, callbacks).fit(policy, data)


def test_a_plan_counts_equal_shares_and_leaves_the_gaps_unknown(tiny_pipeline):
    policy = tiny.policy(OPDStudent, tiny_pipeline, sampler=Sampler(4))
    data = tiny.data("red", "green", ratio=GapAware(), **SIZES)
    teachers = [TeacherCallback([task], BaseTeacher()) for task in ("red", "green")]
    assert count_forwards(policy, data, teachers, 1, 6)["teacher-red + teacher-green"] == 12 * 3
    assert data.mixture.by_gap.gaps() == {}
    assert "tasks share the prompts alike" in plan(policy, data, teachers, Hardware()).notes[0]
    assert policy.distances._noted == []
