"""The laws of several ranks: they share the work and change nothing."""

import json
from functools import partial

import pytest
import tiny
import torch
from ranks import run_ranks

from flowopd.core import ClippedSurrogate
from flowopd.models.lora import read_adapter
from flowopd.teachers import LoRATeacher
from flowopd.training import AdapterExport, GRPOTeacher, OPDStudent, RewardCallback, TeacherCallback

DDP = {"strategy": "ddp", "devices": 2}


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {task: tiny.expert(folder / task, tiny_pipeline, seed=i) for i, task in enumerate(("red", "green", "start"))}


def callbacks(experts):
    teachers = [TeacherCallback([task], LoRATeacher(experts[task])) for task in ("red", "green")]
    return [*teachers, RewardCallback("brightness", tiny.Brightness()), AdapterExport()]


def fit(folder, policy, experts, accumulate: int, fused: bool = False, **options):
    """Two iterations, of one update each, from the same start."""
    torch.manual_seed(0)
    data = tiny.data("red", "green", fused=fused)
    options |= {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    trainer = tiny.trainer(folder, callbacks(experts), **options)
    trainer.fit(policy, data)
    if trainer.is_global_zero:
        keep(folder / "metrics.json", {name: float(value) for name, value in trainer.callback_metrics.items()})


def keep(path, figures: dict[str, float]):
    path.write_text(json.dumps(figures))


def assert_same_figures(first, second):
    assert json.loads(second.read_text()) == pytest.approx(json.loads(first.read_text()), abs=1e-6)


POLICIES = {
    "grpo": partial(tiny.policy, GRPOTeacher, objective=ClippedSurrogate(1.0), lr=3.0),
    "whole": partial(tiny.policy, OPDStudent, lr=20.0),
    "fused": partial(tiny.policy, OPDStudent, lr=20.0),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_two_ranks_train_what_one_trains(tiny_pipeline, tmp_path, experts, kind):
    """One rank has two batches of three steps; of two ranks each has one. An update takes all six."""
    one, two, fused = tmp_path / "one", tmp_path / "two", kind == "fused"
    policy = partial(POLICIES[kind], tiny_pipeline, start=experts["start"])
    fit(one, policy(), experts, 6, fused)
    run_ranks(lambda: fit(two, policy(), experts, 3, fused, **DDP))
    start, first, second = (read_adapter(str(path)) for path in (experts["start"], one / "adapter", two / "adapter"))
    for key, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[key], value, rtol=0, atol=1e-6)
    moved = max((value - start.tensors[key]).abs().max() for key, value in first.tensors.items())
    assert moved > 1e-3
    assert_same_figures(one / "metrics.json", two / "metrics.json")


def test_two_ranks_measure_what_one_measures(tiny_pipeline, tmp_path, experts):
    """Three held-out prompts of one task: the second rank draws a row that only pads."""

    def validate(name: str, **options):
        policy, data = tiny.policy(GRPOTeacher, tiny_pipeline, start=experts["start"]), tiny.data()
        trainer = tiny.trainer(tmp_path, callbacks(experts), limit_val_batches=1.0, **options)
        scores = trainer.validate(policy, data, verbose=False)[0]
        if trainer.is_global_zero:
            keep(tmp_path / name, scores)

    validate("one")
    run_ranks(lambda: validate("two", **DDP))
    assert_same_figures(tmp_path / "one", tmp_path / "two")


def test_prompts_that_do_not_divide_over_the_ranks_are_refused(tiny_pipeline, tmp_path):
    def refuse():
        policy, data = tiny.policy(GRPOTeacher, tiny_pipeline), tiny.data(prompts_per_iteration=3, batch_size=2)
        trainer = tiny.trainer(tmp_path, [RewardCallback("brightness", tiny.Brightness())], **DDP)
        with pytest.raises(ValueError, match="3 prompts per iteration do not divide over 2 ranks"):
            trainer.fit(policy, data)

    run_ranks(refuse)


def test_a_failing_rank_is_reported():
    with pytest.raises(AssertionError, match=r"rank . of 2 failed"):
        run_ranks(lambda: 1 / 0)
