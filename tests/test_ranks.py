"""The laws of several ranks: they share the work and change nothing."""

import json
from functools import partial

import pytest
import tiny
import torch
from ranks import run_ranks

from flowopd.core import ClippedSurrogate
from flowopd.models.adapters.files import read_adapter
from flowopd.models.adapters.lora import ATTENTION
from flowopd.teachers import LoRATeacher
from flowopd.training import AdapterExport, GRPOTeacher, OPDStudent, RewardCallback, TeacherCallback

DDP, FSDP2 = ({"strategy": name, "devices": 2} for name in ("ddp", "fsdp2"))
both_strategies = pytest.mark.parametrize("two_ranks", [DDP, FSDP2], ids=["ddp", "fsdp2"])
TARGETS = [*ATTENTION, "proj_out"]  # the last one is outside of all blocks


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    names = enumerate(("red", "green", "start"))
    return {name: tiny.expert(folder / name, tiny_pipeline, seed, targets=TARGETS) for seed, name in names}


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
    "whole": partial(tiny.policy, OPDStudent, lr=1.0),
    "fused": partial(tiny.policy, OPDStudent, lr=1.0),
}


@pytest.fixture(scope="module", params=POLICIES)
def alone(request, tiny_pipeline, tmp_path_factory, experts):
    """A policy, and the folder where one rank trained it."""
    folder = tmp_path_factory.mktemp("alone")
    policy, fused = partial(POLICIES[request.param], tiny_pipeline, start=experts["start"]), request.param == "fused"
    fit(folder, policy(), experts, 6, fused)
    return policy, fused, folder


@both_strategies
def test_two_ranks_train_what_one_trains(tmp_path, experts, alone, two_ranks):
    """One rank has two batches of three steps; of two ranks each has one. An update takes all six."""
    policy, fused, one = alone
    two = tmp_path
    run_ranks(lambda: fit(two, policy(), experts, 3, fused, **two_ranks))
    start, first, second = (read_adapter(str(path)) for path in (experts["start"], one / "adapter", two / "adapter"))
    for key, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[key], value, rtol=0, atol=1e-6)
    moved = max((value - start.tensors[key]).abs().max() for key, value in first.tensors.items())
    assert moved > 1e-3
    assert_same_figures(one / "metrics.json", two / "metrics.json")


@both_strategies
def test_two_ranks_measure_what_one_measures(tiny_pipeline, tmp_path, experts, two_ranks):
    """Three held-out prompts of one task: the second rank draws a row that only pads."""

    def validate(name: str, **options):
        policy, data = tiny.policy(GRPOTeacher, tiny_pipeline, start=experts["start"]), tiny.data()
        trainer = tiny.trainer(tmp_path, callbacks(experts), limit_val_batches=1.0, **options)
        scores = trainer.validate(policy, data, verbose=False)[0]
        if trainer.is_global_zero:
            keep(tmp_path / name, scores)

    validate("one")
    run_ranks(lambda: validate("two", **two_ranks))
    assert_same_figures(tmp_path / "one", tmp_path / "two")


def test_prompts_that_do_not_divide_over_the_ranks_are_refused(tiny_pipeline, tmp_path):
    def refuse():
        policy, data = tiny.policy(GRPOTeacher, tiny_pipeline), tiny.data(prompts_per_iteration=3, batch_size=2)
        trainer = tiny.trainer(tmp_path, [RewardCallback("brightness", tiny.Brightness())], **DDP)
        with pytest.raises(ValueError, match=r"3 prompts per iteration .* over 2 ranks; .* multiple of 2"):
            trainer.fit(policy, data)

    run_ranks(refuse)


def test_a_failing_rank_is_reported():
    with pytest.raises(AssertionError, match=r"rank . of 2 failed"):
        run_ranks(lambda: 1 / 0)
